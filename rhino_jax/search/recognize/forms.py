"""Polynomials of arrays: what a softmax, its parts and its gradient are made of.

A :data:`Form` is a sum of terms, each a coefficient times powers of *atoms*: a product
of two arrays, an exponential of one, a sum over some dimensions of other terms. With
``E = exp(S - max)`` and ``Z = sum(E)`` the probabilities of a softmax are ``E / Z``;
however its gradient was written, it is ``E dP / Z - E sum(E dP) / Z^2``: factors that a
sum does not run over are drawn out of it, so equal things have one form.

A factor says at which places of the array (:func:`.scopes.places`) its atom's
dimensions lie. Rounding is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

Dims = tuple[int, ...]
Factor = tuple[int, Dims, int]
"""An atom, its places, its power."""
Monomial = tuple[Factor, ...]
Form = tuple[tuple[Monomial, float], ...]
"""Terms and coefficients, sorted; () is zero."""

MOST_TERMS = 8

PRODUCT, HIDDEN, EXP, MAX, SUM = "product", "hidden", "exp", "max", "sum"
Atom = tuple[str, Hashable]
"""Its kind, and what it is of."""


def constant(x: float) -> Form:
    return (((), x),) if x else ()


def value_of(form: Form) -> float | None:
    """The number that a form is; None where it is none."""
    if not form:
        return 0.0
    return form[0][1] if len(form) == 1 and not form[0][0] else None


def _made(terms: Iterable[tuple[Monomial, float]]) -> Form | None:
    found: dict[Monomial, float] = {}
    for monomial, x in terms:
        found[monomial] = found.get(monomial, 0.0) + x
    kept = sorted((m, x) for m, x in found.items() if x)
    return tuple(kept) if len(kept) <= MOST_TERMS else None


def added(one: Form, other: Form, sign: int = 1) -> Form | None:
    return _made((*one, *((m, sign * x) for m, x in other)))


def scaled(form: Form, by: float) -> Form:
    return tuple((m, x * by) for m, x in form) if by else ()


def _joined(factors: Iterable[Factor]) -> Monomial:
    powers: dict[tuple[int, Dims], int] = {}
    for atom, dims, power in factors:
        powers[atom, dims] = powers.get((atom, dims), 0) + power
    return tuple(sorted((*key, n) for key, n in powers.items() if n))


def times(one: Form, other: Form) -> Form | None:
    if len(one) * len(other) > MOST_TERMS:
        return None
    return _made((_joined((*a, *b)), x * y) for a, x in one for b, y in other)


def power(form: Form, n: int) -> Form | None:
    """``form ** n`` of one term."""
    if len(form) != 1:
        return None
    ((monomial, x),) = form
    return ((tuple((atom, dims, n * p) for atom, dims, p in monomial), x**n),)


def moved_to(form: Form, to: Mapping[int, int]) -> Form:
    """The same at other places."""
    return tuple(
        sorted(
            (
                tuple(sorted((a, tuple(to[d] for d in dims), n) for a, dims, n in m)),
                x,
            )
            for m, x in form
        )
    )


def near(one: Form, other: Form) -> bool:
    """Whether two forms are one but for rounding of their coefficients."""
    return len(one) == len(other) and all(
        a == b and math.isclose(x, y, rel_tol=1e-5)
        for (a, x), (b, y) in zip(one, other, strict=True)
    )


@dataclass
class Atoms:
    """Every atom once, known by its number."""

    all: list[Atom] = field(default_factory=list)
    numbers: dict[Atom, int] = field(default_factory=dict)

    def number(self, kind: str, about: Hashable) -> int:
        atom = kind, about
        if atom not in self.numbers:
            self.numbers[atom] = len(self.all)
            self.all.append(atom)
        return self.numbers[atom]

    def kind(self, number: int) -> str:
        return self.all[number][0]

    def summed(self, form: Form, over: Iterable[int], sizes: Dims) -> Form | None:
        """The sum over some places of an array of these sizes."""
        gone = frozenset(over)
        kept = [p for p in range(len(sizes)) if p not in gone]
        to = {p: i for i, p in enumerate(kept)}
        terms = []
        for monomial, x in form:
            inside = [f for f in monomial if not gone.isdisjoint(f[1])]
            outside = [f for f in monomial if gone.isdisjoint(f[1])]
            met = {d for _, dims, _ in inside for d in dims}
            count = math.prod(sizes[p] for p in gone - met)
            factors = [(a, tuple(to[d] for d in dims), n) for a, dims, n in outside]
            if inside:
                factors.append(self._sum(inside, gone, to))
            terms.append((_joined(factors), x * count))
        return _made(terms)

    def _sum(
        self, inside: list[Factor], gone: frozenset[int], to: Mapping[int, int]
    ) -> Factor:
        """Dimensions are numbered as they are first met, so that the same sum in
        another arrangement is one atom."""
        order = dict.fromkeys(d for _, dims, _ in inside for d in dims)
        as_met = {d: i for i, d in enumerate(order)}
        content = tuple((a, tuple(as_met[d] for d in dims), n) for a, dims, n in inside)
        over = tuple(i for d, i in as_met.items() if d in gone)
        atom = self.number(SUM, (content, over))
        return atom, tuple(to[d] for d in order if d not in gone), 1
