"""Primitives that must see one dimension whole: sorts, searches, running sums.

All their other dimensions are free. Running sums are linear, and running maxima and
minima let terms of their own kind through.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rhino_jax.ir.factors import Dims, Factor, Flow, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, names, plain, sums


def whole_along(
    axes: Collection[int],
    reads: Sequence[Value],
    makes: Sequence[Value],
    flows: Sequence[Flow] = (),
) -> Rule:
    """``axes`` of the first operand blocked, every other dimension parallel.

    Operands are of one shape, or scalars. Results have the same dimensions, or lack
    ``axes``, or have them with another size.
    """
    shape = reads[0].shape
    letters = names("i", len(shape))
    gone = {axis % len(shape) for axis in axes}
    factors = [
        Factor(n, size, "blocked" if d in gone else "parallel")
        for d, (n, size) in enumerate(zip(letters, shape, strict=True))
    ]
    kept = plain(n for d, n in enumerate(letters) if d not in gone)
    results: list[Dims] = []
    for number, value in enumerate(makes):
        if len(value.shape) < len(shape):
            results.append(kept)
            continue
        dims = list(letters)
        for d in sorted(gone):
            if value.shape[d] != shape[d]:
                dims[d] = f"k{number}_{d}"
                factors.append(Factor(dims[d], value.shape[d], "blocked"))
        results.append(plain(dims))
    operands = tuple(plain(letters) if value.shape else () for value in reads)
    return Rule(tuple(factors), operands, tuple(results), tuple(flows))


def _along(param: str, *flows: Flow) -> RuleFn:
    """The rule of a primitive whose parameter ``param`` names its whole dimensions."""

    def rule(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
        axes = op.param[param]
        axes = (axes,) if isinstance(axes, int) else axes
        return whole_along(axes, reads, makes, flows)

    return rule


RULES: Mapping[str, RuleFn] = {
    "sort": _along("dimension"),
    "top_k": _along("axis"),
    "approx_top_k": _along("reduction_dimension"),
    "argmax": _along("axes"),
    "argmin": _along("axes"),
    "cumsum": _along("axis", sums(0)),
    "cummax": _along("axis", Flow("max", (0,))),
    "cummin": _along("axis", Flow("min", (0,))),
    "cumprod": _along("axis"),
    "cumlogsumexp": _along("axis"),
    "reduce": _along("dimensions"),
    "reduce_prod": _along("axes"),
    "reduce_xor": _along("axes"),
}
