"""What every stage that a chain of segments can be cut into takes and needs.

The time of a pipeline is taken to be

    the sum of what each stage adds while it fills and drains
    + turns x the longest pace of a stage,

which is what it is where stages are equal (:mod:`rhino_jax.schedule.closed_forms`):
tables of what a stage adds, and of its pace, are all that is needed of a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rhino_jax.errors import OptionsError
from rhino_jax.schedule import Schedule, make_schedule
from rhino_jax.schedule.batch import Clock
from rhino_jax.schedule.closed_forms import makespan_seconds
from rhino_jax.schedule.memory import in_flight, in_flight_of_stages

Array = NDArray[np.int64]
Starts = tuple[int, ...]
"""The first segment of every stage."""

PICO = 10**12


@dataclass(frozen=True)
class SegmentCost:
    """One segment on one of the equal sub-meshes; bytes are those of one device.

    Attributes:
        forward_seconds, backward_seconds: for one microbatch.
        weight_seconds: the part of backward_seconds that makes gradients of
            parameters; only where a schedule splits backward tasks.
        saved_bytes: what forward leaves for backward, for one microbatch.
        held_bytes: parameters, optimizer state, gradients.
        peak_bytes: workspace while a task runs.
    """

    forward_seconds: float
    backward_seconds: float
    weight_seconds: float = 0.0
    saved_bytes: int = 0
    held_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class StageProblem:
    """What is cut, for what.

    Attributes:
        segments: in order.
        cut_bytes: what crosses from each segment but the last to the next, for one
            microbatch, forward; as much goes back.
        num_workers: equal sub-meshes.
        num_microbatches: of a step.
        schedule: a name of :data:`rhino_jax.schedule.SCHEDULES`.
        stages_per_worker: for looped schedules.
        link_alpha_seconds, link_seconds_per_byte: of a transfer between neighbours.
        memory_limit_bytes: of one device. What is on its way to a worker that is not
            ready for it is not counted.
    """

    segments: tuple[SegmentCost, ...]
    cut_bytes: tuple[int, ...]
    num_workers: int
    num_microbatches: int
    schedule: str = "1f1b"
    stages_per_worker: int = 1
    link_alpha_seconds: float = 0.0
    link_seconds_per_byte: float = 0.0
    memory_limit_bytes: int = 2**62

    def __post_init__(self) -> None:
        assert len(self.cut_bytes) == len(self.segments) - 1, "a cut between any two"


class Chain:
    """The numbers of all stages that a chain can be cut into.

    Stage (i, j) is made of segments i to j - 1; tables are indexed so. Times are whole
    picoseconds.
    """

    def __init__(self, problem: StageProblem) -> None:
        p, v = problem.num_workers, problem.stages_per_worker
        self.problem = problem
        self.schedule: Schedule = make_schedule(
            problem.schedule, p, problem.num_microbatches, v
        )
        if self.schedule.num_stages > len(problem.segments):
            raise OptionsError(
                f"{self.schedule.num_stages} stages ({p} workers, {v} each) need as "
                f"many segments or more; there are {len(problem.segments)}. Ask for "
                f"{len(problem.segments)} stages at most."
            )
        one = makespan_seconds(
            problem.schedule, p, problem.num_microbatches, v, forward=1, backward=0
        )
        self.turns = int(one) - p * v
        """How often the slowest stage sets the pace."""

    def _sums(self, name: str, scale: int = 1) -> Array:
        values = [round(getattr(s, name) * scale) for s in self.problem.segments]
        upto = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.asarray(upto[None, :] - upto[:, None], np.int64)

    @cached_property
    def forward(self) -> Array:
        return self._sums("forward_seconds", PICO)

    @cached_property
    def backward(self) -> Array:
        return self._sums("backward_seconds", PICO)

    @cached_property
    def weight(self) -> Array:
        return self._sums("weight_seconds", PICO)

    @cached_property
    def sent(self) -> Array:
        """j -> what it takes to send what crosses the cut before segment j."""
        problem = self.problem
        sent = np.zeros(len(problem.segments) + 1, np.int64)
        if problem.num_workers > 1:
            seconds = [
                problem.link_alpha_seconds + problem.link_seconds_per_byte * size
                for size in problem.cut_bytes
            ]
            sent[1:-1] = [round(s * PICO) for s in seconds]
        return sent

    @cached_property
    def fill(self) -> Array:
        """What a stage adds once, what it sends and gets back over its cut with it."""
        fill = self.forward + self.backward
        if self.problem.schedule == "zero_bubble":
            # Of all but the first stage, weight halves stand in others' gaps.
            inputs = self.backward - self.weight
            hidden = self.weight.copy()
            if self.problem.num_microbatches >= self.problem.num_workers:
                hidden += np.minimum(np.minimum(self.forward, inputs), self.weight)
            fill[1:] -= hidden[1:]
        return np.asarray(fill + 2 * self.sent, np.int64)

    @cached_property
    def pace(self) -> Array:
        """How long a stage is busy, or waits, with one microbatch once all are."""
        both, sent = self.forward + self.backward, self.sent[None, :]
        match self.problem.schedule:
            case "1f1b":
                # It is ahead by as many microbatches as there are stages on the way
                # there and back: what is sent on that way is waited for.
                return np.asarray(both + 2 * sent, np.int64)
            case "zero_bubble":
                inputs = both - self.weight
                if self.problem.num_microbatches < self.problem.num_workers:
                    return np.asarray(inputs + 2 * sent, np.int64)
                return np.maximum(both, inputs + 2 * sent)
            case "gpipe" | "circular":
                return np.maximum(self.forward, sent) + np.maximum(self.backward, sent)
        return np.maximum(both, sent)

    @cached_property
    def need_bytes(self) -> list[Array]:
        """Stage -> what it needs on a device if it is made of segments i to j - 1."""
        held, saved = self._sums("held_bytes"), self._sums("saved_bytes")
        size = len(held)
        peak = np.zeros((size, size), np.int64)
        values = np.array([s.peak_bytes for s in self.problem.segments], np.int64)
        for i in range(size - 1):
            peak[i, i + 1 :] = np.maximum.accumulate(values[i:])
        counts = in_flight_of_stages(self.schedule)
        tables = {count: held + count * saved + peak for count in set(counts)}
        return [tables[count] for count in counts]

    def stages(self, starts: Starts) -> list[tuple[int, int]]:
        """(i, j) of every stage."""
        return list(zip(starts, (*starts[1:], len(self.problem.segments)), strict=True))

    def estimate(self, starts: Starts) -> int:
        """The sum that is minimized, in picoseconds."""
        stages = self.stages(starts)
        pace = max(int(self.pace[stage]) for stage in stages)
        return sum(int(self.fill[stage]) for stage in stages) + self.turns * pace

    @cached_property
    def clock(self) -> Clock:
        """What the simulator says, for many cuts at once."""
        return Clock(self.schedule)

    def makespans(self, cuts: Sequence[Starts]) -> list[int]:
        """The simulated makespan of every cut, in picoseconds."""
        if not cuts:
            return []
        first = np.array(cuts).T
        end = np.full((1, len(cuts)), len(self.problem.segments))
        last = np.concatenate([first[1:], end])
        tables = {
            "forward": self.forward,
            "backward": self.backward,
            "backward_input": self.backward - self.weight,
            "backward_weight": self.weight,
        }
        sent = {
            edge: self.sent[last[k]]
            for k in range(len(first) - 1)
            for edge in ((k, k + 1), (k + 1, k))
        }
        ticks = {kind: table[first, last] for kind, table in tables.items()}
        return [int(t) for t in self.clock.makespans(ticks, sent)]

    def peak_bytes(self, starts: Starts) -> tuple[int, ...]:
        """Worker -> the most that a device of it keeps, all its stages together."""
        stages = [self.problem.segments[i:j] for i, j in self.stages(starts)]
        saved = [sum(s.saved_bytes for s in stage) for stage in stages]
        held = [sum(s.held_bytes for s in stage) for stage in stages]
        peak = [max(s.peak_bytes for s in stage) for stage in stages]
        most = in_flight(self.schedule, saved)
        p = self.problem.num_workers
        return tuple(
            sum(held[w::p]) + kept + max(peak[w::p]) for w, kept in enumerate(most)
        )
