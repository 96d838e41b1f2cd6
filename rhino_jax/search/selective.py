"""Which segments to recompute, so that a step fits and loses no more time than it must.

Every segment keeps what its backward half needs, or keeps what enters it and is
computed again. What that costs is read off a plan that recomputes nothing
(:mod:`rhino_jax.cost.stretches`); the choice is :mod:`rhino_jax.search.frontier`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.stretches import Stretch, stretches
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.search.frontier import Cost, fastest
from rhino_jax.search.prices import PICOSECONDS
from rhino_jax.search.remat import recomputable
from rhino_jax.search.subject import Subject

Segmented = tuple[tuple[int, tuple[Cost, ...]], ...]
"""The number of every segment, and what it costs as it is and, where it can be,
recomputed."""


def segment_costs(
    subject: Subject,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster,
    donated: tuple[int, ...],
) -> Segmented:
    """What every segment costs; nothing where fewer than two can be recomputed.

    Args:
        assignment: the plan of ``subject`` as it stands, nothing recomputed.
    """
    found = recomputable(subject.program, subject.pairs, subject.batch_inputs)
    if sum(bool(again) for _, again in found) < 2:
        return ()
    costs = stretches(
        subject.program,
        assignment,
        mesh,
        cluster,
        rule_of,
        donated,
        [segment for segment, _ in found],
    )
    return tuple(
        (segment.index, choices(cost, again))
        for (segment, again), cost in zip(found, costs, strict=True)
    )


@dataclass(frozen=True)
class Chosen:
    """The segments to recompute, and the seconds that it takes."""

    segments: tuple[int, ...]
    seconds: float


def chosen_segments(segments: Segmented, limit_bytes: int) -> Chosen | None:
    """The segments to recompute; None where that can not make it fit, or need not.

    Args:
        limit_bytes: of one device, for all but the step's inputs.
    """
    picks = fastest([costs for _, costs in segments], limit_bytes)
    if picks is None or not any(picks):
        return None
    again = [(n, costs[i]) for (n, costs), i in zip(segments, picks, strict=True) if i]
    ticks = sum(cost.ticks for _, cost in again)
    return Chosen(tuple(n for n, _ in again), ticks / PICOSECONDS)


def choices(stretch: Stretch, again: frozenset[int]) -> tuple[Cost, ...]:
    """What a segment costs as it is, and recomputed, where it can be."""
    kept = Cost(0, 0, stretch.saved_bytes, stretch.grad_bytes, stretch.peak_bytes)
    if not again:
        return (kept,)
    seconds = sum(stretch.op_seconds[op] for op in again)
    ticks = round(seconds * PICOSECONDS)
    return kept, replace(kept, ticks=ticks, saved=stretch.exit_bytes)
