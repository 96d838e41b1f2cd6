"""Cuts into stages, against trying all of them.

What a cut takes and needs is written out here once more, stage by stage.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rhino_jax.errors import InfeasibleError, OptionsError
from rhino_jax.schedule import make_schedule
from rhino_jax.schedule.simulate import simulate
from rhino_jax.search.stage_costs import PICO, Chain, Starts
from rhino_jax.search.stages import (
    SegmentCost,
    StageProblem,
    cut_stages,
    supported,
)

PLAIN = ("gpipe", "1f1b", "eager_1f1b", "zero_bubble")


def random_problem(
    seed: int, schedule: str, stages_per_worker: int = 1
) -> StageProblem:
    """Up to 9 segments, all numbers whole, sometimes all segments equal."""
    draw = random.Random(f"{schedule} {seed}")
    workers = draw.randint(1, 4 // stages_per_worker)
    size = draw.randint(workers * stages_per_worker, 9)

    def segment() -> SegmentCost:
        forward, back = draw.randint(1, 9), draw.randint(1, 18)
        return SegmentCost(
            forward,
            back,
            weight_seconds=draw.randint(0, back),
            saved_bytes=draw.randint(0, 6),
            held_bytes=draw.randint(0, 30),
            peak_bytes=draw.randint(0, 10),
        )

    equal = draw.random() < 0.2
    segments = [segment()] * size if equal else [segment() for _ in range(size)]
    return StageProblem(
        tuple(segments),
        tuple(draw.randint(0, 5) for _ in range(size - 1)),
        workers,
        draw.randint(1, 9),
        schedule,
        stages_per_worker,
        link_alpha_seconds=draw.randint(0, 1),
        link_seconds_per_byte=draw.randint(0, 2),
    )


def all_cuts(problem: StageProblem) -> Iterator[Starts]:
    stages = problem.num_workers * problem.stages_per_worker
    for rest in itertools.combinations(range(1, len(problem.segments)), stages - 1):
        yield 0, *rest


def stages_of(problem: StageProblem, starts: Starts) -> list[tuple[SegmentCost, ...]]:
    ends = (*starts[1:], len(problem.segments))
    return [problem.segments[a:b] for a, b in zip(starts, ends, strict=True)]


def sent(problem: StageProblem, starts: Starts) -> list[int]:
    """Seconds to send over the cut behind every stage, none behind the last."""
    if problem.num_workers == 1:
        return [0] * len(starts)
    alpha, beta = problem.link_alpha_seconds, problem.link_seconds_per_byte
    return [int(alpha + beta * problem.cut_bytes[i - 1]) for i in starts[1:]] + [0]


def estimate(problem: StageProblem, starts: Starts) -> int:
    """Fill, and the slowest stage's pace for every other microbatch."""
    p, m, v = problem.num_workers, problem.num_microbatches, problem.stages_per_worker
    fill, paces = 0, []
    stages = stages_of(problem, starts)
    for k, (stage, x) in enumerate(zip(stages, sent(problem, starts), strict=True)):
        f = int(sum(s.forward_seconds for s in stage))
        b = int(sum(s.backward_seconds for s in stage))
        w = int(sum(s.weight_seconds for s in stage))
        added, pace = f + b, max(f + b, x)
        if problem.schedule == "1f1b":
            pace = f + b + 2 * x
        elif problem.schedule in ("gpipe", "circular"):
            pace = max(f, x) + max(b, x)
        elif problem.schedule == "zero_bubble" and m < p:
            pace = f + b - w + 2 * x
            added = f + b if k == 0 else f + b - w
        elif problem.schedule == "zero_bubble":
            pace = max(f + b, f + b - w + 2 * x)
            added = f + b if k == 0 else f + b - w - min(f, b - w, w)
        fill += added + 2 * x
        paces.append(pace)
    turns = (m - p) * v + p - 1 if m >= p else m - 1
    return fill + turns * max(paces)


def need_bytes(problem: StageProblem, starts: Starts) -> int:
    """Of the fullest device, one stage a worker."""
    p, m = problem.num_workers, problem.num_microbatches
    needs = []
    for k, stage in enumerate(stages_of(problem, starts)):
        kept = {
            "gpipe": m,
            "1f1b": min(p - k, m),
            "eager_1f1b": min(2 * (p - k) - 1, m),
            "zero_bubble": min(p, m),
        }[problem.schedule]
        needs.append(
            sum(s.held_bytes + kept * s.saved_bytes for s in stage)
            + max(s.peak_bytes for s in stage)
        )
    return max(needs)


def makespan(problem: StageProblem, starts: Starts) -> int:
    stages, times = stages_of(problem, starts), sent(problem, starts)
    forward = [int(sum(s.forward_seconds for s in stage)) for stage in stages]
    back = [int(sum(s.backward_seconds for s in stage)) for stage in stages]
    weight = [int(sum(s.weight_seconds for s in stage)) for stage in stages]
    inputs = [b - w for b, w in zip(back, weight, strict=True)]
    schedule = make_schedule(
        problem.schedule,
        problem.num_workers,
        problem.num_microbatches,
        problem.stages_per_worker,
    )
    return simulate(
        schedule,
        {
            "forward": forward,
            "backward": back,
            "backward_input": inputs,
            "backward_weight": weight,
        },
        transfer_seconds={
            edge: times[k]
            for k in range(len(stages) - 1)
            for edge in ((k, k + 1), (k + 1, k))
        },
    ).makespan_seconds


@pytest.mark.parametrize("schedule", PLAIN)
def test_the_least_estimate_is_that_of_all_cuts(schedule: str) -> None:
    """400 chains in all, half of them with memory for some cuts only."""
    for seed in range(100):
        problem = random_problem(seed, schedule)
        cuts = list(all_cuts(problem))
        limit = 2**40
        if seed % 2:
            needs = sorted(need_bytes(problem, starts) for starts in cuts)
            limit = needs[len(needs) // 4]
        problem = replace(problem, memory_limit_bytes=limit)
        fitting = [starts for starts in cuts if need_bytes(problem, starts) <= limit]
        least = min(estimate(problem, starts) for starts in fitting)
        chain = Chain(problem)
        found = list(supported(chain, limit))
        assert all(starts in fitting for starts in found)
        assert min(chain.estimate(starts) for starts in found) == least * PICO
        answer = cut_stages(problem)
        assert answer.starts in fitting
        assert max(answer.peak_bytes) == need_bytes(problem, answer.starts)
        assert answer.estimate_seconds == estimate(problem, answer.starts)
        assert answer.predicted_seconds == makespan(problem, answer.starts)


@pytest.mark.parametrize("schedule", ["interleaved", "circular"])
def test_the_least_estimate_of_looped_stages(schedule: str) -> None:
    for seed in range(40):
        problem = random_problem(seed, schedule, 2)
        least = min(estimate(problem, starts) for starts in all_cuts(problem))
        chain = Chain(problem)
        found = supported(chain, problem.memory_limit_bytes)
        assert min(chain.estimate(starts) for starts in found) == least * PICO


@pytest.mark.parametrize("schedule", PLAIN)
def test_found_makespans_are_near_the_least_of_all_cuts(schedule: str) -> None:
    """On the clock, not by estimate: within 1% on average over 25 chains."""
    over = 0.0
    for seed in range(25):
        problem = random_problem(seed, schedule)
        least = min(makespan(problem, starts) for starts in all_cuts(problem))
        over += cut_stages(problem).predicted_seconds / least - 1
    assert 0 <= over / 25 < 0.01


@pytest.mark.parametrize("schedule", PLAIN)
def test_what_does_not_fit_says_how_many_bytes_are_short(schedule: str) -> None:
    for seed in range(20):
        problem = random_problem(seed, schedule)
        least = min(need_bytes(problem, starts) for starts in all_cuts(problem))
        fits = cut_stages(replace(problem, memory_limit_bytes=least))
        assert max(fits.peak_bytes) == least
        with pytest.raises(InfeasibleError) as error:
            cut_stages(replace(problem, memory_limit_bytes=least - 1))
        numbers = re.search(
            r"needs (\d+) bytes.* (\d+) more than the limit of (\d+)", str(error.value)
        )
        assert numbers is not None
        assert [int(n) for n in numbers.groups()] == [least, 1, least - 1]


@pytest.mark.parametrize("schedule", ["interleaved", "circular"])
def test_looped_stages_fit_a_worker_together(schedule: str) -> None:
    """What a worker keeps is read off the clock; less memory than the fastest cuts need
    gives slower ones that fit, until the bytes short are told."""
    refused = slower = 0
    for seed in range(40):
        problem = random_problem(seed, schedule, 2)
        free = cut_stages(problem)
        assert free.peak_bytes == kept_on_the_clock(problem, free.starts)
        limit = max(free.peak_bytes) - 1
        try:
            tight = cut_stages(replace(problem, memory_limit_bytes=limit))
        except InfeasibleError:
            refused += 1
            continue
        assert max(kept_on_the_clock(problem, tight.starts)) <= limit
        slower += tight.predicted_seconds > free.predicted_seconds
    assert refused and slower


def kept_on_the_clock(problem: StageProblem, starts: Starts) -> tuple[int, ...]:
    p, v = problem.num_workers, problem.stages_per_worker
    stages = stages_of(problem, starts)
    schedule = make_schedule(problem.schedule, p, problem.num_microbatches, v)
    ones = [1] * len(stages)
    clock = simulate(schedule, {"forward": ones, "backward": ones})
    saved = [sum(s.saved_bytes for s in stage) for stage in stages]
    kept = []
    for worker in range(p):
        own = [s for stage in stages[worker::p] for s in stage]
        most = max(level for _, level in clock.held(worker, saved))
        held, peak = sum(s.held_bytes for s in own), max(s.peak_bytes for s in own)
        kept.append(held + most + peak)
    return tuple(kept)


def test_the_first_stages_are_smaller_where_memory_is_short() -> None:
    """They keep more microbatches; a stage of 4 layers fits at the end alone."""
    layer = SegmentCost(1.0, 2.0, saved_bytes=10)
    problem = StageProblem((layer,) * 12, (0,) * 11, 4, 8)
    assert cut_stages(problem).starts == (0, 3, 6, 9)
    tight = replace(problem, memory_limit_bytes=80)
    assert cut_stages(tight).starts == (0, 2, 4, 8)


@pytest.mark.parametrize("schedule", PLAIN)
def test_many_equal_layers_are_cut_equally_and_at_once(schedule: str) -> None:
    """96 layers into 16 stages: two paces are looked at, however deep."""
    layer = SegmentCost(0.001, 0.002, weight_seconds=0.001, saved_bytes=7)
    problem = StageProblem((layer,) * 96, (5,) * 95, 16, 64, schedule)
    assert len(set(supported(Chain(problem), 2**40))) <= 2
    found, equal = cut_stages(problem), tuple(range(0, 96, 6))
    if schedule == "eager_1f1b":
        # A longer first and a shorter last stage are faster by half a percent.
        assert found.predicted_seconds < 79 * 6 * 0.003
    else:
        assert found.starts == equal


def test_more_stages_than_segments_are_refused() -> None:
    problem = StageProblem((SegmentCost(1.0, 1.0),) * 5, (1,) * 4, 3, 4, "circular", 2)
    with pytest.raises(OptionsError, match=r"6 stages .* Ask for 5 stages at most"):
        cut_stages(problem)
    with pytest.raises(OptionsError, match="did you mean 1f1b"):
        cut_stages(replace(problem, schedule="1f1", stages_per_worker=1))
