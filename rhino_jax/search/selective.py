"""Which segments to recompute, so that a step fits and loses no more time than it must.

Every segment keeps what its backward half needs, or keeps what enters it and is
computed again. What that costs is read off a plan that recomputes nothing
(:mod:`rhino_jax.cost.stretches`); the choice is :mod:`rhino_jax.search.frontier`'s.
"""

from __future__ import annotations

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.reshard import local_bytes
from rhino_jax.cost.stretches import Stretch, stretches
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.search.frontier import Cost, fastest
from rhino_jax.search.remat import recomputable
from rhino_jax.search.subject import Subject

TICKS_PER_SECOND = 10**12


def chosen_segments(
    subject: Subject,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster,
    donated: tuple[int, ...],
    limit_bytes: int,
) -> tuple[int, ...] | None:
    """The segments to recompute; None where that can not make it fit, or need not.

    Args:
        assignment: the plan of ``subject`` as it stands, nothing recomputed.
        limit_bytes: of one device, for everything.
    """
    found = recomputable(subject.program, subject.pairs, subject.batch_inputs)
    if sum(bool(again) for _, again in found) < 2:
        return None
    costs = stretches(
        subject.program,
        assignment,
        mesh,
        cluster,
        rule_of,
        donated,
        [segment for segment, _ in found],
    )
    inputs = input_bytes(subject, assignment, mesh)
    picks = fastest(
        [choices(cost, again) for cost, (_, again) in zip(costs, found, strict=True)],
        limit_bytes - inputs,
    )
    if picks is None or not any(picks):
        return None
    return tuple(s.index for (s, _), i in zip(found, picks, strict=True) if i)


def choices(stretch: Stretch, again: frozenset[int]) -> list[Cost]:
    """What a segment costs as it is, and recomputed, where it can be."""
    kept = Cost(0, 0, stretch.saved_bytes, stretch.grad_bytes, stretch.peak_bytes)
    if not again:
        return [kept]
    seconds = sum(stretch.op_seconds[op] for op in again)
    ticks = round(seconds * TICKS_PER_SECOND)
    return [
        kept,
        Cost(ticks, 0, stretch.exit_bytes, stretch.grad_bytes, stretch.peak_bytes),
    ]


def input_bytes(subject: Subject, assignment: Assignment, mesh: Mesh) -> int:
    """The step's inputs on one device."""
    values = subject.program.values
    return sum(
        local_bytes(values[v].shape, values[v].dtype, layout, mesh)
        for v, layout in zip(subject.program.inputs, assignment.inputs, strict=True)
    )
