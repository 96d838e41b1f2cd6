"""What an op sends of itself.

Collectives stand between ops, as moves of values. Two kinds of factors are exceptions:
their ops hand shards, or edges of shards, to other devices while they work.

- Around a ring (:data:`rhino_jax.ir.factors.RING`) what is ``handed`` leaves each
  device for the next one ``n - 1`` times. So is what is ``returned``, as it is
  accumulated, and once more, rounded, to be at home again.
- Of a window (:data:`rhino_jax.ir.factors.WINDOW`) every device sends the last elements
  of its block to the next one and the first to the one before, once. Where several
  dimensions are split the later ones send what came along the earlier: corners.

A ``shard_map`` of the user's holds collectives that nobody has planned
(:mod:`rhino_jax.cost.manual`). And a product may do a gather or scatter beside it by
itself (:func:`turn_of`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rhino_jax.cost.halo import edges
from rhino_jax.cost.instructions import Instruction
from rhino_jax.cost.manual import sent_by
from rhino_jax.cost.reshard import local_bytes
from rhino_jax.ir.factors import HANDING, RING, Choice, Factor, Rule, layouts
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Value, accumulator_dtype
from rhino_jax.ir.steps import PERMUTE, Step


@dataclass(frozen=True)
class Handed:
    """One array that is handed on: what a turn sends, and how many turns there are."""

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
    """Every array that an op hands on under a choice; nothing where it is whole."""
    split = [f for f in rule.factors if f.kind in HANDING and choice.on(f.name)]
    if not split:
        return
    for factor in split:
        if factor.kind == RING:
            yield from _around(factor, rule, choice, reads, makes, mesh)
    for edge in edges(rule, choice, reads, mesh):
        wanted = layouts(rule, choice)[0][edge.halo.operand]
        axes = mesh.in_order(split.axis for split in choice.on(edge.factor))
        for count in (edge.halo.before, edge.halo.behind):
            if count:
                sent = math.ceil(count * edge.item_bytes)
                step = Step(PERMUTE, axes, wanted, wanted, sent)
                yield Handed(reads[edge.halo.operand], step, 1)


def _around(
    factor: Factor,
    rule: Rule,
    choice: Choice,
    reads: Sequence[Value],
    makes: Sequence[Value],
    mesh: Mesh,
) -> Iterator[Handed]:
    axes = tuple(split.axis for split in choice.on(factor.name))
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

    >>>     >>> rows, mesh = Layout.of([("x", 2)]), Mesh.of(x=4)
    >>> step = Step("all-gather", ("x",), rows, Layout.replicated(1), 24)
    >>> one, turns = turn_of(step, mesh)
    >>> one.kind, one.wire_bytes, turns
    ('collective-permute', 8, 3)
    """
    turns = mesh.group_size(step.axes) - 1
    return replace(step, kind=PERMUTE, wire_bytes=step.wire_bytes // turns), turns


def handed_by(one: Instruction, mesh: Mesh) -> Iterator[Handed]:
    """What an instruction sends by itself, or as the user wrote it."""
    if one.op is None or one.rule is None or one.step is not None:
        return
    reads, makes = one.program.operand_values(one.op), one.program.result_values(one.op)
    yield from handed_on(one.rule, one.plan.choice, reads, makes, mesh)
    for value, step in sent_by(one.op, reads, makes, mesh):
        yield Handed(value, step, 1)
