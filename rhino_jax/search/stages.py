"""Where to cut a chain of segments into pipeline stages on equal sub-meshes.

Numbers in, cuts out. The estimate of :mod:`rhino_jax.search.stage_costs` is minimized
exactly, by dynamic programming over (stages, segments) with a bound on the pace, for
every bound that can matter. From the best few on, cuts are then moved for as long as
that makes the simulated makespan smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from rhino_jax.errors import InfeasibleError
from rhino_jax.search.stage_costs import (
    PICO,
    Array,
    Chain,
    SegmentCost,
    StageProblem,
    Starts,
)

__all__ = ["SegmentCost", "StageCuts", "StageProblem", "cut_stages"]

NEVER = np.iinfo(np.int64).max // 4
"""Of what can not be: more than any sum, and two of them can still be added."""
SEEDS = 4
"""How many of the cuts with the best estimates are moved,"""
NEARLY = 1.1
"""if they are within this of the best."""
NEAR = 4
"""Stages so near to one another may move each its way."""
MOST_MOVES = 32


@dataclass(frozen=True)
class StageCuts:
    """An answer.

    Attributes:
        starts: the first segment of every stage.
        estimate_seconds: the sum that the search began with.
        predicted_seconds: the makespan on the simulator's clock.
        peak_bytes: worker -> the most that one of its devices keeps.
    """

    starts: Starts
    estimate_seconds: float
    predicted_seconds: float
    peak_bytes: tuple[int, ...]


def cut_stages(problem: StageProblem) -> StageCuts:
    """Cuts that fit, with a small makespan.

    With one stage a worker, the search begins at the smallest estimate of all cuts that
    fit (and ends there, or at a smaller makespan). With several, how a worker's memory
    is divided between its stages is tried in ``stages_per_worker`` ways.

    Args:
        problem: what to cut.

    Raises:
        OptionsError: more stages than segments; an unknown schedule, impossible counts.
        InfeasibleError: no cuts fit; says how many bytes they are short of.

    >>> layer = SegmentCost(1.0, 2.0, held_bytes=10, saved_bytes=1)
    >>> cuts = cut_stages(StageProblem((layer,) * 6, (1,) * 5, 3, 4))
    >>> cuts.starts, cuts.predicted_seconds, cuts.peak_bytes
    ((0, 2, 4), 36.0, (26, 24, 22))
    """
    chain = Chain(problem)
    limit, several = problem.memory_limit_bytes, problem.stages_per_worker
    found: dict[Starts, int] = {}
    for share in range(several, 0, -1):
        for starts in supported(chain, limit * share // several):
            if max(chain.peak_bytes(starts)) <= limit:
                found[starts] = chain.estimate(starts)
    if not found:
        starts = leanest(chain)
        most = max(chain.peak_bytes(starts))
        if most > limit:
            raise InfeasibleError(_short(problem, starts, chain.peak_bytes(starts)))
        found[starts] = chain.estimate(starts)
    seeds = sorted(found, key=lambda starts: (found[starts], starts))[:SEEDS]
    near = [starts for starts in seeds if found[starts] <= NEARLY * found[seeds[0]]]
    ticks, starts = min(_climbed(chain, starts) for starts in near)
    return StageCuts(
        starts, chain.estimate(starts) / PICO, ticks / PICO, chain.peak_bytes(starts)
    )


def _short(problem: StageProblem, starts: Starts, peaks: Sequence[int]) -> str:
    most, limit = max(peaks), problem.memory_limit_bytes
    less = "" if problem.schedule == "1f1b" else ", the schedule 1f1b"
    return (
        f"no cut of {len(problem.segments)} segments into {len(starts)} stages for "
        f"{problem.num_workers} workers fits under {problem.schedule} with "
        f"{problem.num_microbatches} microbatches: the leanest found needs {most} "
        f"bytes on a device of worker {peaks.index(most)}, {most - limit} more than "
        f"the limit of {limit}. Try more workers, smaller microbatches, "
        f"rematerialization{less}."
    )


def _moved(starts: Starts, num_segments: int) -> list[Starts]:
    """Cuts with a run of stages, or two near ones, beginning a segment off."""
    steps = [(k, step) for k in range(1, len(starts)) for step in (-1, 1)]
    moves = [{a: x, b: y} for (a, x), (b, y) in combinations(steps, 2) if b - a <= NEAR]
    for first, step in steps:
        for end in range(first + 1, len(starts) + 1):
            moves.append(dict.fromkeys(range(first, end), step))
    found = set()
    for move in moves:
        new = tuple(start + move.get(k, 0) for k, start in enumerate(starts))
        if all(a < b for a, b in pairwise((*new, num_segments))):
            found.add(new)
    return sorted(found)


def _climbed(chain: Chain, starts: Starts) -> tuple[int, Starts]:
    """Cuts moved for as long as that makes their makespan smaller, and what that is."""
    limit, size = chain.problem.memory_limit_bytes, len(chain.problem.segments)
    best = chain.makespans([starts])[0]
    for _ in range(MOST_MOVES):
        cuts = _moved(starts, size)
        better = [
            (ticks, cut)
            for ticks, cut in zip(chain.makespans(cuts), cuts, strict=True)
            if ticks < best
        ]
        fitting = (c for c in sorted(better) if max(chain.peak_bytes(c[1])) <= limit)
        moved = next(fitting, None)
        if moved is None:
            break
        best, starts = moved
    return best, starts


def _best(tables: Sequence[Array], joins: np.ufunc) -> tuple[int, Starts]:
    """The cheapest way through: stage k from i to j costs ``tables[k][i, j]``, and
    ``joins`` (a sum, a maximum) makes one cost of two. Of equal ways the one whose last
    stage begins first, and so on."""
    size = len(tables[0])
    costs = np.full(size, NEVER, np.int64)
    costs[0] = 0
    behind = []
    # A stage has a segment at least.
    forward = np.triu(np.ones((size, size), bool), 1)
    for table in tables:
        ways = np.where(forward, joins(costs[:, None], table), NEVER)
        behind.append(ways.argmin(axis=0))
        costs = np.minimum(ways.min(axis=0), NEVER)
    at, starts = size - 1, []
    for chosen in reversed(behind):
        at = int(chosen[at])
        starts.append(at)
    return int(costs[-1]), tuple(reversed(starts))


def leanest(chain: Chain) -> Starts:
    """The cuts whose fullest stage needs least."""
    return _best(chain.need_bytes, np.maximum)[1]


def supported(chain: Chain, limit_bytes: int) -> Iterator[Starts]:
    """Cuts of which every stage fits, the one with the smallest estimate among them.

    The best cuts whose stages all keep within a pace are found for ever other paces.
    Between two of them the fill only shrinks as the pace grows: where it does not
    shrink, or not by as much as the pace costs more, there is nothing to look for.
    """
    fits = [need <= limit_bytes for need in chain.need_bytes]
    paces = np.unique(chain.pace[np.triu_indices(len(chain.pace), 1)])
    least = chain.turns * paces

    def within(place: int) -> tuple[int, Starts]:
        kept = chain.pace <= paces[place]
        tables = [np.where(kept & fit, chain.fill, NEVER) for fit in fits]
        return _best(tables, np.add)

    last = len(paces) - 1
    cheapest, starts = within(last)
    if cheapest >= NEVER:
        return
    yield starts
    best = chain.estimate(starts)
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if within(middle)[0] < NEVER:
            high = middle
        else:
            low = middle + 1
    first, starts = within(low)
    yield starts
    best = min(best, chain.estimate(starts))
    gaps = [(low, first, last, cheapest)]
    while gaps:
        low, most, high, fill = gaps.pop()
        if high - low < 2 or most == fill or fill + least[low + 1] >= best:
            continue
        middle = (low + high) // 2
        here, starts = within(middle)
        yield starts
        best = min(best, chain.estimate(starts))
        gaps += [(middle, here, high, fill), (low, most, middle, here)]
