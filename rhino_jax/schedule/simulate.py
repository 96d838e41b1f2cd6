"""When everything happens: a schedule, durations, and what the links carry.

Workers run their lists in order, each task as soon as all that it waits for is there.
Sending is asynchronous: the sender goes on at once, the link is busy, the reader waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from rhino_jax.errors import OptionsError, problems
from rhino_jax.schedule.memory import alive
from rhino_jax.schedule.tasks import Edge, Needs, Schedule, Task, chain


@dataclass(frozen=True)
class Span:
    """A task while it runs."""

    task: Task
    worker: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Transfer:
    """What one task made, on its way to the worker whose task reads it."""

    source: Task
    reader: Task
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Outside:
    """What a worker runs, or sends to ``target``, that is no task of the schedule."""

    what: str
    worker: int
    start_seconds: float
    end_seconds: float
    target: int | None = None


@dataclass(frozen=True)
class Timeline:
    """What ran when: simulated here, or recorded from a run.

    Attributes:
        schedule: what was run.
        spans: every task, in order of their ends.
        transfers: everything sent between workers, in the order it was sent.
        outside: what is done before and behind the loop; a simulation has none.
    """

    schedule: Schedule
    spans: tuple[Span, ...]
    transfers: tuple[Transfer, ...] = ()
    outside: tuple[Outside, ...] = ()

    @property
    def runs(self) -> Iterator[Span | Outside]:
        """Everything that workers run."""
        yield from self.spans
        yield from (one for one in self.outside if one.target is None)

    @property
    def makespan_seconds(self) -> float:
        """From 0 to the end of the last task."""
        return max((run.end_seconds for run in self.runs), default=0)

    def of_worker(self, worker: int) -> list[Span]:
        """The tasks of one worker, as it ran them."""
        return [span for span in self.spans if span.worker == worker]

    def busy_seconds(self) -> tuple[float, ...]:
        """Worker -> how long it works."""
        busy: list[float] = [0] * self.schedule.num_workers
        for run in self.runs:
            busy[run.worker] += run.end_seconds - run.start_seconds
        return tuple(busy)

    def bubbles(self) -> tuple[float, ...]:
        """Worker -> the share of the makespan in which it waits, 0 to 1."""
        total = self.makespan_seconds
        return tuple(1 - busy / total if total else 0.0 for busy in self.busy_seconds())

    def held(
        self, worker: int, saved_bytes: Sequence[int] | None = None
    ) -> list[tuple[float, int]]:
        """What a worker keeps for its backward tasks, from each moment on.

        Args:
            worker: which.
            saved_bytes: stage -> what it saves for one microbatch; None counts pairs
                of stage and microbatch.
        """
        spans = self.of_worker(worker)
        levels = alive([span.task for span in spans], saved_bytes)
        # Saved values stand from the start of a task; they go with its end.
        steps, before = [(0.0, 0)], 0
        for span, level in zip(spans, levels, strict=True):
            if level != before:
                grows = level > before
                steps.append((span.start_seconds if grows else span.end_seconds, level))
            before = level
        return steps


def simulate(
    schedule: Schedule,
    seconds: Mapping[str, Sequence[float]],
    *,
    edges: Sequence[Edge] | None = None,
    transfer_seconds: Mapping[Edge, float] | None = None,
    links: Mapping[Edge, Hashable] | None = None,
) -> Timeline:
    """Run ``schedule`` on a clock.

    Whole numbers give whole numbers: the clock only adds and compares.

    Args:
        schedule: one that :func:`rhino_jax.schedule.validate.validate` finds sound.
        seconds: kind of task -> stage -> how long it takes.
        edges: which stage reads which; None is a chain.
        transfer_seconds: (stage, stage) -> how long it takes to send what the first
            made of one microbatch to the second; what is not there takes no time.
            Cotangents go against the edge: those of edge (0, 1) are found at (1, 0).
            Stages of one worker send nothing.
        links: (worker, worker) -> the link that is taken from the first to the second.
            A link carries one thing at a time, first come, first served; pairs that
            are not named have one of their own for each direction.

    Raises:
        OptionsError: a kind of task without durations, a schedule that gets stuck.

    >>> from rhino_jax.schedule import make_schedule
    >>> seconds = {"forward": [1, 1], "backward": [2, 2]}
    >>> simulate(make_schedule("1f1b", 2, 4), seconds).makespan_seconds
    15
    """
    _check_durations(schedule, seconds)
    run = _Run(schedule, edges, transfer_seconds or {}, links or {})
    spans = tuple(run.spans(seconds))
    if len(spans) < sum(map(len, schedule.lists)):
        waiting = [f"worker {w} before {task}" for w, task in run.waiting()]
        raise OptionsError(problems(f"{schedule.name} gets stuck:", waiting))
    return Timeline(schedule, spans, tuple(run.transfers))


def _check_durations(
    schedule: Schedule, seconds: Mapping[str, Sequence[float]]
) -> None:
    kinds = sorted({task.kind for task in schedule.tasks})
    given = {kind: len(seconds.get(kind, ())) for kind in kinds}
    found = [
        f"{kind}: {count} durations for {schedule.num_stages} stages"
        for kind, count in given.items()
        if count != schedule.num_stages
    ]
    if found:
        raise OptionsError(problems(f"durations do not fit {schedule.name}:", found))


class _Run:
    """The state of a simulation. Tasks are numbered: they are looked up often."""

    def __init__(
        self,
        schedule: Schedule,
        edges: Sequence[Edge] | None,
        transfer_seconds: Mapping[Edge, float],
        links: Mapping[Edge, Hashable],
    ) -> None:
        self.schedule = schedule
        self.transfer_seconds = transfer_seconds
        self.links = links
        self.link_free: dict[Hashable, float] = {}
        self.transfers: list[Transfer] = []
        self.tasks = list(schedule.tasks)
        self.missing = [0] * len(self.tasks)
        self.readers: list[list[int]] = [[] for _ in self.tasks]
        self.ready: list[float] = [0] * len(self.tasks)
        self._link_up(chain(schedule.num_stages) if edges is None else edges)
        ends = list(accumulate(map(len, schedule.lists), initial=0))
        self.place, self.end = ends[:-1], ends[1:]
        self.free: list[float] = [0] * schedule.num_workers

    def _link_up(self, edges: Sequence[Edge]) -> None:
        number = {task: i for i, task in enumerate(self.tasks)}
        needs = Needs(self.tasks, edges)
        for i, task in enumerate(self.tasks):
            for needed in needs.of(task):
                self.missing[i] += 1
                if needed in number:
                    self.readers[number[needed]].append(i)

    def waiting(self) -> Iterator[tuple[int, Task]]:
        """The workers that are not done, and the task that each can not start."""
        for worker, place in enumerate(self.place):
            if place < self.end[worker]:
                yield worker, self.tasks[place]

    def spans(self, seconds: Mapping[str, Sequence[float]]) -> Iterator[Span]:
        """Every task as it ends, in order of time; fewer than all if stuck."""
        # (end, in order of starts): equal ends fall the same way on every run.
        running: list[tuple[float, int, Span]] = []
        started = 0
        idle = [True] * self.schedule.num_workers
        look_at = list(range(self.schedule.num_workers))
        while True:
            for worker in look_at:
                place = self.place[worker]
                done = place == self.end[worker]
                if not idle[worker] or done or self.missing[place]:
                    continue
                task = self.tasks[place]
                start = max(self.free[worker], self.ready[place])
                end = start + seconds[task.kind][task.stage]
                heapq.heappush(running, (end, started, Span(task, worker, start, end)))
                started += 1
                idle[worker] = False
            if not running:
                return
            end, _, span = heapq.heappop(running)
            yield span
            worker = span.worker
            look_at = [worker, *self._told(span, self.place[worker])]
            self.free[worker] = end
            self.place[worker] += 1
            idle[worker] = True

    def _told(self, span: Span, place: int) -> list[int]:
        """Send a result to all who read it; their workers."""
        told = []
        for reader in self.readers[place]:
            worker = self.schedule.worker_of[self.tasks[reader].stage]
            there = span.end_seconds
            if worker != span.worker:
                there = self._send(span, self.tasks[reader], worker)
            self.ready[reader] = max(self.ready[reader], there)
            self.missing[reader] -= 1
            told.append(worker)
        return told

    def _send(self, span: Span, reader: Task, worker: int) -> float:
        """When a result is there."""
        edge = span.task.stage, reader.stage
        pair = span.worker, worker
        link = self.links.get(pair, pair)
        start = max(span.end_seconds, self.link_free.get(link, 0))
        end = start + self.transfer_seconds.get(edge, 0)
        self.link_free[link] = end
        self.transfers.append(Transfer(span.task, reader, start, end))
        return end
