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
from rhino_jax.cost.manual import sent_by
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


def handed_by(one: Instruction, mesh: Mesh) -> Iterator[Handed]:
    """What an instruction sends by itself: around a ring, or as the user wrote it."""
    if one.op is None or one.rule is None or one.step is not None:
        return
    reads, makes = one.program.operand_values(one.op), one.program.result_values(one.op)
    yield from handed_on(one.rule, one.plan.choice, reads, makes, mesh)
    for value, step in sent_by(one.op, reads, makes, mesh):
        yield Handed(value, step, 1)
