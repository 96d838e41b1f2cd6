"""Matrix products: batch, free and contracted dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, names, plain, sums


def dot_general(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """``b.. m.. k.., b.. n.. k.. -> b.. m.. n..``, with k summed."""
    (lhs_k, rhs_k), (lhs_b, rhs_b) = op.param["dimension_numbers"]
    lhs, rhs = reads
    total = "or" if makes[0].dtype == "bool" else "sum"
    factors: dict[str, Factor] = {}
    sides: list[dict[int, str]] = [{}, {}]
    for name, left, right in (
        *zip(names("b", len(lhs_b)), lhs_b, rhs_b, strict=True),
        *zip(names("k", len(lhs_k)), lhs_k, rhs_k, strict=True),
    ):
        sides[0][left] = sides[1][right] = name
        summed = name.startswith("k")
        kind, operator = ("reduction", total) if summed else ("parallel", "")
        factors[name] = Factor(name, lhs.shape[left], kind, operator)
    free: list[str] = []
    for side, value, letter in ((0, lhs, "m"), (1, rhs, "n")):
        rest = [d for d in range(len(value.shape)) if d not in sides[side]]
        for name, dim in zip(names(letter, len(rest)), rest, strict=True):
            sides[side][dim] = name
            factors[name] = Factor(name, value.shape[dim])
            free.append(name)
    operands = tuple(
        plain(side[d] for d in range(len(value.shape)))
        for side, value in zip(sides, reads, strict=True)
    )
    result = plain((*names("b", len(lhs_b)), *free))
    return Rule(tuple(factors.values()), operands, (result,), (sums(0), sums(1)))


RULES: Mapping[str, RuleFn] = {"dot_general": dot_general}
