"""Tasks, and the lists in which workers run them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FORWARD = "forward"
BACKWARD = "backward"
BACKWARD_INPUT = "backward_input"
BACKWARD_WEIGHT = "backward_weight"
KINDS = (FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)

Edge = tuple[int, int]
"""The stage whose result is read, and the stage that reads it."""


@dataclass(frozen=True, order=True)
class Task:
    """One stage's work on one microbatch.

    Attributes:
        kind: "forward"; "backward", or its two halves where it is split:
            "backward_input" (the cotangent of what entered the stage) and
            "backward_weight" (the gradients of its parameters).
        stage: counted in the order in which data flows.
        microbatch: counted from 0.

    >>> print(Task("backward_input", 2, 7))
    backward_input of stage 2, microbatch 7
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage}, microbatch {self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """What every worker runs, in order.

    Attributes:
        name: of the kind of schedule ("1f1b").
        num_microbatches: how many a step has.
        worker_of: stage -> the worker that runs it.
        lists: worker -> its tasks, in the order in which it runs them.
    """

    name: str
    num_microbatches: int
    worker_of: tuple[int, ...]
    lists: tuple[tuple[Task, ...], ...]

    @property
    def num_stages(self) -> int:
        """How many stages there are; several may be one worker's."""
        return len(self.worker_of)

    @property
    def num_workers(self) -> int:
        """How many workers there are."""
        return len(self.lists)

    @property
    def tasks(self) -> Iterator[Task]:
        """All tasks, worker by worker."""
        return (task for tasks in self.lists for task in tasks)


def chain(num_stages: int) -> tuple[Edge, ...]:
    """The edges of stages that follow one another.

    >>> chain(3)
    ((0, 1), (1, 2))
    """
    return tuple((s, s + 1) for s in range(num_stages - 1))


class Needs:
    """What a task waits for: the rules of a pipeline, for stages of any shape.

    A forward task needs the forward tasks of the stages that it reads, of the same
    microbatch; a backward task (or its input half) its own forward task and the
    cotangents of all stages that read it; a weight half its input half.

    Args:
        tasks: those of a schedule; they tell which backward tasks are split.
        edges: which stage reads which.
    """

    def __init__(self, tasks: Iterable[Task], edges: Iterable[Edge]) -> None:
        self._split = {
            (task.stage, task.microbatch)
            for task in tasks
            if task.kind == BACKWARD_INPUT
        }
        self._reads: dict[int, list[int]] = {}
        self._readers: dict[int, list[int]] = {}
        for source, reader in sorted(set(edges)):
            self._reads.setdefault(reader, []).append(source)
            self._readers.setdefault(source, []).append(reader)

    def of(self, task: Task) -> list[Task]:
        """The tasks that must have ended before ``task`` starts."""
        stage, microbatch = task.stage, task.microbatch
        if task.kind == FORWARD:
            reads = self._reads.get(stage, ())
            return [Task(FORWARD, source, microbatch) for source in reads]
        if task.kind == BACKWARD_WEIGHT:
            return [Task(BACKWARD_INPUT, stage, microbatch)]
        readers = self._readers.get(stage, ())
        cotangents = [self.cotangent(reader, microbatch) for reader in readers]
        return [Task(FORWARD, stage, microbatch), *cotangents]

    def cotangent(self, stage: int, microbatch: int) -> Task:
        """The task that makes the cotangent of what entered ``stage``."""
        split = (stage, microbatch) in self._split
        return Task(BACKWARD_INPUT if split else BACKWARD, stage, microbatch)
