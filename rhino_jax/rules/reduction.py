"""Reductions and cumulative primitives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import Factor, Flow, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, names, plain, sums
from rhino_jax.rules.sorting import whole_along


def _reduce(operator: str) -> RuleFn:
    """Reduced dimensions are reduction factors; terms of the same kind flow on."""

    def rule(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
        shape = reads[0].shape
        gone = {axis % len(shape) for axis in op.param["axes"]}
        letters = names("i", len(shape))
        if operator in ("max", "min") and reads[0].dtype.startswith("complex"):
            # Ordered on one device, but there is no such collective.
            return whole_along(op.param["axes"], reads, makes)
        factors = tuple(
            Factor(n, size, "reduction", operator) if d in gone else Factor(n, size)
            for d, (n, size) in enumerate(zip(letters, shape, strict=True))
        )
        kept = plain(n for d, n in enumerate(letters) if d not in gone)
        flows = (sums(0),) if operator == "sum" else (Flow(operator, (0,)),)
        return Rule(factors, (plain(letters),), (kept,), flows)

    return rule


RULES: Mapping[str, RuleFn] = {
    "reduce_sum": _reduce("sum"),
    "reduce_max": _reduce("max"),
    "reduce_min": _reduce("min"),
    "reduce_and": _reduce("and"),
    "reduce_or": _reduce("or"),
}
