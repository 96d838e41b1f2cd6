"""Simulated clocks and in-flight counts against what the papers say, to the unit.

The whole grid of 1-64 workers and 1-128 microbatches: ``benchmarks/schedules.py``.
"""

from __future__ import annotations

import pytest

from rhino_jax.schedule import SCHEDULES, make_schedule
from rhino_jax.schedule.closed_forms import in_flight, makespan_seconds
from rhino_jax.schedule.memory import in_flight as counted
from rhino_jax.schedule.validate import validate
from tests.schedule.pipelines import STAGES_PER_WORKER, clock, counts

SMALL = tuple(range(1, 7)), tuple(range(1, 14))
WIDE = (1, 3, 16, 64), (1, 63, 128)


def is_as_told(name: str, p: int, m: int, v: int, f: int, b: int, w: int) -> bool:
    schedule = make_schedule(name, p, m, v)
    halves = (b, w) if name == "zero_bubble" else (b + w, 0)
    told = makespan_seconds(
        name, p, m, v, forward=f, backward=halves[0], weight=halves[1]
    )
    return clock(schedule, f, b, w).makespan_seconds == told and counted(
        schedule
    ) == in_flight(name, p, m, v)


@pytest.mark.parametrize("durations", [(1, 1, 1), (5, 3, 2)])
def test_small_pipelines_are_as_told(durations: tuple[int, int, int]) -> None:
    wrong = [row for row in counts(*SMALL) if not is_as_told(*row, *durations)]
    assert wrong == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_wide_pipelines_are_as_told(name: str) -> None:
    v = STAGES_PER_WORKER[name][-1]
    grid = [(name, p, m, min(v, 2)) for p in WIDE[0] for m in WIDE[1]]
    assert [row for row in grid if not is_as_told(*row, 1, 1, 1)] == []


@pytest.mark.parametrize("w", [2, 3, 9])
def test_long_weight_halves_stand_out_of_the_gaps(w: int) -> None:
    for p, m in [(2, 2), (4, 4), (4, 9), (7, 8)]:
        assert is_as_told("zero_bubble", p, m, 1, 2, 1, w)


@pytest.mark.parametrize("durations", [(1, 1, 1), (3, 4, 2)])
def test_the_bubble_of_zero_bubble_is_below_that_of_1f1b(
    durations: tuple[int, int, int],
) -> None:
    for p in (2, 3, 5, 8):
        for m in (p, p + 1, 3 * p):
            ours = clock(make_schedule("zero_bubble", p, m), *durations)
            theirs = clock(make_schedule("1f1b", p, m), *durations)
            assert ours.makespan_seconds < theirs.makespan_seconds
            assert max(ours.bubbles()) < min(theirs.bubbles())
            assert max(counted(ours.schedule)) == max(counted(theirs.schedule))


def test_interleaving_makes_the_bubble_smaller_by_the_stages_of_a_worker() -> None:
    """Equal layers, cut into 4 or into 4 v stages."""
    plain = clock(make_schedule("1f1b", 4, 8), 6, 6, 6).bubbles()[0]
    for v in (2, 3):
        share = clock(make_schedule("interleaved", 4, 8, v), 6 // v, 6 // v, 6 // v)
        bubble = share.bubbles()[0]
        assert bubble / (1 - bubble) == pytest.approx(plain / (1 - plain) / v)


def test_all_schedules_are_sound() -> None:
    wrong = [
        (row, found)
        for row in counts(*SMALL)
        if (found := validate(make_schedule(*row), most_in_flight=in_flight(*row)))
    ]
    assert wrong == []
