"""What says where an array lies, and changes nothing in it.

Inside a step the plan says so. A sharding constraint of the user's is a pin where its
axes are the plan's (:func:`rhino_jax.search.pins.pin_of`), and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn
from rhino_jax.rules.shape import optimization_barrier

CONSTRAINTS = frozenset(("sharding_constraint", "reshard"))
"""Primitives whose parameter ``spec`` is what the user asks for, on a mesh of ``axes``
(:data:`rhino_jax.rules.manual.AXES`)."""


OPEN = ("*",)
"""What stands in ``spec`` for a dimension that the user leaves open."""


def _identity(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    return optimization_barrier(op, reads, makes)


RULES: Mapping[str, RuleFn] = {
    **dict.fromkeys(sorted(CONSTRAINTS), _identity),
    "device_put": _identity,
    "layout_constraint": _identity,
}
