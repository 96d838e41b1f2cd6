"""What users have split by hand: ``shard_map``, and the collectives inside it.

What the user has split stays so: every mesh axis of a ``shard_map`` is a factor of its
own (:data:`rhino_jax.ir.factors.MANUAL`), which that axis alone may split and must. A
dimension that ``in_specs`` or ``out_specs`` give to axes ``a`` and ``b`` is the product
``(a b x)`` with what one device has of it, ``x``, whole. Axes that a spec does not name
have the value whole, and so have those of the plan that the user's mesh lacks.

Inside, in the op's ``local`` Program, values are shards already and every op runs as it
stands. Its collectives are the user's: nobody plans them, but they are counted.

A ``custom_partitioning`` op brings a rule along (:mod:`rhino_jax.trace.partitioning`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import BLOCKED, MANUAL, Dims, Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.ir.steps import COLLECTIVES
from rhino_jax.rules.notation import RuleFn, whole

SHARD_MAP = "shard_map"
REFUSED = "refused"
"""The parameter that says what in it can not be part of one manual program."""
AXES, MANUAL_AXES, IN_SPECS, OUT_SPECS = "axes", "manual_axes", "in_specs", "out_specs"
"""Parameters that tracing writes: the user's mesh as pairs (axis, size); the axes that
the body knows by name; for every operand and result the axes of each dimension."""

PARTITIONED = "custom_partitioning"
"""An op that comes with a rule, and with what one device runs, of the user's own."""

SILENT = ("axis_index", "pvary")
"""What names an axis and sends nothing."""


def shard_map(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """``(a x)..->(a y)..``: the axes that the specs name, in front of what is held."""
    sizes: Mapping[str, int] = dict(op.param[AXES])
    factors: dict[str, Factor] = {}

    def side(values: Sequence[Value], param: str, prefix: str) -> tuple[Dims, ...]:
        return tuple(
            tuple(
                dim(n, spec[d] if d < len(spec) else (), f"{prefix}{i}.{d}")
                for d, n in enumerate(value.shape)
            )
            for i, (value, spec) in enumerate(zip(values, op.param[param], strict=True))
        )

    def dim(n: int, axes: Sequence[str], held: str) -> tuple[str, ...]:
        factors.update((axis, Factor(axis, sizes[axis], MANUAL)) for axis in axes)
        factors[held] = Factor(held, n // math.prod(sizes[a] for a in axes), BLOCKED)
        return (*axes, held)

    operands, results = side(reads, IN_SPECS, "x"), side(makes, OUT_SPECS, "y")
    return Rule(tuple(factors.values()), operands, results)


def _whole(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    return whole(reads, makes)


RULES: Mapping[str, RuleFn] = {
    SHARD_MAP: shard_map,
    **dict.fromkeys((*COLLECTIVES, *SILENT, PARTITIONED), _whole),
}
