"""Dynamic programming over segments, against trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import pytest

from rhino_jax.search.frontier import (
    Cost,
    fastest,
    joined,
    options,
    repeated,
)

Segments = list[list[Cost]]


def walk(costs: Sequence[Cost]) -> tuple[int, int]:
    """Ticks and the most bytes, by going through a step event by event."""
    held = sum(cost.held for cost in costs)
    most = standing = 0
    for cost in costs:  # forward: each leaves what it saved
        standing += cost.saved
    for cost in reversed(costs):  # at its own worst moment what it saved is its own
        standing -= cost.saved
        most = max(most, standing + cost.peak)
        standing += cost.grad
    return sum(cost.ticks for cost in costs), held + most


def random_cost(draw: random.Random) -> Cost:
    saved, grad = draw.randrange(9), draw.randrange(4)
    return Cost(
        draw.randrange(1, 9),
        draw.randrange(4),
        saved,
        grad,
        max(saved, grad) + draw.randrange(9),
    )


def random_segments(draw: random.Random) -> Segments:
    """A few segments of a few options; often several equal ones in a row.

    In one of three problems nothing is held and no gradients are left.
    """
    found: Segments = []
    bare = draw.random() < 1 / 3
    while len(found) < draw.randrange(2, 7):
        one = [random_cost(draw) for _ in range(draw.randrange(1, 4))]
        if bare:
            one = [replace(cost, held=0, grad=0) for cost in one]
        found += [one] * draw.choice((1, 1, 2, 3))
    return found[:7]


def best_of_all(segments: Segments, limit: int) -> int | None:
    """The fewest ticks of all combinations that fit."""
    walked = (walk(picked) for picked in itertools.product(*segments))
    return min((ticks for ticks, most in walked if most <= limit), default=None)


@pytest.mark.parametrize("block", range(6))
def test_no_combination_is_better(block: int) -> None:
    """600 problems, each at limits from too tight to generous."""
    fitting = 0
    for seed in range(100 * block, 100 * (block + 1)):
        draw = random.Random(seed)
        segments = random_segments(draw)
        mosts = sorted({walk(p)[1] for p in itertools.product(*segments)})
        for limit in (mosts[0] - 1, mosts[0], draw.choice(mosts), mosts[-1]):
            picks = fastest(segments, limit)
            expected = best_of_all(segments, limit)
            if picks is None:
                assert expected is None
                continue
            costs = [options[i] for i, options in zip(picks, segments, strict=True)]
            ticks, most = walk(costs)
            assert (ticks, most <= limit) == (expected, True)
            fitting += 1
    assert fitting >= 300


def test_joining_is_associative_and_repeating_is_joining() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        a, b, c = (random_cost(draw) for _ in range(3))
        assert a.then(b).then(c) == a.then(b.then(c))
        one = options([random_cost(draw) for _ in range(3)])
        times = draw.randrange(1, 7)
        singly = reduce(lambda x, y: joined(x, y, 60), [one] * times)
        again = repeated(one, times, 60)
        assert {cost for cost, _ in singly} == {cost for cost, _ in again}


def test_what_is_dropped_is_never_missed() -> None:
    """A reduction keeps the optimum: with all ways kept nothing better is found."""
    for seed in range(100):
        draw = random.Random(seed)
        ways = [random_cost(draw) for _ in range(6)]
        kept = {cost for cost, _ in options(ways)}
        rest = random_cost(draw)
        for limit in range(60):
            best = [
                min(
                    (c.ticks for c in found if c.then(rest).most_bytes <= limit),
                    default=None,
                )
                for found in (kept, ways)
            ]
            assert best[0] == best[1]


def test_ninety_six_equal_layers_are_no_work() -> None:
    plain, remat = Cost(30, saved=100, peak=100), Cost(40, saved=10, peak=100)
    picks = fastest([[plain, remat]] * 96, 5000)
    assert picks is not None
    assert walk([(plain, remat)[i] for i in picks])[1] <= 5000
    fewer = list(picks)
    fewer[picks.index(1)] = 0
    assert walk([(plain, remat)[i] for i in fewer])[1] > 5000
