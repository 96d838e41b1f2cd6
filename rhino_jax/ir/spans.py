"""How a plan writes which segments something is about."""

from __future__ import annotations

from collections.abc import Sequence

EVERY = "*"
"""All segments, scanned layers too, in a plan's remat policies."""


def spans(segments: Sequence[int]) -> str:
    """Numbers in rising order, those that follow one another as one span.

    >>> spans((0, 1, 2, 5)), numbers("0-2,5")
    ('0-2,5', (0, 1, 2, 5))
    """
    found: list[list[int]] = []
    for number in segments:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, span)) for span in found)


def numbers(text: str) -> tuple[int, ...]:
    """What :func:`spans` wrote."""
    ends = [[int(end) for end in span.split("-")] for span in text.split(",")]
    return tuple(n for span in ends for n in range(span[0], span[-1] + 1))


def checked(text: str) -> str:
    """``text`` as :func:`spans` writes it.

    Raises:
        ValueError: it names no segments.
    """
    return text if text == EVERY else spans(numbers(text))
