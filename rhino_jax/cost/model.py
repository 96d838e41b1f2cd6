"""What a plan will cost: seconds and bytes of one step, predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.buffers import ACCUMULATE, RuleOf, Unfolded, unfold
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.combining import collective_seconds
from rhino_jax.cost.compiled import Compiled, compiled
from rhino_jax.cost.compute import work_of
from rhino_jax.cost.fusion import Fusion, fusion
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.handed import handed_by, turn_of
from rhino_jax.cost.memory import Held, Memory, memory_of
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program


@dataclass(frozen=True)
class PricedCollective:
    """One collective: what each device sends each time, how often, seconds each time.

    Of several that the compiler combines each has the share of its bytes in their
    seconds. ``op`` is the index of the op of the outermost Program it is written at.
    """

    kind: str
    axes: tuple[str, ...]
    wire_bytes: int
    count: int
    seconds: float
    op: int

    @property
    def total_seconds(self) -> float:
        return self.seconds * self.count


@dataclass(frozen=True)
class Prediction:
    """One step of a plan on one device of a cluster.

    Attributes:
        step_seconds: compute and communication one after the other: nothing is
            hidden behind anything, so an upper bound in that.
        compute_seconds, comm_seconds: its two parts.
        flops: of matrix products and convolutions on one device.
        memory_traffic_bytes: read and written by all ops but collectives.
        wire_bytes: sent by each device.
        memory: the peak, and what stands there, as the program is written.
        compiled: what a compiler is expected to make of it.
        device_bytes: memory of the device.
        collectives: every collective of the plan, in order.
    """

    step_seconds: float
    compute_seconds: float
    comm_seconds: float
    flops: float
    memory_traffic_bytes: float
    wire_bytes: int
    memory: Memory
    device_bytes: int
    collectives: tuple[PricedCollective, ...]
    compiled: Compiled

    @property
    def peak_bytes(self) -> int:
        return self.memory.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether what the compiled program needs is within the device's memory."""
        return self.compiled.needed_bytes <= self.device_bytes


def predict(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster,
    rule_of: RuleOf,
    donated: tuple[int, ...] = (),
    limit_bytes: int | None = None,
) -> Prediction:
    """Seconds and bytes of one step of ``program`` under ``assignment``.

    Args:
        mesh: laid over the whole cluster, row-major.
        rule_of: the look-up of rules (:func:`rhino_jax.rules.rule_of`).
        donated: positions of inputs whose memory outputs may take over.
        limit_bytes: of the compiled program only this is asked, and only where it is
            in doubt: whether it is within the limit as it is written.
    """
    mesh = assignment.over(mesh)
    habits = HABITS[cluster.device.platform]
    unfolded = unfold(program, assignment, mesh, rule_of, donated, habits)
    fused = fusion(unfolded, habits)
    work = work_of(unfolded, fused, mesh, cluster.device)
    priced = tuple(_collectives(unfolded, fused, mesh, cluster, 1, None))
    comm_seconds = sum(one.total_seconds for one in priced)
    held = Held(unfolded, fused, habits)
    memory, device_bytes = memory_of(held), cluster.device.memory_bytes
    return Prediction(
        work.seconds + comm_seconds,
        work.seconds,
        comm_seconds,
        work.flops,
        work.num_bytes,
        sum(one.wire_bytes * one.count for one in priced),
        memory,
        device_bytes,
        priced,
        compiled(held, memory, habits, device_bytes, limit_bytes),
    )


def _collectives(
    unfolded: Unfolded,
    fused: Fusion,
    mesh: Mesh,
    cluster: Cluster,
    count: int,
    op: int | None,
) -> Iterator[PricedCollective]:
    """All branches of a ``cond`` are counted; a ``while`` counts as one trip."""
    habits = HABITS[cluster.device.platform]
    seconds = collective_seconds(unfolded, fused, mesh, cluster)
    for number, at in enumerate(unfolded.instructions):
        place = at.index if op is None else op
        if at.step and at.step.wire_bytes:
            step, turns = (
                turn_of(at.step, mesh) if at.within is not None else (at.step, 1)
            )
            yield PricedCollective(
                step.kind,
                step.axes,
                step.wire_bytes,
                count * turns,
                seconds[number] / turns,
                place,
            )
        for one in handed_by(at, mesh):
            yield PricedCollective(
                one.step.kind,
                one.step.axes,
                one.step.wire_bytes,
                count * one.turns,
                step_seconds(one.step, mesh, cluster),
                place,
            )
        inside = op if at.kind == ACCUMULATE else place
        for body in at.bodies:
            within = fusion(body, habits)
            trips = count * at.trips
            yield from _collectives(body, within, mesh, cluster, trips, inside)
