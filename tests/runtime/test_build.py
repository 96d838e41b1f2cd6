"""Task graphs: sound for every schedule, and checked by another reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from rhino_jax.ir.layout import Layout
from rhino_jax.ir.pipeline.chunks import Chunks, cut
from rhino_jax.ir.pipeline.flow import (
    AFTER,
    GIVEN,
    LEAVE,
    LOOP,
    OP,
    TOTAL,
    Flow,
    Unit,
    Version,
)
from rhino_jax.ir.pipeline.labels import Label
from rhino_jax.runtime.build import task_graph
from rhino_jax.runtime.tasks import Free, Run, Send, TaskGraph, problems_of
from rhino_jax.schedule import SCHEDULES, make_schedule
from rhino_jax.schedule.generate import LOOPED

WHOLE, BYTES = Layout(()), 10


def version(number: int) -> Version:
    return number, WHOLE


def pipeline(stages: int, split: bool) -> tuple[Chunks, Mapping[int, int]]:
    """A chain forward and back, a gradient a stage, and an update of each parameter.

    Input 1000 is the batch, 1001 + s the parameter of stage s.
    """
    units: list[Unit] = []
    labels: list[Label] = []

    def add(made: int, reads: list[tuple[int, int]], label: Label) -> int:
        named = tuple((version(v), maker) for v, maker in reads)
        units.append(Unit(OP, len(labels), LOOP, named, (version(made),)))
        labels.append(label)
        return len(units) - 1

    ahead: list[int] = []
    for s in range(stages):
        source = (ahead[-1], ahead[-1]) if ahead else (1000, GIVEN)
        reads = [source, (1001 + s, GIVEN)]
        ahead.append(add(len(units), reads, Label(s)))
    gradients, behind = [], ahead[-1]
    for s in reversed(range(stages)):
        label = Label(s, backward=True)
        cotangent = (behind, behind)
        reads = [cotangent, (ahead[s], ahead[s])]
        gradients.append((s, add(len(units), reads, label)))
        behind = add(len(units), [cotangent, (1001 + s, GIVEN)], label)
    outputs = []
    for k, (s, made) in enumerate(gradients):
        sums = 2000 + s
        left = ((version(made), made),)
        units.append(Unit(LEAVE, k, AFTER, left, (version(sums),), TOTAL))
        reads = ((version(sums), len(units) - 1), (version(1001 + s), GIVEN))
        units.append(Unit(OP, len(labels), AFTER, reads, (version(3000 + s),)))
        labels.append(Label(s, backward=True))
        outputs.append((s, (version(3000 + s), len(units) - 1)))
    found = tuple(output for _, output in sorted(outputs))
    inputs = [version(1000 + k) for k in range(stages + 1)]
    pairs = {1 + s: s for s in range(stages)}
    flow = Flow(tuple(units), found)
    return cut(flow, labels, stages, inputs, pairs, split), pairs


def graph(name: str, workers: int, microbatches: int) -> tuple[TaskGraph, Chunks]:
    each = 2 if name in LOOPED else 1
    stages = workers * each
    chunks, pairs = pipeline(stages, name == "zero_bubble")
    schedule = make_schedule(name, workers, microbatches, each)
    inputs = [version(1000 + k) for k in range(stages + 1)]
    found = task_graph(chunks, schedule, inputs, microbatches, lambda _: BYTES, pairs)
    return found, chunks


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("workers", "microbatches"), [(1, 1), (2, 4), (4, 3), (3, 8)])
def test_every_schedule_is_sound(name: str, workers: int, microbatches: int) -> None:
    found, chunks = graph(name, workers, microbatches)
    assert problems_of(found) == []
    ran = [(t.key, t.microbatch) for t in found.tasks if isinstance(t, Run)]
    every = [
        (chunk.key, turn)
        for chunk in chunks.chunks
        for turn in (range(microbatches) if chunk.key.phase == LOOP else [None])
    ]
    starts = [(c.key, None) for c in chunks.chunks if c.totals]
    assert sorted(map(str, ran)) == sorted(map(str, every + starts))
    assert sum(map(len, found.lists)) == len(found.tasks)


def test_what_is_sent_is_sent_once_and_let_go() -> None:
    found, _ = graph("1f1b", 2, 4)
    sends = [task for task in found.tasks if isinstance(task, Send)]
    # An activation there and a cotangent back, for every microbatch.
    assert len(sends) == 2 * 4
    assert {(s.worker, s.target) for s in sends} == {(0, 1), (1, 0)}
    freed = [s for task in found.tasks if isinstance(task, Free) for s in task.takes]
    assert len(freed) == len(set(freed))


def test_the_state_is_donated_to_its_successor() -> None:
    found, _ = graph("gpipe", 2, 2)
    gone = {slot for t in found.tasks if isinstance(t, Run) for slot in t.donates}
    assert gone.issuperset(found.inputs[1:])
    assert found.inputs[0] not in gone


def test_memory_follows_the_schedule() -> None:
    """GPipe keeps every microbatch, 1F1B as many as there are stages behind."""
    peaks = {name: graph(name, 4, 16)[0].peaks for name in ("gpipe", "1f1b")}
    assert all(a > b for a, b in zip(peaks["gpipe"], peaks["1f1b"], strict=True))
    assert sorted(peaks["1f1b"], reverse=True) == list(peaks["1f1b"])
    longer = graph("1f1b", 4, 64)[0].peaks
    assert longer == peaks["1f1b"]


def test_faults_are_found() -> None:
    found, _ = graph("1f1b", 2, 2)

    def problems(tasks: list[object]) -> str:
        return "\n".join(problems_of(replace(found, tasks=tuple(tasks))))  # type: ignore[arg-type]

    tasks = list(found.tasks)
    first = next(i for i, t in enumerate(tasks) if isinstance(t, Send))
    free = next(i for i, t in enumerate(tasks) if isinstance(t, Free))
    assert "not there" in problems(tasks[:first] + tasks[first + 1 :])
    assert "never let go" in problems(tasks[:free] + tasks[free + 1 :])
    assert "not there" in problems([tasks[free], *tasks])
    assert "gives slot" in problems([*tasks[: first + 1], *tasks[first:]])
    sent = tasks[first]
    assert isinstance(sent, Send)
    tasks[first] = replace(sent, target=sent.worker)
    assert "elsewhere" in problems(tasks)
    assert "is not there" in problems(tasks[:2])
