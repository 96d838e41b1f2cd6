"""What a user may ask for, as one frozen value that is checked at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from rhino_jax.errors import OptionsError, nearest, problems
from rhino_jax.schedule.generate import LOOPED, SCHEDULES

LOWERINGS = ("manual", "auto")
REMAT = ("", "none", "boundary")
WRITTEN, RECOGNIZED = ATTENTION = ("written", "recognized")
LEVELS = (1, 2)
AUTO = "auto"
"""Of ``pipeline_stages``: as many as are fastest."""


@dataclass(frozen=True)
class Options:
    """Options of :func:`rhino_jax.auto_parallel` and :func:`rhino_jax.plan`.

    Attributes:
        mesh: the logical mesh: a mapping of axis names to sizes, a
            ``jax.sharding.Mesh``, or None for one chosen from the device count.
        cluster: plan for this hardware ("h100:2x8", "v5e:16x16x4slices", a YAML file
            of one's own) in place of the attached devices.
        profile: what kernels and collectives take: a file that ``rhino profile`` wrote,
            or "compile-only" (what the device's own compiler says). "" is what was
            kept for the attached devices, else what comes with Rhino.
        recipe: one of the known expert plans ("zero3") in place of a search.
        optimization_level: 1 searches for seconds; 2 tries more meshes, more orders,
            more plans.
        memory_limit_bytes: of one device; None is the device's memory less a margin.
        microbatches: how many parts the batch is run in, gradients accumulated; None
            leaves it to the search (1 with a recipe).
        pipeline_stages: cut the step in this many pipeline stages, each on its share of
            the devices; ``mesh`` is then that of one share, or has a leading axis
            "stage" (a ``jax.sharding.Mesh`` must). 1 is no pipeline, "auto" the number
            (or none) that is predicted to be fastest. None is no pipeline, unless a
            step without one would wait for the network between hosts a good part of
            its time (and no mesh, pins or recipe are given): then it is "auto". Layers
            in one scan are divided by "gpipe" and "circular" alone: in equal stages of
            one program, which several processes run as any other.
        schedule: in what order stages run microbatches: "1f1b", "gpipe", "eager_1f1b",
            "zero_bubble"; "interleaved" and "circular" run several stages on each share
            of the devices: two, or as many as is said ("interleaved:3").
        remat: "none" or "boundary" (layers keep what enters them and are computed
            again in the backward pass); None leaves it to the search ("none" with a
            recipe).
        collective_matmul: in searched plans, products may gather what they read, and
            scatter what they make, while they work: shards go around a ring. Only
            where the compiler sends them beside a product (TPUs).
        attention: "written" (products and a softmax stay what they are) or "recognized"
            (where they are exactly attention they are run as one op, which keeps no
            scores and can be split along the sequence); None leaves it to the search
            ("written" with a recipe), which tries the second where scores take much of
            the time or of the memory.
        cache_dir: where plans are kept; None is the user's cache, "" keeps none.
        pins: tree path (or ``rhino.name``) to PartitionSpec: layouts to keep.
        lowering: "manual" (the plan is the program) or "auto" (a replay under
            sharding constraints, left to XLA's partitioner).
        donate: give the old state's buffers to the new state.
        static_argnums: positions of arguments that are no arrays.
        rules: name of an op to its rule, ``"bij,jk->bik"`` or an
            :class:`rhino_jax.extend.OpRule`; before those of ``register_rule``.

    Raises:
        OptionsError: an option out of range, all of them at once.
    """

    mesh: Any = None
    cluster: str = ""
    profile: str = ""
    recipe: str = ""
    optimization_level: int = 1
    memory_limit_bytes: int | None = None
    microbatches: int | None = None
    pipeline_stages: int | Literal["auto"] | None = None
    schedule: str = "1f1b"
    remat: str | None = None
    collective_matmul: bool = True
    attention: str | None = None
    cache_dir: str | None = None
    pins: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    lowering: str = "manual"
    donate: bool = True
    static_argnums: tuple[int, ...] = ()
    rules: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        found = []
        if self.lowering not in LOWERINGS:
            near = nearest(self.lowering, LOWERINGS) or LOWERINGS
            found.append(f"lowering={self.lowering!r}: did you mean {near[0]!r}?")
        if self.optimization_level not in LEVELS:
            found.append(f"optimization_level={self.optimization_level!r}: 1 or 2")
        if self.remat not in (None, *REMAT):
            near = nearest(str(self.remat), REMAT[1:]) or REMAT[1:]
            found.append(f"remat={self.remat!r}: did you mean {near[0]!r}?")
        if self.attention not in (None, *ATTENTION):
            near = nearest(str(self.attention), ATTENTION) or ATTENTION
            found.append(f"attention={self.attention!r}: did you mean {near[0]!r}?")
        elif (self.attention, self.lowering) == (RECOGNIZED, "auto"):
            found.append("attention='recognized' is run by the manual lowering alone")
        for name in ("memory_limit_bytes", "microbatches", "pipeline_stages"):
            given = getattr(self, name)
            if (name, given) == ("pipeline_stages", AUTO):
                if self.recipe:
                    found.append("pipeline_stages='auto': with a recipe, say how many")
            elif given is not None and not (isinstance(given, int) and given >= 1):
                found.append(f"{name}={given!r}: a whole number of at least 1, or None")
        if not isinstance(self.pins, Mapping):
            found.append(f"pins must map tree paths to PartitionSpecs: {self.pins!r}")
        if not isinstance(self.rules, Mapping):
            found.append(f"rules must map names of ops to rules: {self.rules!r}")
        if not isinstance(self.cluster, str):
            found.append(f"cluster must be a string like 'h100:2x8': {self.cluster!r}")
        found += self._schedule_problems()
        if not isinstance(self.profile, str):
            found.append(f"profile must be a file's path: {self.profile!r}")
        if found:
            raise OptionsError(problems("options:", found))

    def _schedule_problems(self) -> list[str]:
        name, _, each = str(self.schedule).partition(":")
        if name not in SCHEDULES:
            near = nearest(name, SCHEDULES) or list(SCHEDULES)
            return [f"schedule={self.schedule!r}: did you mean {near[0]!r}?"]
        if each and not (name in LOOPED and each.isdigit() and int(each) > 0):
            several = " and ".join(sorted(LOOPED))
            return [
                f"schedule={self.schedule!r}: only {several} run several stages on "
                "each share of the devices, as in 'interleaved:3'"
            ]
        if self.pipeline_stages and self.lowering == "auto":
            return [
                "lowering='auto' runs no pipeline: drop it, or drop pipeline_stages"
            ]
        return []

    @property
    def stages(self) -> int | None:
        """How many pipeline stages are asked for; None where no pipeline is."""
        asked = self.pipeline_stages
        return asked if isinstance(asked, int) and asked > 1 else None

    @property
    def stages_per_worker(self) -> int:
        """How many stages each share of the devices runs."""
        name, _, each = self.schedule.partition(":")
        return int(each or 2) if name in LOOPED else 1


def make_options(**given: Any) -> Options:
    """Options from keyword arguments.

    Raises:
        OptionsError: an unknown option; names the nearest.

    >>> make_options(lowering="auto").lowering
    'auto'
    """
    known = Options.__dataclass_fields__
    unknown = [
        f"{name!r}: did you mean {', '.join(nearest(name, known)) or list(known)}?"
        for name in given
        if name not in known
    ]
    if unknown:
        raise OptionsError(problems("unknown options:", unknown))
    if "static_argnums" in given:
        numbers = given["static_argnums"]
        given["static_argnums"] = (
            (numbers,) if isinstance(numbers, int) else tuple(numbers)
        )
    return Options(**given)
