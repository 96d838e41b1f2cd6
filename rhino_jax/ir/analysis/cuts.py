"""Places in forward order where few heavy values are alive."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from rhino_jax.ir.analysis.crossings import Crossings, crossings
from rhino_jax.ir.analysis.regions import BACKWARD, FORWARD, RESIDUAL, Regions
from rhino_jax.ir.analysis.weight import heavy_values, is_heavy
from rhino_jax.ir.program import Program

MOST = 4
"""How many heavy values a cut may carry."""


@dataclass(frozen=True)
class Cut:
    """A place before op ``place``, and its frontier.

    The frontier are the heavy values that forward ops before the place make and
    forward ops behind it read, in the order they are made.
    """

    place: int
    frontier: tuple[int, ...]
    num_bytes: int


def forward_ops(regions: Regions) -> tuple[int, ...]:
    """The ops of the forward pass: those before the backward pass begins.

    Metrics that are computed later (an accuracy, after the update) are left out.
    """
    start = next(iter(regions.ops(BACKWARD)), len(regions.of))
    return tuple(i for i in regions.ops(FORWARD, RESIDUAL) if i < start)


def cuts(
    program: Program,
    regions: Regions,
    state: Collection[int],
    heavy: Collection[str],
    most: int = MOST,
) -> tuple[Cut, ...]:
    """The cuts of the forward pass, in order.

    Between one heavy op and the next, the place that fewest heavy values cross is a
    candidate. Of several it is one where fewest of them have a single reader (the end
    of a residual block rather than of the norm behind the last one), then where fewest
    bytes cross, then the last (bias and activation stay with their product). A
    candidate is a cut where no neighbour is crossed by fewer values, and at most
    ``most`` cross it.
    """
    values = heavy_values(program, regions, state, heavy)
    order = forward_ops(regions)
    ahead = [i for i in order if regions.of[i] == FORWARD]
    crossed = crossings(program, values, ahead)
    roots = [
        i
        for i in ahead
        if not regions.batch.isdisjoint(program.ops[i].operands)
        and is_heavy(program.ops[i], heavy)
    ]
    places = _lowest(list(_candidates(crossed, roots)), crossed, most)
    return tuple(
        Cut(place, frontier, crossed.num_bytes[place])
        for place, frontier in zip(places, crossed.at(places), strict=True)
    )


def _candidates(crossed: Crossings, roots: Sequence[int]) -> Iterator[int]:
    """The best place before the first root (if any is crossed), and between roots."""
    start = 0
    for root in roots:
        places = [i for i in range(start + 1, root + 1) if start or crossed.count[i]]
        if places:
            yield min(
                places,
                key=lambda i: (
                    crossed.count[i],
                    crossed.single[i],
                    crossed.num_bytes[i],
                    -i,
                ),
            )
        start = root


def _lowest(candidates: Sequence[int], crossed: Crossings, most: int) -> list[int]:
    """Those that no neighbour undercuts, and that ``most`` or fewer values cross."""
    counts = [inf, *(crossed.count[i] for i in candidates), inf]
    return [
        place
        for k, place in enumerate(candidates, 1)
        if counts[k] <= min(most, counts[k - 1], counts[k + 1])
    ]
