"""Where a dimension may be cut so that its readers can follow.

A fused projection gives a dimension of 3·H that is next split in three, or reshaped
to (3, heads, head size). Cutting it into k contiguous blocks suits neither: the cut
that survives is inside each third, along the heads. Reading forward through the ops
that only move elements tells which factors a dimension is really made of.
"""

from __future__ import annotations

from dataclasses import dataclass

from rhino_jax.ir.factors import PARALLEL, REDUCTION, Dims, Rule, follow
from rhino_jax.ir.layout import Split
from rhino_jax.ir.program import Op, Program
from rhino_jax.rules import HEAVY, rule_of

REACH = 12
"""How many ops away a reader may be and still have a say."""


@dataclass(frozen=True)
class Part:
    """A factor of a dimension: its size, and whether it may be split."""

    size: int
    may_split: bool = True


def parts(
    program: Program, value: int, dim: int, reach: int = REACH
) -> tuple[Part, ...]:
    """The factors of one dimension of ``value``, outermost first, as readers see it."""
    size = program.values[value].shape[dim]
    best: tuple[Part, ...] = (Part(size),)
    if reach == 0:
        return best
    for index in program.uses.get(value, ()):
        op = program.ops[index]
        if op.programs:
            continue
        rule = rule_of(program, op)
        position = op.operands.index(value)
        found: list[Part] = []
        for name in rule.operands[position][dim]:
            factor = rule.factor(name)
            seen = _result_dim(rule, name)
            if seen is None or factor.kind != PARALLEL:
                found.append(Part(factor.size, factor.traits.split))
                continue
            result, place, dims = seen
            if dims[place] == (name,):
                found += parts(program, op.results[result], place, reach - 1)
            else:
                found.append(Part(factor.size))
        if len(found) > len(best) or (len(found) == 1 and not found[0].may_split):
            best = tuple(found)
        if len(best) > 1:
            break
    return best


def _result_dim(rule: Rule, name: str) -> tuple[int, int, Dims] | None:
    for result, dims in enumerate(rule.results):
        for place, dim in enumerate(dims):
            if name in dim:
                return result, place, dims
    return None


def digit(found: tuple[Part, ...], axis: str, size: int) -> Split | None:
    """The outermost digit of ``size`` that lies inside one part that may be split.

    >>> digit((Part(3), Part(16), Part(64)), "t", 4)
    Split(axis='t', stride=256)
    """
    low = 1
    strides = []
    for part in reversed(found):
        strides.append((part, low))
        low *= part.size
    for part, low in reversed(strides):
        if part.may_split and part.size % size == 0:
            return Split(axis, low * part.size // size)
    return None


LONGEST_WALK = 400
"""How many (value, digit) pairs a walk visits before it gives up."""


def ends_in_a_row(
    program: Program,
    value: int,
    dim: int,
    split: Split,
    size: int,
    batch: frozenset[int],
) -> bool:
    """Whether a column split of ``value`` is closed again by a row split.

    The digit is followed forward through every reader, until a weight contracts it.
    A norm that reduces it on the way, a product of two activations that contracts it,
    or an op that can not keep it would each send the activation instead. A digit that
    meets no later weight (the vocabulary of the last layer) may be reduced.

    Args:
        batch: the values that depend on the batch; the others are weights.
    """
    seen = {(value, dim, split)}
    queue = [(value, dim, split)]
    rows = broken = False
    while queue and len(seen) < LONGEST_WALK:
        at, place, digit_ = queue.pop()
        for index in program.uses.get(at, ()):
            op = program.ops[index]
            if "transpose(" in op.where.name_stack:
                continue
            if op.programs:
                broken = True
                continue
            position = op.operands.index(at)
            rule = rule_of(program, op)
            found = follow(rule, rule.operands[position], place, digit_, size)
            if found is None:
                broken = True
                continue
            name, inner = found
            factor = rule.factor(name)
            if not factor.traits.split or factor.kind == REDUCTION:
                row = op.kind in HEAVY and _meets_weight(op, position, batch)
                rows, broken = rows or row, broken or not row
                continue
            for number, dims in enumerate(rule.results):
                for d, names in enumerate(dims):
                    if name in names:
                        stride = inner.stride * rule.weight(names, name)
                        step = (op.results[number], d, Split(split.axis, stride))
                        if step not in seen:
                            seen.add(step)
                            queue.append(step)
    reached = any(
        program.ops[index].kind in HEAVY
        and "transpose(" not in program.ops[index].where.name_stack
        for at, _, _ in seen
        for index in program.uses.get(at, ())
    )
    return not broken if rows or reached else True


def _meets_weight(op: Op, position: int, batch: frozenset[int]) -> bool:
    return any(v not in batch for i, v in enumerate(op.operands) if i != position)
