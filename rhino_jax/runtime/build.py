"""From chunks and a schedule to tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.ir.pipeline.chunks import Chunks, Key, Read
from rhino_jax.ir.pipeline.flow import LAST, LOOP, ROWS, TOTAL, Version
from rhino_jax.runtime.tasks import (
    Free,
    Run,
    Send,
    Slot,
    Slots,
    Task,
    TaskGraph,
    flat,
    problems_of,
)
from rhino_jax.schedule import Schedule

BytesOf = Callable[[Version], int]

Name = tuple[Key | None, Version, int | None]
"""Who gives a version (None: it is an input), and for which microbatch."""
Call = tuple[Key, int | None]


def task_graph(
    chunks: Chunks,
    schedule: Schedule,
    inputs: Sequence[Version],
    trips: int | None,
    num_bytes: BytesOf,
    donated: Mapping[int, int],
) -> TaskGraph:
    """The tasks of one step.

    Args:
        inputs: the step's inputs, each as it lies.
        trips: microbatches of the accumulation loop; None where there is no loop.
        num_bytes: of a version's part on one device.
        donated: positions of inputs whose buffers may be taken, and of the outputs
            that may take them.
    """
    work = _Building(chunks, schedule, trips, num_bytes)
    graph = work.run(inputs)
    graph = _donating(graph, donated)
    graph = _freeing(graph)
    wrong = problems_of(graph)
    assert not wrong, "\n".join(wrong[:8])
    return graph


@dataclass
class _Building:
    chunks: Chunks
    schedule: Schedule
    trips: int | None
    num_bytes: BytesOf
    slots: list[Slot] = field(default_factory=list)
    numbers: dict[tuple[Name, int], int] = field(default_factory=dict)
    """(what, worker) -> slot."""
    totals: dict[tuple[Key, int], int] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    started: set[Key] = field(default_factory=set)

    def run(self, inputs: Sequence[Version]) -> TaskGraph:
        num_workers = len(self.schedule.lists)
        self.readers = self._readers()
        places = tuple(
            self._slot((None, version, None), self.worker(stage))
            for version, stage in zip(inputs, self.chunks.homes, strict=True)
        )
        for version, stage in zip(inputs, self.chunks.homes, strict=True):
            self._sent(None, None, [version], self.worker(stage))
        lists = [list(self._calls(worker)) for worker in range(num_workers)]
        at = [0] * num_workers
        while any(n < len(calls) for n, calls in zip(at, lists, strict=True)):
            before = list(at)
            for worker, calls in enumerate(lists):
                if at[worker] < len(calls) and self._ready(calls[at[worker]]):
                    self._call(calls[at[worker]])
                    at[worker] += 1
            assert at != before, (
                f"schedule {self.schedule.name} waits for itself at "
                f"{[c[n : n + 1] for n, c in zip(at, lists, strict=True)]}"
            )
        outputs = tuple(self._output(inputs, read) for read in self.chunks.outputs)
        return TaskGraph(
            num_workers, tuple(self.slots), places, outputs, tuple(self.tasks)
        )

    def worker(self, stage: int) -> int:
        return self.schedule.worker_of[stage]

    def _output(self, inputs: Sequence[Version], read: Read) -> int:
        if read.source is None:
            home = self.chunks.homes[list(inputs).index(read.version)]
            return self.numbers[(None, read.version, None), self.worker(home)]
        name = (read.source, read.version, self._turn(read.source, None))
        return self.numbers[name, self.worker(read.source.stage)]

    def _calls(self, worker: int) -> Iterator[Call]:
        """A worker's chunks, in its order: before the loop, by schedule, behind it."""
        own = [c.key for c in self.chunks.chunks if self.worker(c.key.stage) == worker]
        yield from ((key, None) for key in own if key.phase < LOOP)
        for task in self.schedule.lists[worker]:
            key = self.chunks.key_of(task.kind, task.stage)
            if key in self.chunks.by_key:
                yield key, None if self.trips is None else task.microbatch
        yield from ((key, None) for key in own if key.phase > LOOP)

    def _turn(self, source: Key | None, microbatch: int | None) -> int | None:
        """For which microbatch a chunk's reader takes what ``source`` gives."""
        inside = source is not None and source.phase == LOOP
        if not inside or self.trips is None:
            return None
        return self.trips - 1 if microbatch is None else microbatch

    def _names(self, key: Key, microbatch: int | None) -> Iterator[Name | list[Name]]:
        """What a call takes from elsewhere, its totals left out."""
        chunk = self.chunks.by_key[key]
        for read in chunk.reads:
            yield read.source, read.version, self._turn(read.source, microbatch)
        for one in chunk.leaves:
            source, version = one.read.source, one.read.version
            if one.how == ROWS:
                assert self.trips is not None
                yield [(source, version, turn) for turn in range(self.trips)]
            elif one.how == LAST:
                yield source, version, self._turn(source, None)

    def _ready(self, call: Call) -> bool:
        key, microbatch = call
        worker = self.worker(key.stage)
        names = [
            name
            for one in self._names(key, microbatch)
            for name in (one if isinstance(one, list) else [one])
        ]
        return all((name, worker) in self.numbers for name in names)

    def _call(self, call: Call) -> None:
        key, microbatch = call
        chunk, worker = self.chunks.by_key[key], self.worker(key.stage)
        totals = tuple(self._total(key, leave) for leave in chunk.totals)
        if totals and key not in self.started:
            self.started.add(key)
            name = self.chunks.name(key)
            self.tasks.append(Run(worker, key, name, (), totals, start=True))
        named = [
            tuple(self.numbers[name, worker] for name in one)
            if isinstance(one, list)
            else self.numbers[one, worker]
            for one in self._names(key, microbatch)
        ]
        takes: list[int | Slots] = named[: len(chunk.reads)]
        rest = iter(named[len(chunk.reads) :])
        for one in chunk.leaves:
            if one.how == TOTAL:
                assert one.read.source is not None
                takes.append(self._total(one.read.source, one.index))
            else:
                takes.append(next(rest))
        turn = microbatch if key.phase == LOOP else None
        gives = tuple(self._slot((key, v, turn), worker) for v in chunk.gives)
        self.tasks.append(
            Run(
                worker,
                key,
                self.chunks.name(key),
                (*takes, *totals),
                (*gives, *totals),
                turn,
                donates=totals,
            )
        )
        self._sent(key, turn, chunk.gives, worker)

    def _total(self, key: Key, leave: int) -> int:
        if (key, leave) not in self.totals:
            chunk = self.chunks.by_key[key]
            self.totals[key, leave] = len(self.slots)
            version = self.chunks.left_by(leave)
            assert leave in chunk.totals
            self.slots.append(
                Slot(
                    self.worker(key.stage),
                    version,
                    self.num_bytes(version),
                    total=True,
                )
            )
        return self.totals[key, leave]

    def _slot(self, name: Name, worker: int) -> int:
        _, version, microbatch = name
        number = self.numbers.setdefault((name, worker), len(self.slots))
        if number == len(self.slots):
            size = self.num_bytes(version)
            self.slots.append(Slot(worker, version, size, microbatch))
        return number

    def _readers(self) -> Mapping[tuple[Key | None, Version], Collection[int]]:
        """Who gives a version -> the workers that read it."""
        found: dict[tuple[Key | None, Version], set[int]] = {}
        for chunk in self.chunks.chunks:
            left = (one.read for one in chunk.leaves if one.how != TOTAL)
            for read in (*chunk.reads, *left):
                worker = self.worker(chunk.key.stage)
                found.setdefault((read.source, read.version), set()).add(worker)
        return found

    def _sent(
        self,
        source: Key | None,
        turn: int | None,
        versions: Sequence[Version],
        worker: int,
    ) -> None:
        """Send what was just made to the other workers that read it."""
        by_target: dict[int, list[Version]] = {}
        for version in versions:
            for target in self.readers.get((source, version), ()):
                if target != worker:
                    by_target.setdefault(target, []).append(version)
        for target, sent in sorted(by_target.items()):
            takes = tuple(self.numbers[(source, v, turn), worker] for v in sent)
            gives = tuple(self._slot((source, v, turn), target) for v in sent)
            self.tasks.append(Send(worker, target, takes, gives, turn))


def _last_uses(graph: TaskGraph) -> dict[int, int]:
    """Slot -> the last task that takes it, or gives it where nobody does."""
    return {
        slot: number
        for number, task in enumerate(graph.tasks)
        for slot in (*task.gives, *flat(task.takes))
    }


def _donating(graph: TaskGraph, donated: Mapping[int, int]) -> TaskGraph:
    """Inputs given to the task that makes their successor, if it reads them last."""
    last = _last_uses(graph)
    tasks = list(graph.tasks)
    for position, output in donated.items():
        slot = graph.inputs[position]
        number = last.get(slot, -1)
        task = tasks[number] if number >= 0 else None
        if (
            isinstance(task, Run)
            and graph.outputs[output] in task.gives
            and slot not in graph.outputs
        ):
            tasks[number] = replace(task, donates=(*task.donates, slot))
    return replace(graph, tasks=tuple(tasks))


def _freeing(graph: TaskGraph) -> TaskGraph:
    """What nobody takes any more is let go right then."""
    ends: dict[int, list[int]] = {}
    kept = set(graph.outputs)
    last = _last_uses(graph)
    for slot, number in last.items():
        task = graph.tasks[number]
        gone = task.donates if isinstance(task, Run) else ()
        if slot not in kept and (slot not in gone or slot in task.gives):
            ends.setdefault(number, []).append(slot)
    never = {s for s in graph.inputs if s not in last and s not in kept}
    tasks: list[Task] = [Free(graph.slots[s].worker, (s,)) for s in sorted(never)]
    for number, task in enumerate(graph.tasks):
        tasks.append(task)
        by_worker: dict[int, list[int]] = {}
        for slot in ends.get(number, ()):
            by_worker.setdefault(graph.slots[slot].worker, []).append(slot)
        tasks += [Free(w, tuple(slots)) for w, slots in sorted(by_worker.items())]
    return replace(graph, tasks=tuple(tasks))
