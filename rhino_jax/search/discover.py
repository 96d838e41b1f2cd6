"""What a weight wishes: tensor and expert parallel layouts, found from the program.

While a plan is completed with a parameter *open* on an axis, its first heavy reader
decides. Megatron's rule is two lines: where the activation is split over the axis
along the contraction, split the weight there too (row, the product is partial);
where it is not split, split the weight's own free dimension (column), at a digit that
later readers can follow. A table looked up by indices is split along its rows. Experts
are the dimension that a weight, its activation and the product share.
"""

from __future__ import annotations

from rhino_jax.ir.factors import (
    INDEXED,
    Choice,
    Rule,
    choice_problems,
    follow,
)
from rhino_jax.ir.layout import Split
from rhino_jax.ir.program import Op
from rhino_jax.rules import HEAVY
from rhino_jax.search.boundaries import Part, digit, ends_in_a_row, parts
from rhino_jax.search.state import State


def wished_choice(
    state: State, op: Op, rule: Rule, choice: Choice, axis: str
) -> Choice | None:
    """``choice`` with ``axis`` used as an open weight of ``op`` wishes it."""
    is_open = [axis in state.mark(v).open for v in op.operands]
    if not any(is_open) or all(is_open):
        return None
    if "transpose(" in op.where.name_stack:
        # The forward pass decides; what it left whole stays so.
        return None
    if op.kind in HEAVY:
        if axis in state.expert_axes:
            return _shared(state, op, rule, choice, axis, is_open)
        return _followed(state, op, rule, choice, axis, is_open) or _column(
            state, op, rule, choice, axis, is_open
        )
    if op.kind == "gather" and is_open[0] and axis not in state.expert_axes:
        return _rows(state, rule, choice, axis)
    return None


def _shared(
    state: State, op: Op, rule: Rule, choice: Choice, axis: str, is_open: list[bool]
) -> Choice | None:
    """Split the outermost factor that weight, activation and product share."""
    everywhere = [
        {n for dim in dims for n in dim} for dims in (*rule.operands, *rule.results)
    ]
    for factor in rule.factors:
        if all(factor.name in names for names in everywhere):
            return _next_digit(state, rule, choice, factor.name, axis)
    return None


def _followed(
    state: State, op: Op, rule: Rule, choice: Choice, axis: str, is_open: list[bool]
) -> Choice | None:
    size = state.mesh.size(axis)
    for i, value in enumerate(op.operands):
        where = None if is_open[i] else state.home(value).find(axis)
        if where:
            found = follow(rule, rule.operands[i], *where, size)
            if found:
                return _allowed(state, rule, choice.with_split(*found))
    return None


def _column(
    state: State, op: Op, rule: Rule, choice: Choice, axis: str, is_open: list[bool]
) -> Choice | None:
    size = state.mesh.size(axis)
    weight = is_open.index(True)
    others = {
        n
        for i, dims in enumerate(rule.operands)
        if i != weight
        for dim in dims
        for n in dim
    }
    for place, dim in enumerate(rule.results[0]):
        if len(dim) != 1 or dim[0] in others:
            continue
        value = op.results[0]
        found = digit(parts(state.program, value, place), axis, size)
        if found is not None and ends_in_a_row(
            state.program, value, place, found, size, state.batch_values
        ):
            tried = _allowed(state, rule, choice.with_split(dim[0], found))
            if tried is not None:
                return tried
    return None


def _rows(state: State, rule: Rule, choice: Choice, axis: str) -> Choice | None:
    for dim in rule.operands[0]:
        for name in dim:
            if rule.factor(name).kind == INDEXED:
                return _next_digit(state, rule, choice, name, axis)
    return None


def _next_digit(
    state: State, rule: Rule, choice: Choice, name: str, axis: str
) -> Choice | None:
    """The outermost digit of factor ``name`` that no axis has taken yet."""
    low = min((s.stride for s in choice.on(name)), default=rule.factor(name).size)
    found = digit((Part(low),), axis, state.mesh.size(axis))
    if found is None:
        return None
    return _allowed(state, rule, choice.with_split(name, Split(axis, found.stride)))


def _allowed(state: State, rule: Rule, choice: Choice) -> Choice | None:
    return None if choice_problems(rule, choice, state.mesh) else choice
