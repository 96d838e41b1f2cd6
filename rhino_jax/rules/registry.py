"""The table of all rules, merged from the families."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from rhino_jax.errors import RuleError
from rhino_jax.ir.factors import Rule
from rhino_jax.ir.program import Op, Program
from rhino_jax.rules import (
    assembly,
    contraction,
    convolution,
    elementwise,
    indexing,
    linalg,
    random,
    reduction,
    shape,
    sorting,
)
from rhino_jax.rules.notation import RuleFn, whole

FAMILIES: tuple[ModuleType, ...] = (
    elementwise,
    contraction,
    convolution,
    reduction,
    shape,
    assembly,
    sorting,
    random,
    indexing,
    linalg,
)

HEAVY = frozenset(
    ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
)
"""Primitives whose cost is arithmetic, not memory: the roots of cones."""


def _merged() -> Mapping[str, RuleFn]:
    table: dict[str, RuleFn] = {}
    for family in FAMILIES:
        for kind, rule in family.RULES.items():
            assert kind not in table, f"two rules for {kind!r}"
            table[kind] = rule
    return table


RULES: Mapping[str, RuleFn] = _merged()


def rule_of(program: Program, op: Op) -> Rule:
    """The rule of ``op``; of one that no family knows, that it must run whole.

    Raises :class:`RuleError` when a family's rule does not fit the op's shapes, which
    is a fault of the rule.
    """
    reads, makes = program.operand_values(op), program.result_values(op)
    if op.kind not in RULES:
        return whole(reads, makes)
    rule = RULES[op.kind](op, reads, makes)
    found = rule.problems([v.shape for v in reads], [v.shape for v in makes])
    if found:
        raise RuleError(f"rule of {op.kind}: " + "; ".join(found))
    return rule
