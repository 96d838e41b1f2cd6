"""Clocks with transfers and shared links, by hand."""

from __future__ import annotations

import pytest

from rhino_jax.errors import OptionsError
from rhino_jax.schedule import Schedule, Task, forward_only, make_schedule
from rhino_jax.schedule.simulate import simulate

HALVES = {"forward": 4, "backward": 8, "backward_input": 4, "backward_weight": 4}


def with_transfers(name: str, p: int, m: int, x: int) -> float:
    seconds = {kind: [took] * p for kind, took in HALVES.items()}
    edges = [(a, a + 1) for a in range(p - 1)]
    transfer_seconds = {e: x for a, b in edges for e in ((a, b), (b, a))}
    schedule = make_schedule(name, p, m)
    return simulate(
        schedule, seconds, transfer_seconds=transfer_seconds
    ).makespan_seconds


@pytest.mark.parametrize("x", [1, 2, 3])
def test_eager_1f1b_hides_what_1f1b_waits_for(x: int) -> None:
    """Once filled, sending costs eager 1F1B nothing, as it costs GPipe nothing."""
    filled = 12 * (16 + 4 - 1) + 2 * x * (4 - 1)
    assert with_transfers("gpipe", 4, 16, x) == filled
    assert with_transfers("eager_1f1b", 4, 16, x) == filled
    assert with_transfers("1f1b", 4, 16, x) > filled


def test_a_slow_link_sets_the_pace() -> None:
    """Forward alone: after the first, one microbatch every 9 seconds."""
    schedule = forward_only(make_schedule("gpipe", 2, 5))
    run = simulate(schedule, {"forward": [4, 1]}, transfer_seconds={(0, 1): 9})
    assert [t.end_seconds for t in run.transfers] == [13, 22, 31, 40, 49]
    assert run.makespan_seconds == 50


TOWERS = Schedule(
    "towers",
    1,
    (0, 1, 2),
    tuple((Task("forward", s, 0),) for s in range(3)),
)


@pytest.mark.parametrize(
    ("links", "end"), [({}, 9), ({(0, 2): "a", (1, 2): "a"}, 14)], ids=["own", "shared"]
)
def test_towers_that_share_a_link_wait_for_one_another(
    links: dict[tuple[int, int], str], end: int
) -> None:
    run = simulate(
        TOWERS,
        {"forward": [2, 3, 1]},
        edges=[(0, 2), (1, 2)],
        transfer_seconds={(0, 2): 6, (1, 2): 5},
        links=links,
    )
    assert run.makespan_seconds == end


def test_stages_of_one_worker_send_nothing() -> None:
    schedule = make_schedule("circular", 1, 3, 4)
    seconds = {"forward": [1] * 4, "backward": [1] * 4}
    run = simulate(schedule, seconds, transfer_seconds={(0, 1): 100, (1, 0): 100})
    assert run.transfers == ()
    assert run.makespan_seconds == 24


def test_bubbles_and_bytes_over_time() -> None:
    run = simulate(make_schedule("1f1b", 2, 2), {"forward": [1, 1], "backward": [2, 2]})
    assert run.makespan_seconds == 9
    assert run.busy_seconds() == (6, 6)
    assert run.bubbles() == pytest.approx((1 / 3, 1 / 3))
    assert run.held(0, [10, 1]) == [(0, 0), (0, 10), (1, 20), (6, 10), (9, 0)]
    assert run.held(1) == [(0, 0), (1, 1), (4, 0), (4, 1), (7, 0)]


def test_durations_that_do_not_fit_are_named() -> None:
    with pytest.raises(OptionsError, match=r"backward: 1 durations for 2 stages"):
        simulate(make_schedule("1f1b", 2, 2), {"forward": [1, 1], "backward": [2]})


def test_a_schedule_that_gets_stuck_says_where() -> None:
    turned = Schedule(
        "mine", 1, (0,), ((Task("backward", 0, 0), Task("forward", 0, 0)),)
    )
    with pytest.raises(OptionsError, match="worker 0 before backward of stage 0"):
        simulate(turned, {"forward": [1], "backward": [1]})
