"""Which stage runs which segments, and the chunks that a plan is cut in.

Segments stand in an order that data flows in, so any division into runs of neighbours
is a pipeline. By default the dearest stage is made as cheap as can be, by the predicted
seconds of the segments' forward and backward halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from rhino_jax.errors import InfeasibleError
from rhino_jax.ir.analysis.cuts import cuts
from rhino_jax.ir.analysis.regions import Regions, regions
from rhino_jax.ir.analysis.segments import Segmentation, segments
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.pipeline.chunks import Chunks, cut
from rhino_jax.ir.pipeline.flow import flow
from rhino_jax.ir.pipeline.labels import labels
from rhino_jax.rules import HEAVY, rule_of
from rhino_jax.search.subject import Subject


@dataclass(frozen=True)
class Divided:
    """A step divided in segments."""

    subject: Subject

    @cached_property
    def regions(self) -> Regions:
        one = self.subject
        return regions(one.program, one.pairs, one.batch_inputs)

    @cached_property
    def segmentation(self) -> Segmentation:
        program, pairs = self.subject.program, self.subject.pairs
        places = cuts(program, self.regions, pairs, HEAVY)
        return segments(program, self.regions, places, pairs, HEAVY)

    @property
    def count(self) -> int:
        return len(self.segmentation.segments)

    def seconds(self, op_seconds: Mapping[int, float]) -> tuple[float, ...]:
        """Of the forward and backward half of every segment."""
        return tuple(
            sum(op_seconds.get(i, 0.0) for i in (*one.forward, *one.backward))
            for one in self.segmentation.segments
        )

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
        "; the layers in a scan are one segment: unroll the loop over layers to cut it"
        if scans
        else ""
    )
    raise InfeasibleError(
        f"{num_stages} pipeline stages, and {name} has {divided.count} segments to "
        f"divide among them{more}; ask for at most {divided.count} stages"
    )


def balanced(seconds: Sequence[float], num_stages: int) -> tuple[tuple[int, ...], ...]:
    """Segments in runs, one a stage, so that the dearest run is as cheap as can be.

    Exact, by dynamic programming; of equal divisions the one whose last run starts
    first. At least as many segments as stages.

    >>> balanced((1.0, 1.0, 1.0, 3.0), 2)
    ((0, 1, 2), (3,))
    """
    count = len(seconds)
    assert 1 <= num_stages <= count, (num_stages, count)
    sums = [0.0]
    for one in seconds:
        sums.append(sums[-1] + one)
    # best[n]: (the dearest of the runs that end at n, where the last one starts)
    best: list[tuple[float, int]] = [(total, 0) for total in sums]
    starts = []
    for stage in range(2, num_stages + 1):
        best = [
            min(
                (
                    (max(best[at][0], sums[end] - sums[at]), at)
                    for at in range(stage - 1, end)
                ),
                default=(float("inf"), 0),
            )
            for end in range(count + 1)
        ]
        starts.append([at for _, at in best])
    ends = [count]
    for found in reversed(starts):
        ends.append(found[ends[-1]])
    edges = [0, *reversed(ends)]
    return tuple(tuple(range(a, b)) for a, b in pairwise(edges))
