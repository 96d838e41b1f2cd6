"""A plan's predictions and the compiled program, side by side, as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rhino_jax.cost.model import Prediction
from rhino_jax.verify.audit import Audit, AxisTraffic, Finding, audit
from rhino_jax.verify.collectives import HloCollective, axes_key, collective_axes
from rhino_jax.verify.facts import CompiledFacts
from rhino_jax.verify.hlo_memory import Busiest, busiest, recomputed
from rhino_jax.verify.hlo_time import CompilerTime, compiler_time
from rhino_jax.verify.matching import PlannedCollective
from rhino_jax.verify.targets import parse_target

ON_CHIP = {"tpu": frozenset(range(1, 64)), "cuda": frozenset[int]()}
"""Memory spaces of a platform's HLO that are no device memory."""


@dataclass(frozen=True)
class KindTraffic:
    """Wire bytes of one kind of collective over one group of axes: a device, a step."""

    axes: str
    kind: str
    planned_bytes: int
    compiled_bytes: int


@dataclass(frozen=True)
class Witness:
    """What the real compiler made of a plan, beside what was predicted.

    In words: :func:`rhino_jax.report.witness.witness_text`.

    Attributes:
        facts: what the compiler said, its refusal or its end too.
        prediction: what Rhino's prices say of the same plan.
        audit: planned against compiled collectives; None where nothing was compiled.
        limit_bytes: memory of one device that the plan was made for; searched plans
            leave a margin free.
        mesh: the mesh in words.
    """

    facts: CompiledFacts
    prediction: Prediction
    audit: Audit | None
    limit_bytes: int
    mesh: str
    planned: tuple[PlannedCollective, ...] = ()
    mesh_shape: tuple[tuple[str, int], ...] = ()

    @property
    def ok(self) -> bool:
        """Compiled, and to the plan: its collectives, in the device's memory."""
        return self.audit is not None and self.audit.ok and bool(self.fits)

    @property
    def rows(self) -> tuple[AxisTraffic, ...]:
        """Wire bytes by group of mesh axes."""
        return self.audit.rows if self.audit else ()

    @property
    def extra(self) -> tuple[Finding, ...]:
        """Collectives that nobody planned."""
        return self.audit.extra if self.audit else ()

    @property
    def missing(self) -> tuple[Finding, ...]:
        """Planned collectives that are not in the compiled program."""
        return self.audit.missing if self.audit else ()

    @cached_property
    def kinds(self) -> tuple[KindTraffic, ...]:
        """Wire bytes by kind of collective and group of axes."""
        if not self.facts.ok:
            return ()
        shape = dict(self.mesh_shape)
        return kinds_of(self.planned, self.facts.collectives, shape)

    @property
    def compiled_peak_bytes(self) -> int:
        """The compiler's peak, or what it said it would need; 0 where it said nothing.

        Small programs have more in a TPU compiler's peak, which counts on-chip memory,
        than arguments, results and temporaries together: those then. The CPU
        compiler's peak leaves temporaries out: those then, too.
        """
        memory, refused = self.facts.memory, self.facts.out_of_memory
        if memory is not None:
            told = memory.peak_bytes if self.platform != "cpu" else 0
            return min(told or memory.live_bytes, memory.live_bytes)
        return refused.needed_bytes if refused else 0

    @property
    def needed_bytes(self) -> int:
        """What the device must have for it, gaps between buffers included.

        Not what a TPU compiler gives as temporaries: it places them widely where there
        is room, and counts gaps twice. Its refusals name all that is needed, a GPU
        compiler's temporaries alone.
        """
        if self.platform == "tpu" or not (
            self.facts.memory or self.facts.out_of_memory
        ):
            return self.compiled_peak_bytes
        if self.facts.memory is not None:
            return self.facts.memory.live_bytes
        return self.compiled_peak_bytes + self.prediction.memory.input_bytes

    @property
    def predicted_fits(self) -> bool:
        return self.prediction.peak_bytes <= self.limit_bytes

    @property
    def fits(self) -> bool | None:
        """Whether it does, by the compiler's word; None where there is none."""
        if self.facts.memory is not None:
            return self.needed_bytes <= self.prediction.device_bytes
        return False if self.facts.out_of_memory else None

    @cached_property
    def busiest(self) -> Busiest | None:
        """What stands at the compiled program's peak, by name."""
        if not self.facts.ok:
            return None
        return busiest(self.facts.hlo, ON_CHIP.get(self.platform, frozenset()))

    @cached_property
    def recomputed(self) -> int:
        """Instructions that the compiler repeats by itself, to save memory.

        Where there are any, its peak is not that of the program it was given.
        """
        return recomputed(self.facts.hlo)

    @cached_property
    def compiler_time(self) -> CompilerTime | None:
        """The compiler's own estimate; None where nothing was compiled."""
        return compiler_time(self.facts.hlo) if self.facts.ok else None

    @property
    def platform(self) -> str:
        return parse_target(self.facts.target).platform

    @property
    def device(self) -> str:
        """The catalogue's name of the device compiled for."""
        return self.facts.target.partition(":")[0]


def kinds_of(
    planned: Sequence[PlannedCollective],
    compiled: Sequence[HloCollective],
    mesh_shape: Mapping[str, int],
) -> tuple[KindTraffic, ...]:
    """Planned and compiled wire bytes by axes and kind, as each side names it."""
    ours: dict[tuple[str, str], int] = {}
    for one in planned:
        wide = [a for a in mesh_shape if a in one.axes and mesh_shape[a] > 1]
        slot = axes_key(wide), one.kind
        ours[slot] = ours.get(slot, 0) + one.wire_bytes * one.count
    theirs: dict[tuple[str, str], int] = {}
    for real in compiled:
        if real.part_of:
            continue
        slot = axes_key(collective_axes(real, mesh_shape)), real.kind
        theirs[slot] = theirs.get(slot, 0) + real.total_wire_bytes
    return tuple(
        KindTraffic(*slot, ours.get(slot, 0), theirs.get(slot, 0))
        for slot in sorted({*ours, *theirs})
        if ours.get(slot, 0) or theirs.get(slot, 0)
    )


def audited(
    facts: CompiledFacts,
    planned: Sequence[PlannedCollective],
    mesh_shape: Mapping[str, int],
) -> Audit | None:
    """The audit of what was compiled; None where nothing was."""
    return audit(planned, facts, mesh_shape) if facts.ok else None
