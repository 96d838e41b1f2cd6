"""What workers keep between forward and backward: it depends on the order alone."""

from __future__ import annotations

from collections.abc import Sequence

from rhino_jax.schedule.tasks import BACKWARD_INPUT, FORWARD, Schedule, Task


def alive(tasks: Sequence[Task], saved_bytes: Sequence[int] | None = None) -> list[int]:
    """What one worker keeps once it has begun a forward, or ended a backward task.

    A forward task saves; the whole backward task, or its weight half, frees (the input
    half frees nothing: what is saved is taken to be read by both halves).

    Args:
        tasks: of one worker, in order.
        saved_bytes: stage -> what it saves for one microbatch; None counts 1 for each.

    >>> F, B = "forward", "backward"
    >>> alive([Task(F, 0, 0), Task(F, 0, 1), Task(B, 0, 0), Task(B, 0, 1)], [10])
    [10, 20, 10, 0]
    """
    levels, level = [], 0
    for task in tasks:
        size = 1 if saved_bytes is None else saved_bytes[task.stage]
        if task.kind == FORWARD:
            level += size
        elif task.kind != BACKWARD_INPUT:
            level -= size
        levels.append(level)
    return levels


def in_flight(
    schedule: Schedule, saved_bytes: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Worker -> the most that it keeps at once (see :func:`alive`).

    >>> from rhino_jax.schedule import make_schedule
    >>> in_flight(make_schedule("1f1b", 4, 8)), in_flight(make_schedule("gpipe", 4, 8))
    ((4, 3, 2, 1), (8, 8, 8, 8))
    """
    return tuple(max(alive(tasks, saved_bytes), default=0) for tasks in schedule.lists)


def in_flight_of_stages(schedule: Schedule) -> tuple[int, ...]:
    """Stage -> the most microbatches that it keeps at once."""
    most = [0] * schedule.num_stages
    for tasks in schedule.lists:
        for stage in {task.stage for task in tasks}:
            own = [task for task in tasks if task.stage == stage]
            most[stage] = max(alive(own))
    return tuple(most)
