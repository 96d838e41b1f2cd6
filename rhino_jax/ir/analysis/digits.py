"""Where the batch lies in a value, as digits of the example's number.

An array may hold its examples along one dimension, or, once reshaped, along parts of
several: 64 examples of 1,024 tokens in 32 groups of 2,048 have five binary digits of
the example's number along the groups and the last one inside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from rhino_jax.ir.factors import Dims, Rule


@dataclass(frozen=True, order=True)
class Digit:
    """``size`` steps of the example's number along one dimension.

    Going ``stride`` elements along dimension ``dim`` goes on by ``of`` examples.
    """

    of: int
    size: int
    dim: int
    stride: int


Place = tuple[Digit, ...]
"""All digits of a value, outermost (largest ``of``) first. Empty: no examples in it."""


@dataclass(frozen=True)
class Share:
    """``size`` steps of the example's number along one factor, as in a Digit."""

    factor: str
    stride: int
    size: int
    of: int

    def clashes(self, other: Share) -> bool:
        """Whether both tell different things of one example or of one element."""
        same_examples = _overlap(self.of, self.size, other.of, other.size)
        same_elements = self.factor == other.factor and _overlap(
            self.stride, self.size, other.stride, other.size
        )
        agree = (
            self.factor == other.factor
            and self.of * other.stride == other.of * self.stride
        )
        return (same_examples or same_elements) and not agree


def _overlap(low: int, size: int, other_low: int, other_size: int) -> bool:
    return low < other_low * other_size and other_low < low * size


def shares(
    rule: Rule, dims: Dims, shape: Sequence[int], place: Place
) -> tuple[Share, ...] | None:
    """``place``, a value's digits, told of the factors of its dimensions.

    None where a digit does not consist of whole parts of factors.
    """
    found = []
    for digit in place:
        low, top = digit.stride, digit.stride * digit.size
        covered = 1
        for name in dims[digit.dim]:
            weight = rule.weight(dims[digit.dim], name)
            size = rule.factor(name).size
            start, stop = max(low, weight), min(top, weight * size)
            if start >= stop:
                continue
            if start % weight or stop % start or start % low:
                return None
            found.append(
                Share(name, start // weight, stop // start, digit.of * (start // low))
            )
            covered *= stop // start
        # A dimension of size 1 that stretches has no factor to tell of.
        if covered != digit.size and shape[digit.dim] > 1:
            return None
    return tuple(found)


def placed(rule: Rule, dims: Dims, told: Iterable[Share]) -> Place:
    """The digits of a value whose factors carry ``told``."""
    known = list(told)
    found = [
        Digit(s.of, s.size, d, s.stride * rule.weight(dim, s.factor))
        for d, dim in enumerate(dims)
        for s in known
        if s.factor in dim
    ]
    return joined(found)


def joined(digits: Iterable[Digit]) -> Place:
    """Digits outermost first; those that continue one another become one.

    >>> joined([Digit(1, 2, 0, 8), Digit(2, 4, 0, 16)])
    (Digit(of=1, size=8, dim=0, stride=8),)
    """
    found: list[Digit] = []
    for digit in sorted(set(digits), reverse=True):
        outer = found[-1] if found else None
        if (
            outer
            and outer.dim == digit.dim
            and outer.of == digit.of * digit.size
            and outer.stride == digit.stride * digit.size
        ):
            size = outer.size * digit.size
            found[-1] = Digit(digit.of, size, digit.dim, digit.stride)
        else:
            found.append(digit)
    return tuple(found)


def clashing(told: Sequence[Share]) -> frozenset[Share]:
    """Those of ``told`` that contradict another."""
    return frozenset(
        share
        for pair in combinations(told, 2)
        if pair[0].clashes(pair[1])
        for share in pair
    )


def common(places: Iterable[Place]) -> Place:
    """The digits that all of ``places`` have: what may be relied on."""
    return joined(frozenset.intersection(*(frozenset(p) for p in places)))


def moved(place: Place, by: int) -> Place:
    """``place`` with every dimension's number raised by ``by``."""
    return tuple(Digit(d.of, d.size, d.dim + by, d.stride) for d in place)


def within(place: Place) -> Place:
    """``place`` of one slice along the first dimension."""
    return moved(tuple(d for d in place if d.dim > 0), -1)


def along_first(place: Place) -> Iterator[Digit]:
    """The digits that lie along the first dimension."""
    return (d for d in place if d.dim == 0)
