"""Seconds of one collective: latency and bandwidth over the links it crosses.

A ring over n devices takes n-1 steps of latency and sends B(n-1)/n bytes; an all-reduce
is a reduce-scatter and an all-gather (Thakur, Rabenseifner and Gropp, "Optimization of
Collective Communication Operations in MPICH", IJHPCA 2005: ring all-gather, and
Rabenseifner's all-reduce). Over links of several speeds it is done level by level, the
fastest innermost, so that slower links carry only what the faster ones have already
divided (Cho et al., "BlueConnect", MLSys 2019). An all-to-all sends each peer its part
over the slowest link on the way, the links one after the other. Levels are not
overlapped with one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rhino_jax.cluster.topology import Cluster, Crossing, crossing
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    FREE,
    PERMUTE,
    REDUCE_SCATTER,
    Step,
)


def step_seconds(step: Step, mesh: Mesh, cluster: Cluster) -> float:
    """Seconds of one step of a move; 0.0 for what sends nothing."""
    if step.kind in FREE or not step.wire_bytes:
        return 0.0
    crossed = crossing(cluster, mesh, step.axes)
    return collective_seconds(step.kind, step.wire_bytes, crossed)


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
    return _SECONDS[kind](float(wire_bytes), crossed)


def _ring(wire_bytes: float, crossed: Crossing) -> float:
    """All-gather or reduce-scatter: n-1 hops and B(n-1)/n bytes a level, B falling."""
    size = math.prod(count for _, count in crossed)
    held = wire_bytes * size / (size - 1)
    seconds = 0.0
    for link, count in crossed:
        sent = held * (count - 1) / count
        seconds += (count - 1) * link.latency_seconds
        seconds += sent / link.ring_bytes_per_second
        held /= count
    return seconds


def _both_ways(wire_bytes: float, crossed: Crossing) -> float:
    return 2 * _ring(wire_bytes / 2, crossed)


def _all_to_all(wire_bytes: float, crossed: Crossing) -> float:
    """Of n-1 peers, (k-1) times the devices inside it are reached over a level of k."""
    size = math.prod(count for _, count in crossed)
    to_each = wire_bytes / (size - 1)
    seconds, inside = 0.0, 1
    for link, count in crossed:
        peers = (count - 1) * inside
        seconds += (count - 1) * link.latency_seconds
        seconds += peers * to_each / link.ring_bytes_per_second
        inside *= count
    return seconds


def _permute(wire_bytes: float, crossed: Crossing) -> float:
    """All at once, as slow as the slowest link, which goes one way."""
    link, _ = crossed[-1]
    return link.latency_seconds + wire_bytes / link.bytes_per_second


_SECONDS: Mapping[str, Callable[[float, Crossing], float]] = {
    ALL_GATHER: _ring,
    REDUCE_SCATTER: _ring,
    ALL_REDUCE: _both_ways,
    ALL_TO_ALL: _all_to_all,
    PERMUTE: _permute,
}
