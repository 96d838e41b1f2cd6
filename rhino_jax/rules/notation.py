"""How the families write rules: dimensions as tuples of factor names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rhino_jax.ir.factors import Dims, Factor, Flow, Rule
from rhino_jax.ir.program import Op, Value

RuleFn = Callable[[Op, Sequence[Value], Sequence[Value]], Rule]
"""(op, values it reads, values it makes) -> the op's rule."""


def names(prefix: str, count: int) -> tuple[str, ...]:
    """``count`` factor names: ``names("i", 2) == ("i0", "i1")``."""
    return tuple(f"{prefix}{n}" for n in range(count))


def plain(factors: Iterable[str]) -> Dims:
    """One factor a dimension."""
    return tuple((name,) for name in factors)


def elementwise(
    reads: Sequence[Value], makes: Sequence[Value], flows: Sequence[Flow] = ()
) -> Rule:
    """Every dimension a parallel factor of its own.

    Scalars take no part, nor do dimensions of size 1 that stretch over the result's.
    """
    shape = makes[0].shape if makes else reads[0].shape
    letters = names("i", len(shape))

    def dims(value: Value) -> Dims:
        if not value.shape:
            return ()
        return tuple(
            (name,) if n == size else ()
            for name, n, size in zip(letters, value.shape, shape, strict=True)
        )

    return Rule(
        tuple(Factor(n, size) for n, size in zip(letters, shape, strict=True)),
        tuple(dims(value) for value in reads),
        tuple(dims(value) for value in makes),
        tuple(flows),
    )


def whole(reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """The rule of an op that must see its operands whole: every factor blocked."""
    factors: list[Factor] = []

    def dims(values: Sequence[Value], prefix: str) -> tuple[Dims, ...]:
        found = []
        for i, value in enumerate(values):
            letters = names(f"{prefix}{i}_", len(value.shape))
            factors.extend(
                Factor(n, size, "blocked")
                for n, size in zip(letters, value.shape, strict=True)
            )
            found.append(plain(letters))
        return tuple(found)

    operands, results = dims(reads, "x"), dims(makes, "y")
    return Rule(tuple(factors), operands, results)


def sums(*operands: int, results: tuple[int, ...] = (0,)) -> Flow:
    """A flow of sums: ``operands`` may be partial together, ``results`` then are."""
    return Flow("sum", operands, results)
