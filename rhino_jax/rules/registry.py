"""The table of all rules, merged from the families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

from rhino_jax.errors import RuleError
from rhino_jax.ir.factors import Flow, Rule
from rhino_jax.ir.program import Op, Plain, Program, Value
from rhino_jax.rules import (
    assembly,
    attention,
    contraction,
    convolution,
    effects,
    elementwise,
    indexing,
    kernels,
    linalg,
    manual,
    placing,
    ragged,
    random,
    reduction,
    shape,
    sorting,
)
from rhino_jax.rules.notation import RuleFn, whole
from rhino_jax.rules.stated import rule_in, stated_in

FAMILIES: tuple[ModuleType, ...] = (
    elementwise,
    contraction,
    attention,
    ragged,
    convolution,
    reduction,
    shape,
    assembly,
    sorting,
    random,
    indexing,
    linalg,
    manual,
    kernels,
    placing,
    effects,
)

HEAVY = frozenset(
    (
        *("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"),
        *attention.RULES,
    )
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
    values = program.values
    return _rule(
        op.kind,
        op.params,
        tuple(
            (v.shape, v.dtype, v.literal) for v in map(values.__getitem__, op.operands)
        ),
        tuple(
            (v.shape, v.dtype, v.literal) for v in map(values.__getitem__, op.results)
        ),
    )


WHOLE = "no rule: run whole"


def note_of(op: Op) -> str:
    """What a plan says of an op that no family knows; "" of all others."""
    stated = stated_in(op)
    if stated is not None:
        return f"planned by {stated.origin}: {stated.text}"
    return "" if op.kind in RULES else WHOLE


def _that_adds_up(rule: Rule, reads: Sequence[Value]) -> Rule:
    """``rule`` without the flows of what has no such terms.

    Truth values have no sums, complex numbers no maxima, random keys neither.
    """

    def may(flow: Flow) -> bool:
        dtypes = [reads[i].dtype for i in flow.operands if i < len(reads)]
        none = {"sum": ("bool", "key<"), "max": ("complex", "key<")}
        wrong = none.get(flow.operator, none["max"])
        return not any(dtype.startswith(wrong) for dtype in dtypes)

    flows = tuple(flow for flow in rule.flows if may(flow))
    return rule if flows == rule.flows else replace(rule, flows=flows)


Typed = tuple[tuple[int, ...], str, Any]
"""What a rule may read of a value: its shape, its dtype, a literal's number."""


def _typed(value: Value) -> Typed:
    return value.shape, value.dtype, value.literal


@lru_cache(maxsize=100_000)
def _rule(
    kind: str,
    params: tuple[tuple[str, Plain], ...],
    operands: tuple[Typed, ...],
    results: tuple[Typed, ...],
) -> Rule:
    reads = tuple(Value(shape, dtype, literal=n) for shape, dtype, n in operands)
    makes = tuple(Value(shape, dtype, literal=n) for shape, dtype, n in results)
    op = Op(kind, (), (), params)
    stated = stated_in(op)
    if stated is not None:
        return rule_in(stated, reads, makes)
    if kind not in RULES:
        return whole(reads, makes)
    rule = _that_adds_up(RULES[kind](op, reads, makes), reads)
    found = rule.problems([v.shape for v in reads], [v.shape for v in makes])
    if found:
        raise RuleError(f"rule of {kind}: " + "; ".join(found))
    return rule
