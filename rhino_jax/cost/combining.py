"""Seconds of a step's collectives: those that compilers combine wait for links once,
and those that a product does by itself are partly hidden."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.collective_matmul import within_seconds
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.compute import kernel_works
from rhino_jax.cost.fusion import Fusion
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.instructions import Unfolded
from rhino_jax.cost.lives import real_reads
from rhino_jax.cost.order import combined_at
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.steps import Step


def collective_seconds(
    unfolded: Unfolded, fused: Fusion, mesh: Mesh, cluster: Cluster
) -> dict[int, float]:
    """Of every collective, by its instruction: what is combined is sent at once."""
    reads = [real_reads(at, fused) for at in unfolded.instructions]
    threshold = HABITS[cluster.device.platform].combine_bytes
    places = combined_at(unfolded, reads, threshold)
    groups: dict[int, list[tuple[int, Step]]] = defaultdict(list)
    for number, at in enumerate(unfolded.instructions):
        if at.step and at.step.wire_bytes and at.within is None:
            groups[places.get(number, number)].append((number, at.step))
    found = {}
    for members in groups.values():
        total = sum(step.wire_bytes for _, step in members)
        whole = replace(members[0][1], wire_bytes=total)
        each = step_seconds(whole, mesh, cluster) / total
        found.update({number: step.wire_bytes * each for number, step in members})
    if any(at.within is not None for at in unfolded.instructions):
        works = kernel_works(unfolded, fused, mesh, cluster.device)
        found.update(within_seconds(unfolded, works, mesh, cluster))
    return found
