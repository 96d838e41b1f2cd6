"""Which stage runs which segments, and the chunks that a plan is cut in.

Segments stand in an order that data flows in, so any division into runs of neighbours
is a pipeline. What each would cost as a stage of its own is read off the plan, cut
between all of them; :mod:`rhino_jax.search.stages` then chooses the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rhino_jax.cluster.topology import Link
from rhino_jax.errors import InfeasibleError
from rhino_jax.ir.analysis.regions import Regions
from rhino_jax.ir.analysis.segments import Segmentation
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.pipeline.chunks import Chunks, crossing, cut
from rhino_jax.ir.pipeline.flow import LOOP, OP, Version, flow, version_bytes
from rhino_jax.ir.pipeline.labels import labels
from rhino_jax.rules import rule_of
from rhino_jax.search.stage_costs import SegmentCost, StageProblem
from rhino_jax.search.subject import Subject

SPLIT = "zero_bubble"
"""The schedule whose backward halves are cut in two."""


@dataclass(frozen=True)
class Divided:
    """A step divided in segments."""

    subject: Subject

    @property
    def regions(self) -> Regions:
        return self.subject.regions

    @property
    def segmentation(self) -> Segmentation:
        return self.subject.segmentation

    @property
    def count(self) -> int:
        return len(self.segmentation.segments)

    def chunks(
        self, assignment: Assignment, stages: Sequence[Sequence[int]], split: bool
    ) -> Chunks:
        """``assignment`` cut in chunks.

        Args:
            stages: the segments of every stage.
            split: whether backward halves are cut in two.
        """
        program, found = self.subject.program, self.segmentation
        stage_of = {segment: k for k, held in enumerate(stages) for segment in held}
        turning = [i for one in found.segments for i in (*one.forward, *one.backward)]
        return cut(
            flow(program, assignment, turning, rule_of),
            labels(
                program,
                self.regions,
                found,
                [stage_of[i] for i in range(self.count)],
            ),
            len(stages),
            tuple(zip(program.inputs, assignment.inputs, strict=True)),
            self.subject.pairs,
            split,
        )


def check_stages(divided: Divided, num_stages: int) -> None:
    """Raise :class:`InfeasibleError` where there are more stages than segments."""
    if num_stages <= divided.count:
        return
    name = divided.subject.program.name
    scans = sum(op.kind == "scan" for op in divided.subject.program.ops)
    more = (
        "; the layers in a scan are one segment: schedule='gpipe' or 'circular' cuts "
        "it in equal stages, or unroll the loop over layers"
        if scans
        else ""
    )
    raise InfeasibleError(
        f"{num_stages} pipeline stages, and {name} has {divided.count} segments to "
        f"divide among them{more}; ask for at most {divided.count} stages"
    )


def problem_of(
    divided: Divided,
    assignment: Assignment,
    mesh: Mesh,
    op_seconds: Mapping[int, float],
    schedule: str,
    num_workers: int,
    stages_per_worker: int,
    link: Link,
    memory_limit_bytes: int,
) -> StageProblem:
    """What every segment costs as a stage of its own, and what crosses between them.

    Args:
        mesh: of one worker; the bytes are those of one of its devices.
        op_seconds: of a whole step, by op.
        link: between neighbouring workers.
    """
    count, loop = divided.count, assignment.loop
    split = schedule == SPLIT
    chunks = divided.chunks(assignment, [(i,) for i in range(count)], split)
    inputs = tuple(zip(divided.subject.program.inputs, assignment.inputs, strict=True))
    wide, program = assignment.over(mesh), divided.subject.program
    microbatches = loop.trips if loop else 1

    def size(version: Version) -> int:
        return version_bytes(program, version, wide)

    seconds = {kind: [0.0] * count for kind in ("forward", "backward", "weights")}
    saved, held, cut_bytes = [0] * count, [0] * count, [0] * (count - 1)
    for version, home in zip(inputs, chunks.homes, strict=True):
        held[home] += size(version)
    for chunk in chunks.chunks:
        stage, side = chunk.key.stage, chunks.side(chunk.key)
        held[stage] += sum(size(chunks.left_by(leave)) for leave in chunk.totals)
        if side in seconds:
            units = (chunks.flow.units[n] for n in chunk.units)
            spent = sum(op_seconds.get(u.index, 0.0) for u in units if u.kind == OP)
            seconds[side][stage] += spent / microbatches
        if side == "backward":
            ahead = chunks.key_of("forward", stage)
            saved[stage] += sum(
                size(r.version) for r in chunk.reads if r.source == ahead
            )
    for (source, reader), phase, version in crossing(chunks, inputs):
        if phase == LOOP and reader == source + 1:
            cut_bytes[source] += size(version)
    backward = map(sum, zip(seconds["backward"], seconds["weights"], strict=True))
    costs = zip(
        seconds["forward"], backward, seconds["weights"], saved, held, strict=True
    )
    return StageProblem(
        tuple(SegmentCost(*one) for one in costs),
        tuple(cut_bytes),
        num_workers,
        microbatches,
        schedule,
        stages_per_worker,
        link.latency_seconds,
        1 / link.bytes_per_second,
        memory_limit_bytes,
    )


def runs(starts: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """The segments of every stage, from the first of each.

    >>> runs((0, 2), 5)
    ((0, 1), (2, 3, 4))
    """
    return tuple(tuple(range(a, b)) for a, b in pairwise((*starts, count)))
