"""What an op that runs around a ring sends of itself.

Collectives stand between ops, as moves of values; a ring is the exception: its op hands
shards on while it works (:data:`rhino_jax.ir.factors.RING`). What is ``handed`` leaves
each device for the next one ``n - 1`` times. So is what is ``returned``, as it is
accumulated, and once more, rounded, to be at home again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rhino_jax.cost.instructions import Instruction
from rhino_jax.cost.reshard import local_bytes
from rhino_jax.ir.factors import RING, Choice, Rule, layouts
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Value, accumulator_dtype
from rhino_jax.ir.steps import PERMUTE, Step


@dataclass(frozen=True)
class Handed:
    """One array that goes around: what one turn sends, and how many turns there are."""

    value: Value
    step: Step
    turns: int


def handed_on(
    rule: Rule,
    choice: Choice,
    reads: Sequence[Value],
    makes: Sequence[Value],
    mesh: Mesh,
) -> Iterator[Handed]:
    """Every array that an op hands around under a choice; nothing where it is whole."""
    for factor in rule.factors:
        axes = tuple(split.axis for split in choice.on(factor.name))
        if factor.kind != RING or not axes:
            continue
        wanted, given = layouts(rule, choice)
        count = mesh.group_size(axes)
        around = [(reads[i], wanted[i], count - 1) for i in factor.handed]
        for i in factor.returned:
            terms = replace(makes[i], dtype=accumulator_dtype(makes[i].dtype))
            around += [(terms, given[i], count - 1), (makes[i], given[i], 1)]
        for value, layout, turns in around:
            sent = local_bytes(value.shape, value.dtype, layout, mesh)
            step = Step(PERMUTE, mesh.in_order(axes), layout, layout, sent)
            yield Handed(value, step, turns)


def turn_of(step: Step, mesh: Mesh) -> tuple[Step, int]:
    """What a product sends in one turn of a gather or scatter that it does by itself,
    and how many turns that takes: a shard, once for every other device.

    >>> from rhino_jax.ir.layout import Layout
    >>> rows, mesh = Layout.of([("x", 2)]), Mesh.of(x=4)
    >>> step = Step("all-gather", ("x",), rows, Layout.replicated(1), 24)
    >>> one, turns = turn_of(step, mesh)
    >>> one.kind, one.wire_bytes, turns
    ('collective-permute', 8, 3)
    """
    turns = mesh.group_size(step.axes) - 1
    return replace(step, kind=PERMUTE, wire_bytes=step.wire_bytes // turns), turns


def handed_by(one: Instruction, mesh: Mesh) -> Iterator[Handed]:
    """What an instruction hands around by itself: that of an op with a ring."""
    if one.op is None or one.rule is None or one.step is not None:
        return
    reads, makes = one.program.operand_values(one.op), one.program.result_values(one.op)
    yield from handed_on(one.rule, one.plan.choice, reads, makes, mesh)
