"""What an op sends of itself.

Collectives stand between ops, as moves of values. There are two exceptions. An op with
a ring hands shards on while it works (:data:`rhino_jax.ir.factors.RING`): what is
``handed`` leaves each device for the next one ``n - 1`` times, and so does what is
``returned``, as it is accumulated, and once more, rounded, to be at home again. And a
``shard_map`` of the user's holds collectives that nobody has planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rhino_jax.cost.instructions import Instruction
from rhino_jax.cost.reshard import local_bytes, sent_bytes
from rhino_jax.ir.factors import RING, Choice, Rule, layouts
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Value, accumulator_dtype
from rhino_jax.ir.steps import ALL_GATHER, COLLECTIVES, PERMUTE, Step, named_axes


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


def sent_by(
    op: Op, reads: Sequence[Value], makes: Sequence[Value], mesh: Mesh
) -> Iterator[Handed]:
    """What a collective of the user's own sends; ``mesh`` has all axes that it names.

    What it reads is as one device has it; of what is ragged, all is taken to be sent.
    """
    kind = COLLECTIVES.get(op.kind)
    if kind is None:
        return
    axes = mesh.in_order(named_axes(op))
    groups = op.param.get("axis_index_groups")
    size = len(groups[0]) if groups else mesh.group_size(axes)
    for value in makes if kind == ALL_GATHER else reads[:1]:
        sent = sent_bytes(kind, value.num_bytes, size) if size > 1 else 0
        if sent:
            whole = Layout.replicated(len(value.shape))
            yield Handed(value, Step(kind, axes, whole, whole, sent), 1)


def handed_by(one: Instruction, mesh: Mesh) -> Iterator[Handed]:
    """What an instruction sends by itself: around a ring, or as the user wrote it."""
    if one.op is None or one.rule is None or one.step is not None:
        return
    reads, makes = one.program.operand_values(one.op), one.program.result_values(one.op)
    yield from handed_on(one.rule, one.plan.choice, reads, makes, mesh)
    yield from sent_by(one.op, reads, makes, mesh)
