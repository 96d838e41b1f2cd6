"""The tasks of one step, in an order in which one controller can hand them out.

Plain data. What a task takes and gives are *slots*: places for one array on one worker.
A worker's own list is those tasks of the order that are its own; what it waits for is
in the slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rhino_jax.ir.pipeline.chunks import Key
from rhino_jax.ir.pipeline.flow import Version

Slots = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """A place for one version on one worker; ``num_bytes`` of it on each device.

    ``microbatch`` is None for what is there once a step.
    """

    worker: int
    version: Version
    num_bytes: int
    microbatch: int | None = None
    total: bool = False


@dataclass(frozen=True)
class Run:
    """Run a chunk (or make its empty totals, ``start``) on its stage.

    ``takes`` are its arguments in order: a slot, or the slots of one argument that is
    a list. Of ``donates`` the buffers are given to what comes out.
    """

    worker: int
    key: Key
    name: str
    takes: tuple[int | Slots, ...]
    gives: Slots
    microbatch: int | None = None
    start: bool = False
    donates: Slots = ()

    def __str__(self) -> str:
        part = "" if self.microbatch is None else f", microbatch {self.microbatch}"
        what = "the empty totals of " if self.start else ""
        return f"{what}{self.name} on worker {self.worker}{part}"


@dataclass(frozen=True)
class Send:
    """Copy arrays from one worker to another, device by device, as they lie."""

    worker: int
    target: int
    takes: Slots
    gives: Slots
    microbatch: int | None = None

    def __str__(self) -> str:
        part = "" if self.microbatch is None else f", microbatch {self.microbatch}"
        return f"what worker {self.worker} sends to worker {self.target}{part}"


@dataclass(frozen=True)
class Free:
    """Let go of what nobody reads any more."""

    worker: int
    takes: Slots
    gives: Slots = ()


Task = Run | Send | Free


@dataclass(frozen=True)
class TaskGraph:
    """All tasks of a step; ``inputs`` and ``outputs`` are the slots of its leaves."""

    num_workers: int
    slots: tuple[Slot, ...]
    inputs: Slots
    outputs: Slots
    tasks: tuple[Task, ...] = field(repr=False)

    @cached_property
    def lists(self) -> tuple[tuple[Task, ...], ...]:
        """Every worker's own tasks, in order."""
        return tuple(
            tuple(task for task in self.tasks if task.worker == worker)
            for worker in range(self.num_workers)
        )

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """The most bytes that each worker holds in slots, on each of its devices."""
        held = [0] * self.num_workers
        there = set(self.inputs)
        for slot in there:
            held[self.slots[slot].worker] += self.slots[slot].num_bytes
        most = list(held)
        for task in self.tasks:
            for slot in task.gives:
                if slot not in there:
                    there.add(slot)
                    held[self.slots[slot].worker] += self.slots[slot].num_bytes
            most = [max(a, b) for a, b in zip(most, held, strict=True)]
            gone = task.donates if isinstance(task, Run) else ()
            for slot in task.takes if isinstance(task, Free) else gone:
                there.discard(slot)
                held[self.slots[slot].worker] -= self.slots[slot].num_bytes
        return tuple(most)


def flat(takes: Sequence[int | Slots]) -> Iterator[int]:
    """The slots of a task's arguments.

    >>> list(flat((1, (2, 3))))
    [1, 2, 3]
    """
    for one in takes:
        if isinstance(one, int):
            yield one
        else:
            yield from one


def problems_of(graph: TaskGraph) -> list[str]:
    """Everything that keeps ``graph`` from running, and what it would never let go."""
    found = []
    held = set(graph.inputs)
    for number, task in enumerate(graph.tasks):
        for slot in flat(task.takes):
            if slot not in held:
                found.append(f"task {number} ({task}) takes slot {slot}: not there")
            elif graph.slots[slot].worker != task.worker:
                found.append(f"task {number} ({task}) takes slot {slot}: not its own")
        where = task.target if isinstance(task, Send) else task.worker
        for slot in task.gives:
            if slot in held and not graph.slots[slot].total:
                found.append(f"task {number} ({task}) gives slot {slot} again")
            if graph.slots[slot].worker != where:
                found.append(f"task {number} ({task}) gives slot {slot} elsewhere")
        held.update(task.gives)
        if isinstance(task, Free):
            held.difference_update(task.takes)
        elif isinstance(task, Run):
            held.difference_update(set(task.donates).difference(task.gives))
    kept = held.difference(graph.outputs)
    found += [f"slot {slot} is never let go" for slot in sorted(kept)]
    found += [f"output {slot} is not there" for slot in set(graph.outputs) - held]
    return found
