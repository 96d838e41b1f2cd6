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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

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


@dataclass(frozen=True, eq=False)
class Frontier:
    """The ways through a stretch that no other way is no worse than, fastest first.

    ``rows`` are the numbers of each way's :class:`Cost`, ``picks`` the options that it
    takes, a column a segment.
    """

    rows: Array
    picks: Array

    def __iter__(self) -> Iterator[tuple[Cost, Picks]]:
        for row, picks in zip(self.rows.tolist(), self.picks.tolist(), strict=True):
            yield Cost(*row), tuple(picks)

    def __len__(self) -> int:
        return len(self.rows)


NOTHING = Frontier(np.zeros((1, 5), np.int64), np.zeros((1, 0), np.int16))
"""The one way through no segment."""


def frontier(rows: Array, picks: Array) -> Frontier:
    """The undominated of some ways; of equal costs the one that picks a segment's later
    options earlier.

    >>> fast, small, bad = (1, 0, 0, 0, 9), (5, 0, 0, 0, 2), (6, 0, 0, 0, 3)
    >>> picks = np.zeros((3, 0), np.int16)
    >>> [cost.ticks for cost, _ in frontier(np.array([bad, small, fast]), picks)]
    [1, 5]
    """
    if not len(rows):
        return Frontier(rows, picks)
    order = np.lexsort(rows.T[::-1])
    first = np.ones(len(rows), bool)
    first[1:] = (rows[order[1:]] != rows[order[:-1]]).any(axis=1)
    groups = np.split(order, np.nonzero(first)[0][1:]) if not first.all() else ()
    order = order[first]
    for n, group in enumerate(groups):
        if len(group) > 1:
            order[n] = max(group, key=lambda way: tuple(picks[way]))
    alike = bool((rows[:, (1, 3)] == rows[0, (1, 3)]).all())
    kept = order[(_stairs if alike else _compared)(rows[order])]
    return Frontier(rows[kept], picks[kept])


def _compared(rows: Array) -> list[int]:
    """Those of different rows, fastest first, that none before is no worse than."""
    kept: list[int] = []
    for i, row in enumerate(rows):
        if not (rows[kept] <= row).all(axis=1).any():
            kept.append(i)
    return kept


def _stairs(rows: Array) -> list[int]:
    """:func:`_compared` of rows that hold and leave the same, in n log n.

    Of those before it, none is slower: what counts is the smallest peak among those
    that save no more. These form stairs: ever more saved, ever smaller peaks.
    """
    kept: list[int] = []
    stair: list[int] = []
    peaks: list[int] = []
    for i, (saved, peak) in enumerate(rows[:, (2, 4)].tolist()):
        at = bisect_right(stair, saved)
        if at and peaks[at - 1] <= peak:
            continue
        kept.append(i)
        if at and stair[at - 1] == saved:
            at -= 1
        end = at
        while end < len(peaks) and peaks[end] >= peak:
            end += 1
        stair[at:end], peaks[at:end] = [saved], [peak]
    return kept


def options(costs: Sequence[Cost]) -> Frontier:
    """One segment: an option is its place among ``costs``."""
    rows = [(c.ticks, c.held, c.saved, c.grad, c.peak) for c in costs]
    picks = np.arange(len(costs), dtype=np.int16)[:, None]
    return frontier(np.array(rows, np.int64), picks)


def joined(first: Frontier, behind: Frontier, limit_bytes: int) -> Frontier:
    """Every way through one stretch with every way through the next.

    What alone needs more than ``limit_bytes`` can be part of nothing that fits.
    """
    ahead, after = first.rows[:, None], behind.rows[None]
    rows = ahead + after  # as Cost.then
    saved, peak, grad = ahead[..., 2], ahead[..., 4], after[..., 3]
    rows[..., 4] = np.maximum(saved + after[..., 4], grad + peak)
    i, k = np.nonzero(rows[..., 1] + rows[..., 4] <= limit_bytes)
    picks = np.concatenate((first.picks[i], behind.picks[k]), axis=1)
    return frontier(rows[i, k], picks)


def repeated(one: Frontier, times: int, limit_bytes: int) -> Frontier:
    """``times`` equal stretches in a row, in logarithmically many joins."""
    found = NOTHING
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
    ways = NOTHING
    place = 0
    while place < len(segments):
        end = place + 1
        while end < len(segments) and segments[end] == segments[place]:
            end += 1
        run = repeated(options(segments[place]), end - place, limit_bytes)
        ways = joined(ways, run, limit_bytes)
        place = end
    return tuple(ways.picks[0].tolist()) if len(ways) else None
