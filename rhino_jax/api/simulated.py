"""A pipeline on the predicted clock: when every worker runs what, and sends what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rhino_jax.cluster.topology import Cluster, Link, between_parts, part
from rhino_jax.cost.stretches import op_seconds
from rhino_jax.ir.pipeline.chunks import crossing
from rhino_jax.ir.pipeline.flow import LOOP, OP
from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.rules import rule_of
from rhino_jax.schedule import Schedule
from rhino_jax.schedule.simulate import Timeline, simulate
from rhino_jax.schedule.tasks import KINDS


def simulated(
    programs: StagePrograms, schedule: Schedule, cluster: Cluster
) -> tuple[Timeline, float]:
    """The schedule on the predicted clock, and the seconds that the slowest worker
    spends before and behind it.

    Args:
        cluster: the whole of it, which the workers share.
    """
    share = part(cluster, schedule.num_workers)
    program, assignment = programs.program, programs.assignment
    spent = op_seconds(program, assignment, programs.mesh, share, rule_of)
    inside, outside = _seconds(programs, spent, schedule.num_microbatches)
    timeline = simulate(
        schedule,
        {task.kind: inside[task.kind] for task in schedule.tasks},
        **_transfers(programs, between_parts(cluster)),
    )
    return timeline, max(outside)


def _seconds(
    programs: StagePrograms, spent: Mapping[int, float], microbatches: int
) -> tuple[Mapping[str, Sequence[float]], Sequence[float]]:
    """Of every kind of task, by stage; and of every worker outside the loop."""
    chunks, producer = programs.chunks, programs.program.producer
    inside = {kind: [0.0] * chunks.num_stages for kind in KINDS}
    outside = [0.0] * (max(programs.worker_of) + 1)
    for chunk in chunks.chunks:
        total = 0.0
        for unit in (chunks.flow.units[n] for n in chunk.units):
            if unit.kind == OP:
                total += spent.get(unit.index, 0.0)
            elif unit.how:
                maker = producer[programs.move(unit.index).value]
                total += spent.get(~maker, 0.0)
        stage = chunk.key.stage
        if chunk.key.phase == LOOP:
            inside[chunks.kind_of(chunk.key)][stage] += total / microbatches
        else:
            outside[programs.worker_of[stage]] += total
    return inside, outside


def _transfers(programs: StagePrograms, link: Link) -> dict[str, Any]:
    """What stages send for a microbatch, as the simulator takes it."""
    sent: dict[tuple[int, int], float] = {}
    for edge, phase, version in crossing(programs.chunks, programs.inputs):
        if phase == LOOP:
            seconds = programs.num_bytes(version) / link.bytes_per_second
            sent[edge] = sent.get(edge, link.latency_seconds) + seconds
    edges = tuple(sorted({(min(edge), max(edge)) for edge in sent}))
    return {"edges": edges, "transfer_seconds": sent}
