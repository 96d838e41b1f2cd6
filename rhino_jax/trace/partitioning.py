"""Rules that come with ``custom_partitioning``: Shardy's, in our letters.

``def_partition(..., sharding_rule="i j, j k -> i k")`` says which factors dimensions
are made of, and ``partition`` gives the function that one device then runs. A factor
that all results have is split in blocks; what is to be reduced, permuted or
replicated stays whole, since that function may send what nobody counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rhino_jax.errors import RuleError, problems
from rhino_jax.ir.factors import BLOCKED, TILED, Dims, Factor, Rule
from rhino_jax.rules.manual import PARTITIONED
from rhino_jax.rules.stated import Stated
from rhino_jax.trace.fallback import LETTERS

BATCHING = "…"
"""How JAX writes the leading dimensions of "..." in a mapping, and a number."""


def partitioning_rule(eqn: Any, place: str) -> Stated | None:
    """The rule of a ``custom_partitioning`` op as text.

    None where it has none, where a function of the user's would make one, or where
    nothing could be split by it: then the op is read as what it wraps. ``place`` is the
    file and line of the call.

    Raises:
        RuleError: the rule is of other arrays.
    """
    given = eqn.params.get("sharding_rule")
    if eqn.primitive.name != PARTITIONED or not hasattr(given, "operand_mappings"):
        return None
    operands, results = (
        tuple(map(_dims, mappings, (v.aval.ndim for v in values)))
        for mappings, values in (
            (given.operand_mappings, eqn.invars),
            (given.result_mappings, eqn.outvars),
        )
    )
    sizes = _sizes(eqn, (*operands, *results), given.factor_sizes)
    held = (
        *given.reduction_factors,
        *given.need_replication_factors,
        *given.permutation_factors,
    )
    made = [{n for dim in dims for n in dim} for dims in results]
    read = {n for dims in operands for dim in dims for n in dim}
    free = set.intersection(read, *made) - set(held)
    if len(sizes) > len(LETTERS) or not free:
        return None
    short = dict(zip(sizes, LETTERS, strict=False))
    factors = tuple(
        Factor(short[name], size, TILED if name in free else BLOCKED)
        for name, size in sizes.items()
    )
    rule = Rule(factors, _renamed(operands, short), _renamed(results, short))
    shapes = ([v.aval.shape for v in side] for side in (eqn.invars, eqn.outvars))
    wrong = rule.problems(*shapes)
    if wrong:
        raise RuleError(
            problems(f"{place}: the sharding_rule does not fit its arrays:", wrong)
        )
    return Stated(PARTITIONED, rule.text, tuple((f.name, f.size) for f in factors))


def _dims(mapping: Sequence[Any], rank: int) -> Dims:
    """The factors of each dimension; "..." is as many as there are."""
    dims: list[tuple[str, ...]] = []
    for entry in mapping:
        if isinstance(entry, str) and entry.startswith(BATCHING):
            group = entry.removeprefix(BATCHING) or "0"
            count = rank - len(mapping) + 1
            dims += [(f"{BATCHING}{group}.{d}",) for d in range(count)]
        else:
            dims.append((entry,) if isinstance(entry, str) else tuple(entry))
    return tuple(dims)


def _sizes(
    eqn: Any, sides: Sequence[Dims], given: Mapping[str, int]
) -> Mapping[str, int]:
    """Factor -> size: of a dimension of its own, or as given; else what is left."""
    sizes = dict(given)
    for dims, var in zip(sides, (*eqn.invars, *eqn.outvars), strict=False):
        for dim, n in zip(dims, var.aval.shape, strict=False):
            unknown = [name for name in dim if name not in sizes]
            if len(unknown) == 1:
                sizes[unknown[0]] = n // math.prod(sizes.get(name, 1) for name in dim)
    return sizes


def _renamed(sides: Sequence[Dims], short: Mapping[str, str]) -> tuple[Dims, ...]:
    return tuple(
        tuple(tuple(short[name] for name in dim) for dim in dims) for dims in sides
    )
