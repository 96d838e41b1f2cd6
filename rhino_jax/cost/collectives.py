"""Seconds of one collective: the cheapest form that a library would choose.

Over one link among n devices:

- *ring*: n-1 steps of latency and B(n-1)/n bytes; an all-reduce is a reduce-scatter and
  an all-gather (Thakur, Rabenseifner and Gropp, "Optimization of Collective
  Communication Operations in MPICH", IJHPCA 2005; Chan et al., "Collective
  communication: theory, practice, and experience", CCPE 2007). Around a closed torus
  dimension both ways at once, n/2 steps.
- *tree* (all-reduce): two binary trees that each reduce and broadcast half, fewer steps
  and 2B bytes (Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth
  broadcast, reduction and scan", Parallel Computing 2009), as NCCL builds them: a chain
  in a host, trees between (src/graph/tuning.cc, with its 0.92 of the bandwidth).

Over links of several speeds:

- *hierarchical*: level by level, the fastest innermost, so that slower links carry only
  what the faster ones have already divided (Cho et al., "BlueConnect", MLSys 2019). So
  do slices of a TPU: reduce-scatter over ICI, all-reduce over the data centre's
  network, all-gather over ICI.
- *rails*: one ring a network adapter through all devices, all at once (NCCL, the same
  file): more latency, but the links are busy together.
- *torus*: the dimensions at once, each part of the data in another order of them (Jain
  and Sabharwal, "Optimal bucket algorithms for large MPI collectives on torus
  interconnects", ICS 2010; How to Scale Your Model, part 3).

An all-to-all over a torus dimension is bound by the wires across its middle. What a
profile says of a kind over a link (:class:`~rhino_jax.cluster.topology.Fit`) takes the
place of ring and tree over that link.

A collective works on pieces that lie one after another. On simulated devices those of a
dimension that is not the first are copied to and fro (``habits.rearranges``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rhino_jax.cluster.topology import Cluster, Crossing, Link, crossing
from rhino_jax.cost.compute import memory_seconds
from rhino_jax.cost.habits import HABITS
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    FREE,
    PERMUTE,
    RAGGED,
    REDUCE_SCATTER,
    Step,
)

TREE_BANDWIDTH = 0.92
"""Of a ring's (NCCL src/graph/tuning.cc)."""


def step_seconds(step: Step, mesh: Mesh, cluster: Cluster) -> float:
    """Seconds of one step of a move; 0.0 for what sends nothing."""
    if step.kind in FREE or not step.wire_bytes:
        return 0.0
    crossed = crossing(cluster, mesh, step.axes)
    seconds = collective_seconds(step.kind, step.wire_bytes, crossed)
    if HABITS[cluster.device.platform].rearranges:
        size = mesh.group_size(step.axes)
        whole = step.wire_bytes * size / (size - 1)
        seconds += rearranged(step) * memory_seconds(2 * whole, cluster.device)
    return seconds


def rearranged(step: Step) -> int:
    """How often a step's array is copied because its pieces do not lie one after
    another: before, after, or both.

    >>> rows, columns = Layout.of([("x", 4)], []), Layout.of([], [("x", 4)])
    >>> moves = (rows, Layout.replicated(2)), (columns, Layout.replicated(2))
    >>> [rearranged(Step(ALL_GATHER, ("x",), *move, 8)) for move in moves]
    [0, 1]
    """
    if step.kind == PERMUTE:
        return 0
    return sum(_inside(step, layout) for layout in (step.source, step.target))


def _inside(step: Step, layout: Layout) -> bool:
    """Whether the step's axes split a dimension that is not the first."""
    return any(split.axis in step.axes for dim in layout.dims[1:] for split in dim)


def collective_seconds(kind: str, wire_bytes: int, crossed: Crossing) -> float:
    """Seconds of a collective in which each device sends ``wire_bytes``.

    Args:
        kind: one of :mod:`rhino_jax.ir.steps`.
        wire_bytes: by the counter of the house (:class:`~rhino_jax.ir.steps.Step`).
        crossed: links and group sizes, the fastest first; of none (the time axis, or
            one device) the price is 0.0.
    """
    if not crossed:
        return 0.0
    return _SECONDS[kind](kind, float(wire_bytes), crossed)


# ---- forms of gathers and scatters ---------------------------------------------------


def _ring(kind: str, held: float, link: Link, count: int) -> float:
    """Among ``count`` devices over one link; ``held`` is what all have together."""
    sent = held * (count - 1) / count
    if link.fits and (fitted := link.fitted(kind, sent, count)) is not None:
        return fitted
    steps = count // 2 if link.wraps else count - 1
    return steps * link.latency_seconds + sent / link.ring_bytes_per_second


def _in_turn(kind: str, held: float, levels: Crossing) -> float:
    """One level after the other; a level carries what is left of ``held``."""
    seconds = 0.0
    for link, count in levels:
        seconds += _ring(kind, held, link, count)
        held /= count
    return seconds


def _at_once(kind: str, held: float, levels: Crossing) -> float:
    """All dimensions of a torus busy: each of as many parts starts with another."""
    many = len(levels)
    parts = [held / many] * many
    seconds = 0.0
    for turn in range(many):
        taken = [levels[(part + turn) % many] for part in range(many)]
        pairs = list(zip(parts, taken, strict=True))
        seconds += max(_ring(kind, part, *level) for part, level in pairs)
        parts = [part / count for part, (_, count) in pairs]
    return seconds


def _rails(held: float, crossed: Crossing) -> float:
    """Rings through all devices, as many as a level has devices inside."""
    size = math.prod(count for _, count in crossed)
    latency, slowest, inside, outside = 0.0, 0.0, 1, size
    for link, count in crossed:
        outside //= count
        latency += (count - 1) * outside * link.latency_seconds
        slowest = max(slowest, 1 / (inside * link.ring_bytes_per_second))
        inside *= count
    return latency + held * (size - 1) / size * slowest


def _is_torus(level: tuple[Link, int]) -> bool:
    return level[0].kind == TORUS


def _stages(crossed: Crossing) -> list[Crossing]:
    """Levels, the dimensions of a torus together."""
    torus = tuple(level for level in crossed if _is_torus(level))
    stages: list[Crossing] = []
    for level in crossed:
        if not _is_torus(level):
            stages.append((level,))
        elif level is torus[0]:
            stages.append(torus)
    return stages


def _stage(kind: str, held: float, stage: Crossing) -> float:
    in_turn = _in_turn(kind, held, stage)
    return in_turn if len(stage) == 1 else min(in_turn, _at_once(kind, held, stage))


def _railed(crossed: Crossing) -> bool:
    return len(crossed) > 1 and not any(
        _is_torus(level) or level[0].fits for level in crossed
    )


def _gather(kind: str, wire_bytes: float, crossed: Crossing) -> float:
    """All-gather or reduce-scatter."""
    size = math.prod(count for _, count in crossed)
    whole = held = wire_bytes * size / (size - 1)
    seconds = 0.0
    for stage in _stages(crossed):
        seconds += _stage(kind, held, stage)
        held /= math.prod(count for _, count in stage)
    return min(seconds, _rails(whole, crossed)) if _railed(crossed) else seconds


# ---- the other kinds -----------------------------------------------------------------


def _all_reduce(kind: str, wire_bytes: float, crossed: Crossing) -> float:
    size = math.prod(count for _, count in crossed)
    return _reduced(wire_bytes * size / (2 * (size - 1)), crossed)


def _reduced(held: float, crossed: Crossing) -> float:
    """Of ``held`` bytes a device, the cheapest of all forms."""
    if len(crossed) == 1:
        link, count = crossed[0]
        sent = 2 * held * (count - 1) / count
        if link.fits and (fitted := link.fitted(ALL_REDUCE, sent, count)) is not None:
            return fitted
    inner, *outer = _stages(crossed)
    levels = tuple(level for stage in outer for level in stage)
    forms = [
        _stage(REDUCE_SCATTER, held, inner)
        + (_reduced(held / math.prod(c for _, c in inner), levels) if levels else 0.0)
        + _stage(ALL_GATHER, held, inner)
    ]
    if all(link.tree_latency_seconds and not link.fits for link, _ in crossed):
        forms.append(_tree(held, crossed))
    if _railed(crossed):
        forms.append(2 * _rails(held, crossed))
    return min(forms)


def _tree(held: float, crossed: Crossing) -> float:
    """A chain over the innermost level, double binary trees over the others."""
    steps = slowest = 0.0
    inside = 1
    for place, (link, count) in enumerate(crossed):
        chain = place == 0 and count > 1 and len(crossed) > 1
        hops = count - 1 if chain else math.ceil(math.log2(count))
        steps += hops * link.tree_latency_seconds
        rate = TREE_BANDWIDTH * inside * link.ring_bytes_per_second
        slowest = max(slowest, 1 / rate)
        inside *= count
    return 2 * (steps + held * slowest)


def _all_to_all(kind: str, wire_bytes: float, crossed: Crossing) -> float:
    """Of n-1 peers, (k-1) times the devices inside it are reached over a level of k."""
    size = math.prod(count for _, count in crossed)
    to_each = wire_bytes / (size - 1)
    seconds, inside = 0.0, 1
    for stage in _stages(crossed):
        count = math.prod(c for _, c in stage)
        if _is_torus(stage[0]):
            seconds += _across(to_each * inside * count, stage)
        else:
            ((link, _),) = stage
            sent = (count - 1) * inside * to_each
            fitted = link.fitted(ALL_TO_ALL, sent, count) if link.fits else None
            seconds += (
                (count - 1) * link.latency_seconds + sent / link.ring_bytes_per_second
                if fitted is None
                else fitted
            )
        inside *= count
    return seconds


def _across(held: float, dimensions: Crossing) -> float:
    """All-to-all on a torus, ``held`` bytes a device: the fullest wires decide.

    Of a dimension of n, a device's bytes travel n/4 hops on average where it closes
    (n²/4 over all n), and half of them cross the middle where it does not.
    """
    hops = sum((count // 2) * link.latency_seconds for link, count in dimensions)
    return hops + max(
        held * (count * count // 4) / count / link.ring_bytes_per_second
        for link, count in dimensions
    )


def _permute(kind: str, wire_bytes: float, crossed: Crossing) -> float:
    """All at once, as slow as the slowest link, which goes one way."""
    link, count = crossed[-1]
    if link.fits and (fitted := link.fitted(kind, wire_bytes, count)) is not None:
        return fitted
    return link.latency_seconds + wire_bytes / link.bytes_per_second


_SECONDS: Mapping[str, Callable[[str, float, Crossing], float]] = {
    ALL_GATHER: _gather,
    REDUCE_SCATTER: _gather,
    ALL_REDUCE: _all_reduce,
    ALL_TO_ALL: _all_to_all,
    RAGGED: _all_to_all,
    PERMUTE: _permute,
}
