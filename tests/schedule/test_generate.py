"""What can not be made, and what schedules have in common."""

from __future__ import annotations

import pytest

from rhino_jax.errors import OptionsError
from rhino_jax.schedule import SCHEDULES, Task, forward_only, make_schedule
from rhino_jax.schedule.generate import LOOPED
from rhino_jax.schedule.validate import validate
from tests.schedule.pipelines import counts

GRID = list(counts((1, 3, 4), (1, 2, 7, 8)))


def short(name: str, *numbers: int) -> list[str]:
    """Kind and microbatch of each task, a line a worker."""
    letters = {
        "forward": "F",
        "backward": "B",
        "backward_input": "B",
        "backward_weight": "W",
    }
    return [
        " ".join(f"{letters[task.kind]}{task.microbatch}" for task in tasks)
        for tasks in make_schedule(name, *numbers).lists
    ]


def test_1f1b_as_in_the_paper() -> None:
    assert short("1f1b", 3, 4) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_weight_halves_come_as_late_as_memory_lets_them() -> None:
    """The first worker has no room; the last keeps 4 microbatches, as the first."""
    first, *_, last = short("zero_bubble", 4, 6)
    assert first == "F0 F1 F2 F3 B0 W0 F4 B1 W1 F5 B2 W2 B3 W3 B4 W4 B5 W5"
    assert last == "F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 F5 B5 W2 W3 W4 W5"


def test_interleaved_passes_groups_of_microbatches_on() -> None:
    worker = make_schedule("interleaved", 2, 4, 2).lists[1]
    assert [(t.stage, t.microbatch) for t in worker if t.kind == "forward"] == [
        *((1, 0), (1, 1), (3, 0), (3, 1)),
        *((1, 2), (1, 3), (3, 2), (3, 3)),
    ]


@pytest.mark.parametrize(
    ("looped", "plain"), [("interleaved", "1f1b"), ("circular", "gpipe")]
)
def test_one_stage_a_worker_is_the_plain_schedule(looped: str, plain: str) -> None:
    assert make_schedule(looped, 3, 5).lists == make_schedule(plain, 3, 5).lists


@pytest.mark.parametrize("row", GRID, ids=str)
def test_stages_and_microbatches_take_their_turns(row: tuple) -> None:
    """Stages loop over workers; each stage takes its microbatches in order, both ways:
    gradients are summed in one order under all schedules."""
    schedule = make_schedule(*row)
    name, p, m, v = row
    assert (schedule.name, schedule.num_microbatches) == (name, m)
    assert schedule.worker_of == tuple(s % p for s in range(p * v))
    for kind in {task.kind for task in schedule.tasks}:
        for stage in range(schedule.num_stages):
            tasks = schedule.lists[schedule.worker_of[stage]]
            found = [t for t in tasks if (t.kind, t.stage) == (kind, stage)]
            assert found == [Task(kind, stage, j) for j in range(m)]


@pytest.mark.parametrize("row", GRID[::5], ids=str)
def test_evaluation_is_the_forward_half(row: tuple) -> None:
    schedule = forward_only(make_schedule(*row))
    assert {task.kind for task in schedule.tasks} == {"forward"}
    assert validate(schedule) == []


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(OptionsError) as error:
        make_schedule("1f1", 0, -1, 2)
    message = str(error.value)
    assert "schedule='1f1': did you mean 1f1b" in message
    for name, value in [("num_workers", 0), ("num_microbatches", -1)]:
        assert f"{name}={value}: a whole number of at least 1" in message


@pytest.mark.parametrize("name", sorted({*SCHEDULES} - LOOPED))
def test_schedules_of_one_stage_a_worker_say_so(name: str) -> None:
    with pytest.raises(OptionsError, match="circular and interleaved run several"):
        make_schedule(name, 2, 4, 2)
