"""Runs of repeating patterns in a sequence: attention, mlp, attention, mlp, ..."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

LONGEST = 24
"""The longest pattern that is looked for."""


def group_repeats(
    items: Sequence[Hashable], longest: int = LONGEST
) -> tuple[tuple[int, int], ...]:
    """Ranges that cover ``items`` in order: each repeat of a pattern is one range.

    From left to right: of the patterns that begin here and occur at least twice in a
    row, the one whose run is longest; of several, the shortest pattern. What begins no
    pattern is a range of its own.

    >>> group_repeats("eAMAMAMh")
    ((0, 1), (1, 3), (3, 5), (5, 7), (7, 8))
    """
    groups: list[tuple[int, int]] = []
    at = 0
    while at < len(items):
        period, count = 1, 1
        for tried in range(1, min(longest, (len(items) - at) // 2) + 1):
            times = _times(items, at, tried)
            if times > 1 and times * tried > period * count:
                period, count = tried, times
        groups += [(at + k * period, at + (k + 1) * period) for k in range(count)]
        at += period * count
    return tuple(groups)


def _times(items: Sequence[Hashable], start: int, period: int) -> int:
    """How often in a row the ``period`` items at ``start`` occur from there."""
    at = start + period
    while at < len(items) and items[at] == items[at - period]:
        at += 1
    return (at - start) // period
