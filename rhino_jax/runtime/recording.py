"""What a controller's workers really did: when each ran what, and what was sent.

A controller waits for nothing, so threads do, one for what each worker runs and one for
what it sends to each other: they note when what a task made is there. When a task began
is not to be seen. Devices run what they are handed in order, so it is when the task had
been handed out, the one before it had ended, and what it takes was there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeGuard

import jax

from rhino_jax.ir.pipeline.chunks import Chunks
from rhino_jax.ir.pipeline.flow import LOOP
from rhino_jax.runtime.tasks import Run, Send, Task, TaskGraph, flat
from rhino_jax.schedule import Schedule
from rhino_jax.schedule.simulate import Outside, Span, Timeline, Transfer
from rhino_jax.schedule.tasks import Task as Scheduled

Row = tuple[int, int | None]
"""A worker, and the worker that it sends to; None is what it runs."""


@dataclass(frozen=True)
class Seen:
    """A task: when it began to be handed out, and when what it made was seen."""

    task: Run | Send
    handed_seconds: float
    seen_seconds: float


@dataclass(frozen=True)
class Took:
    """A task, from when to when."""

    task: Run | Send
    start_seconds: float
    end_seconds: float


class Recorder:
    """Watches a controller through one step; then :meth:`seen` tells of it.

    Nothing of the step is changed. What it makes stays alive until it is seen to be
    there. Where all that a task makes is given away (its totals), a copy of the
    smallest is waited for, which is one more thing that the worker's devices do.

    Args:
        graph: what the controller carries out.
        here: worker -> whether this process has a device of it. What comes from another
            process can be seen where it arrives alone.
    """

    def __init__(self, graph: TaskGraph, here: Sequence[bool]) -> None:
        self._here = here
        self._count = sum(map(self._is_seen, graph.tasks))
        self._given_away = {
            slot
            for task in graph.tasks
            if isinstance(task, Run)
            for slot in task.donates
        }
        self._log: list[tuple[Run | Send, float, Future[float]]] = []
        self._threads: dict[Row, ThreadPoolExecutor] = defaultdict(
            lambda: ThreadPoolExecutor(1)
        )
        self._free_seconds = 0.0

    def began(self) -> None:
        """A step begins; what was seen of one before (it failed) is forgotten."""
        self._log.clear()
        self._free_seconds = time.perf_counter()

    def handed(self, task: Task, made: Sequence[jax.Array]) -> None:
        """A task was handed out, and will make these arrays."""
        if self._is_seen(task):
            pairs = zip(task.gives, made, strict=True)
            kept = [x for slot, x in pairs if slot not in self._given_away]
            if made and not kept:
                kept = _copied(min(made, key=lambda x: x.nbytes))
            ended = self._threads[row_of(task)].submit(_when_there, kept)
            self._log.append((task, self._free_seconds, ended))
        self._free_seconds = time.perf_counter()

    def _is_seen(self, task: Task) -> TypeGuard[Run | Send]:
        """Empty totals belong to what adds to them first: that waits for them."""
        if isinstance(task, Send):
            return self._here[task.target]
        return isinstance(task, Run) and not task.start and self._here[task.worker]

    @property
    def complete(self) -> bool:
        """Whether a whole step was watched."""
        return len(self._log) == self._count

    def seen(self) -> list[Seen]:
        """Every task of the step, once all is done.

        Raises:
            Exception: what a device raised, as whoever waits for the step would see it.
        """
        return [Seen(task, handed, ended.result()) for task, handed, ended in self._log]

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads.values():
            thread.shutdown()


def _copied(x: jax.Array) -> list[jax.Array]:
    """Buffers of its own, of which no program takes or compiles any."""
    parts = (shard.data for shard in x.addressable_shards)
    return [jax.device_put(part, part.sharding, may_alias=False) for part in parts]


def _when_there(arrays: Sequence[jax.Array]) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()


def row_of(task: Run | Send) -> Row:
    """The row whose tasks follow one another."""
    return task.worker, task.target if isinstance(task, Send) else None


def timed(seen: Sequence[Seen]) -> list[Took]:
    """When tasks began and ended, given in an order in which they were handed out.

    A task waits for the one before it in its row and for those that make what it takes.
    These have ended by when it was seen to have ended, though a thread that was busy
    saw them later. The first starts at 0.

    >>> from rhino_jax.ir.pipeline.chunks import Key
    >>> one = Run(0, Key(LOOP, 0, 0), "one", (), (5,))
    >>> two = Run(0, Key(LOOP, 1, 0), "two", (5,), (6,))
    >>> for took in timed([Seen(one, 1.0, 4.0), Seen(two, 2.0, 3.5)]):
    ...     print(took.task.name, took.start_seconds, took.end_seconds)
    one 0.0 2.5
    two 2.5 2.5
    """
    waits: list[set[int]] = []
    makers: dict[int, int] = {}
    last: dict[Row, int] = {}
    for number, one in enumerate(seen):
        row = row_of(one.task)
        found = {makers[slot] for slot in flat(one.task.takes) if slot in makers}
        waits.append(found | ({last[row]} if row in last else set()))
        makers |= dict.fromkeys(one.task.gives, number)
        last[row] = number
    ends = [one.seen_seconds for one in seen]
    for number in reversed(range(len(seen))):
        for other in waits[number]:
            ends[other] = min(ends[other], ends[number])
    starts = [
        max([one.handed_seconds, *(ends[other] for other in others)])
        for one, others in zip(seen, waits, strict=True)
    ]
    origin = min(starts, default=0.0)
    return [
        Took(one.task, start - origin, end - origin)
        for one, start, end in zip(seen, starts, ends, strict=True)
    ]


def timeline_of(took: Sequence[Took], schedule: Schedule, chunks: Chunks) -> Timeline:
    """Timed tasks as a timeline of the schedule that they carried out.

    A transfer goes to the first task that reads any of it. What the schedule does not
    name (before and behind the loop, and what is sent from or to these) is told by what
    it is for.
    """
    runs = {n: one.task for n, one in enumerate(took) if isinstance(one.task, Run)}
    named = {n: _scheduled(run, chunks) for n, run in runs.items()}
    readers = {s: n for n in reversed(runs) for s in flat(runs[n].takes)}
    makers: dict[int, int] = {}
    spans, transfers, outside = [], [], []
    for number, one in enumerate(took):
        task, times = one.task, (one.start_seconds, one.end_seconds)
        if isinstance(task, Run):
            makers |= dict.fromkeys(task.gives, number)
            if (own := named[number]) is not None:
                spans.append(Span(own, task.worker, *times))
            else:
                outside.append(Outside(task.name, task.worker, *times))
            continue
        first = min(
            (readers[slot] for slot in task.gives if slot in readers), default=-1
        )
        source, reader = named.get(makers.get(task.takes[0], -1)), named.get(first)
        if source is not None and reader is not None:
            transfers.append(Transfer(source, reader, *times))
        else:  # of what leaves the loop only the last microbatch's is read
            what = str(reader or runs[first].name) if first in runs else "nobody"
            beside = Outside(f"for {what}", task.worker, *times, task.target)
            outside.append(beside)
    spans.sort(key=lambda span: span.end_seconds)
    return Timeline(schedule, tuple(spans), tuple(transfers), tuple(outside))


def _scheduled(run: Run, chunks: Chunks) -> Scheduled | None:
    """The task of the schedule that ``run`` is; None for what is beside it."""
    if run.key.phase != LOOP:
        return None
    return Scheduled(chunks.kind_of(run.key), run.key.stage, run.microbatch or 0)
