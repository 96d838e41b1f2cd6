"""Matrix products in groups of rows: the experts of a mixture, one after the other.

Of the three forms of ``ragged_dot_general`` two are split along everything. *Rows in
groups* (``m``): ``bmk,gbkn,g->bmn``, each group of rows with a matrix of its own. Rows
may be split (a shard's groups are as long as its part of them), and so may groups (a
shard answers for the rows of its groups, the others are zero: terms of a sum). *Sums
in groups* (``k``): ``bmk,bkn,g->gbmn``, which is the gradient for the matrices. In the
third form the groups lie along a batch dimension, which stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.ir.factors import (
    BLOCKED,
    INDEXED,
    PARALLEL,
    POSITIONAL,
    REDUCTION,
    Dims,
    Factor,
    Rule,
)
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, names, plain, sums

ROWS, SUMS, BATCH = "rows", "sums", "batch"
GROUP, COUNTS = "g", "c"
"""The factor of the groups, and that of the operand that counts their rows: a shard
must know all of them to tell where its own start."""


@dataclass(frozen=True)
class Numbers:
    """The dimension numbers of a product in groups.

    ``ragged`` is the left dimension along which the groups lie, ``group`` the right
    dimension of the matrices (None unless rows are in groups).
    """

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    ragged: int
    group: int | None

    @staticmethod
    def of(op: Op) -> Numbers:
        given = dict(op.param["ragged_dot_dimension_numbers"])
        contract, batch = given["dot_dimension_numbers"]
        (ragged,) = given["lhs_ragged_dimensions"]
        group = given["rhs_group_dimensions"]
        return Numbers(contract, batch, ragged, group[0] if group else None)

    @property
    def form(self) -> str:
        if self.ragged in self.contract[0]:
            return SUMS
        return BATCH if self.ragged in self.batch[0] else ROWS


def ragged_dot_general(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Batch ``b``, rows ``m``, columns ``n``, summed ``k``, groups ``g``."""
    numbers = Numbers.of(op)
    lhs, rhs, counts = (value.shape for value in reads)
    left, right = _sides(numbers, len(lhs), len(rhs))
    sizes = {n: size for n, size in zip(right, rhs, strict=True)}
    sizes |= {n: size for n, size in zip(left, lhs, strict=True)}
    along = left[numbers.ragged]
    factors = []
    for name, size in sizes.items():
        kind = REDUCTION if name.startswith("k") else PARALLEL
        if name == along and numbers.form != SUMS:
            kind = POSITIONAL if numbers.form == ROWS else BLOCKED
        if name == GROUP:
            kind = INDEXED
        operator = "sum" if kind in (REDUCTION, INDEXED) else ""
        factors.append(Factor(name, size, kind, operator, even=name == GROUP))
    factors.append(Factor(COUNTS, counts[-1], BLOCKED))
    result = [n for n in left if n.startswith("b")]
    result += [n for n in (*left, *right) if n.startswith(("m", "n"))]
    if numbers.form == SUMS:
        factors.append(Factor(GROUP, makes[0].shape[0], POSITIONAL, even=True))
        result.insert(0, GROUP)
    heads = _heads(numbers, left) if len(counts) > 1 else ()
    operands: tuple[Dims, ...] = (plain(left), plain(right), plain((*heads, COUNTS)))
    return Rule(tuple(factors), operands, (plain(result),), (sums(0), sums(1)))


def _sides(
    numbers: Numbers, left_rank: int, right_rank: int
) -> tuple[list[str], list[str]]:
    """The factors of both operands' dimensions."""
    sides: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for letter, pair in (("b", numbers.batch), ("k", numbers.contract)):
        for side, dims in zip(sides, pair, strict=True):
            side.update(zip(dims, names(letter, len(dims)), strict=True))
    if numbers.group is not None:
        sides[1][numbers.group] = GROUP
    for side, rank, letter in ((sides[0], left_rank, "m"), (sides[1], right_rank, "n")):
        rest = [d for d in range(rank) if d not in side]
        side.update(zip(rest, names(letter, len(rest)), strict=True))
    return tuple([side[d] for d in sorted(side)] for side in sides)  # type: ignore[return-value]


def _heads(numbers: Numbers, left: Sequence[str]) -> tuple[str, ...]:
    """The dimensions in front of the counts, where every batch has its own."""
    batch, contract = numbers.batch[0], numbers.contract[0]
    free = [d for d in range(len(left)) if d not in (*batch, *contract)]
    before = {
        ROWS: lambda: (*batch, *free[: free.index(numbers.ragged)]),
        SUMS: lambda: (*batch, *contract[: contract.index(numbers.ragged)]),
        BATCH: lambda: batch[: batch.index(numbers.ragged)],
    }[numbers.form]()
    return tuple(left[d] for d in before)


RULES: Mapping[str, RuleFn] = {"ragged_dot_general": ragged_dot_general}
