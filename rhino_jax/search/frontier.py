"""Dynamic programming over segments, memory in it: what is best for every limit.

A train step goes through its segments forward and then backward. What a stretch of
them costs is five numbers, a :class:`Cost`: its time, what it holds all the time, what
its forward half saves for its backward half, the gradients that its backward half
leaves, and the most it has beside what it holds. Costs of neighbours are joined by
``then``, which is associative: a stretch is an option like a segment is, equal ones can
be joined by repeated squaring, and what is worse in every number can be dropped at
once, for ``then`` is monotone in each of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

Picks = tuple[int, ...]
"""The option taken of every segment, in order."""


@dataclass(frozen=True, order=True)
class Cost:
    """What a stretch of segments costs; times in ticks, the rest in bytes.

    >>> one = Cost(ticks=5, saved=3, grad=1, peak=4)
    >>> one.then(one)
    Cost(ticks=10, held=0, saved=6, grad=2, peak=7)
    """

    ticks: int = 0
    held: int = 0
    saved: int = 0
    grad: int = 0
    peak: int = 0

    def then(self, behind: Cost) -> Cost:
        """This stretch, then ``behind`` it: what this saved stands while that runs, and
        that one's gradients stand while this one's backward half runs."""
        return Cost(
            self.ticks + behind.ticks,
            self.held + behind.held,
            self.saved + behind.saved,
            self.grad + behind.grad,
            max(self.saved + behind.peak, behind.grad + self.peak),
        )

    @property
    def most_bytes(self) -> int:
        """What the stretch needs at its worst moment."""
        return self.held + self.peak

    def no_worse(self, other: Cost) -> bool:
        """Whether every number is at most that of ``other``."""
        return (
            self.ticks <= other.ticks
            and self.held <= other.held
            and self.saved <= other.saved
            and self.grad <= other.grad
            and self.peak <= other.peak
        )


Frontier = tuple[tuple[Cost, Picks], ...]
"""The ways through a stretch that no other way is no worse than, fastest first."""


def frontier(ways: Sequence[tuple[Cost, Picks]]) -> Frontier:
    """The undominated of ``ways``; of equal costs the one that picks a segment's later
    options earlier.

    >>> fast, small, bad = Cost(1, peak=9), Cost(5, peak=2), Cost(6, peak=3)
    >>> [cost.ticks for cost, _ in frontier([(bad, ()), (small, ()), (fast, ())])]
    [1, 5]
    """
    best: dict[Cost, Picks] = {}
    for cost, picks in ways:
        best[cost] = max(best.get(cost, picks), picks)
    in_order = sorted(best, key=_numbers)
    differ = {(cost.held, cost.grad) for cost in best}
    kept = _stairs(in_order) if len(differ) <= 1 else _undominated(in_order)
    return tuple((cost, best[cost]) for cost in kept)


def _numbers(cost: Cost) -> tuple[int, int, int, int, int]:
    return cost.ticks, cost.held, cost.saved, cost.grad, cost.peak


def _undominated(costs: Sequence[Cost]) -> list[Cost]:
    kept: list[Cost] = []
    for cost in costs:
        if not any(other.no_worse(cost) for other in kept):
            kept.append(cost)
    return kept


def _stairs(costs: Sequence[Cost]) -> list[Cost]:
    """:func:`_undominated` of costs that hold and leave the same, in n log n.

    Of those before it, none is slower: what counts is the smallest peak among those
    that save no more. These form stairs: ever more saved, ever smaller peaks.
    """
    kept: list[Cost] = []
    saved: list[int] = []
    peaks: list[int] = []
    for cost in costs:
        at = bisect_right(saved, cost.saved)
        if at and peaks[at - 1] <= cost.peak:
            continue
        kept.append(cost)
        if at and saved[at - 1] == cost.saved:
            at -= 1
        end = at
        while end < len(peaks) and peaks[end] >= cost.peak:
            end += 1
        saved[at:end], peaks[at:end] = [cost.saved], [cost.peak]
    return kept


def options(costs: Sequence[Cost]) -> Frontier:
    """One segment: an option is its place among ``costs``."""
    return frontier([(cost, (i,)) for i, cost in enumerate(costs)])


def joined(first: Frontier, behind: Frontier, limit_bytes: int) -> Frontier:
    """Every way through one stretch with every way through the next.

    What alone needs more than ``limit_bytes`` can be part of nothing that fits.
    """
    ways = []
    for a, left in first:
        for b, right in behind:
            cost = a.then(b)
            if cost.most_bytes <= limit_bytes:
                ways.append((cost, left + right))
    return frontier(ways)


def repeated(one: Frontier, times: int, limit_bytes: int) -> Frontier:
    """``times`` equal stretches in a row, in logarithmically many joins."""
    found: Frontier = ((Cost(), ()),)
    while times:
        if times & 1:
            found = joined(found, one, limit_bytes)
        times >>= 1
        if times:
            one = joined(one, one, limit_bytes)
    return found


def fastest(segments: Sequence[Sequence[Cost]], limit_bytes: int) -> Picks | None:
    """The option of every segment, so that all is as fast as can be within a limit.

    Equal neighbours are solved once. None where nothing fits.

    >>> fastest([[Cost(1, saved=4, peak=4), Cost(2, peak=4)]] * 3, 8)
    (1, 0, 0)
    """
    ways: Frontier = ((Cost(), ()),)
    place = 0
    while place < len(segments):
        end = place + 1
        while end < len(segments) and segments[end] == segments[place]:
            end += 1
        run = repeated(options(segments[place]), end - place, limit_bytes)
        ways = joined(ways, run, limit_bytes)
        place = end
    return ways[0][1] if ways else None
