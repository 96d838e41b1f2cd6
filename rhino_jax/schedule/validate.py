"""Is a schedule one that workers can run? Every fault in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rhino_jax.schedule.memory import in_flight
from rhino_jax.schedule.tasks import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    KINDS,
    Edge,
    Needs,
    Schedule,
    Task,
    chain,
)

WAYS_BACK = ({BACKWARD: 1}, {BACKWARD_INPUT: 1, BACKWARD_WEIGHT: 1})
"""What else a forward task must come with: one whole, or two halves."""


def validate(
    schedule: Schedule,
    edges: Sequence[Edge] | None = None,
    most_in_flight: Sequence[int] | None = None,
) -> list[str]:
    """All that is wrong with ``schedule``; nothing where it is sound.

    Sound: every task is there once and with its own worker, and if every worker runs
    its list in order, each task waiting for all it needs (see :class:`Needs`), all of
    them end.

    Args:
        schedule: of any origin.
        edges: (stage, stage) where the second reads what the first made; None is a
            chain. Stages are in data-flow order, so the first is the smaller. What is
            sound for a chain is so for every other set of edges.
        most_in_flight: worker -> how many pairs of stage and microbatch it may keep at
            once; None is any number.

    >>> F, B = "forward", "backward"
    >>> turned = (Task(B, 0, 0), Task(F, 0, 0))
    >>> validate(Schedule("mine", 1, (0,), (turned,)))[0]
    'worker 0 stops before backward of stage 0, microbatch 0: it needs forward of \
stage 0, microbatch 0, which comes later in its own list'
    """
    edges = chain(schedule.num_stages) if edges is None else edges
    found = [*_misplaced(schedule, edges), *_not_once(schedule)]
    # Without its tasks, every schedule gets stuck: that would hide what is wrong.
    found += [] if found else _stuck(schedule, edges)
    return found + list(_too_many(schedule, most_in_flight))


def _misplaced(schedule: Schedule, edges: Sequence[Edge]) -> Iterator[str]:
    stages, workers = range(schedule.num_stages), range(schedule.num_workers)
    for stage, worker in enumerate(schedule.worker_of):
        if worker not in workers:
            yield f"stage {stage} is worker {worker}'s; there are {len(workers)}"
    for a, b in edges:
        if a not in stages or b not in stages:
            yield f"edge ({a}, {b}): stages go from 0 to {len(stages) - 1}"
        elif a >= b:
            yield f"edge ({a}, {b}) goes against the order of the stages"
    for worker, tasks in enumerate(schedule.lists):
        for task in tasks:
            if task.kind not in KINDS:
                yield f"worker {worker} runs {task}: kinds are {', '.join(KINDS)}"
            elif task.stage not in stages:
                yield f"worker {worker} runs {task}: there are {len(stages)} stages"
            elif task.microbatch not in range(schedule.num_microbatches):
                most = schedule.num_microbatches
                yield f"worker {worker} runs {task}: there are {most} microbatches"
            elif schedule.worker_of[task.stage] != worker:
                right = schedule.worker_of[task.stage]
                yield f"worker {worker} runs {task}, which is worker {right}'s"


def _not_once(schedule: Schedule) -> Iterator[str]:
    counts = Counter(schedule.tasks)
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            times = {kind: counts[Task(kind, stage, microbatch)] for kind in KINDS}
            where = f"of stage {stage}, microbatch {microbatch}"
            if (count := times.pop(FORWARD)) != 1:
                yield f"forward {where} is run {count} times"
            there = {kind: count for kind, count in times.items() if count}
            if there not in WAYS_BACK:
                runs = ", ".join(f"{k} {c} times" for k, c in there.items())
                yield (
                    f"{where[3:]} goes back by {runs or 'nothing'}: it must by one "
                    "backward, or by one backward_input and one backward_weight"
                )


def _stuck(schedule: Schedule, edges: Sequence[Edge]) -> Iterator[str]:
    """Run the lists without a clock; who can not go on, and for want of what."""
    needs = Needs(schedule.tasks, edges)
    ended: set[Task] = set()
    places = [0] * schedule.num_workers
    waiters: dict[Task, list[int]] = {}
    look_at = list(range(schedule.num_workers))
    while look_at:
        worker = look_at.pop()
        for task in schedule.lists[worker][places[worker] :]:
            lacking = next((n for n in needs.of(task) if n not in ended), None)
            if lacking is not None:
                waiters.setdefault(lacking, []).append(worker)
                break
            ended.add(task)
            places[worker] += 1
            look_at += waiters.pop(task, [])
    for lacking, workers in sorted(waiters.items(), key=lambda item: min(item[1])):
        owner = schedule.worker_of[lacking.stage]
        for worker in sorted(workers):
            task = schedule.lists[worker][places[worker]]
            why = (
                "which comes later in its own list"
                if owner == worker
                else f"and worker {owner} stops before that"
            )
            yield f"worker {worker} stops before {task}: it needs {lacking}, {why}"


def _too_many(
    schedule: Schedule, most_in_flight: Sequence[int] | None
) -> Iterator[str]:
    if most_in_flight is None:
        return
    if len(most_in_flight) != schedule.num_workers:
        given = len(most_in_flight)
        yield f"{given} in-flight bounds for {schedule.num_workers} workers"
        return
    peaks = in_flight(schedule)
    for worker, (peak, most) in enumerate(zip(peaks, most_in_flight, strict=True)):
        if peak > most:
            yield f"worker {worker} keeps {peak} microbatches; its bound is {most}"
