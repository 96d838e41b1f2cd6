"""The choice of one op, found by following the layouts of what it reads.

Axis by axis the candidates are: to do nothing over the axis, to split the factor that
an operand (or the layout wished for a result) already splits, and to let a partial
value flow through. Stationary weights are followed first, the batch before gathered
weights, and among equals the fewest bytes win; ties prefer the split.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from rhino_jax.ir.factors import (
    Choice,
    Rule,
    choice_problems,
    follow,
    layouts,
    manual_choice,
)
from rhino_jax.ir.layout import Dim, Layout, Split, contiguous
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op
from rhino_jax.search.discover import wished_choice
from rhino_jax.search.state import State


@dataclass(frozen=True)
class Candidate:
    """One way to use one axis: the choice with it, and who asked for it."""

    choice: Choice
    operand: int = -1
    is_flow: bool = False


def choose(state: State, op: Op, rule: Rule, data_axes: Sequence[str]) -> Choice:
    """The choice for ``op``, every axis of the mesh decided in turn.

    It depends on what is known of the op's own operands and results, so layers alike
    are decided once; a weight that is still open looks further ahead.
    """
    key = _situation(state, op, data_axes)
    if key is None:
        return _decide(state, op, rule, data_axes)
    if key not in state.decided:
        state.decided[key] = _decide(state, op, rule, data_axes)
    return state.decided[key]


def _situation(state: State, op: Op, data_axes: Sequence[str]) -> Hashable:
    """All that a decision reads; None where it reads more than can be listed."""
    known = []
    for v in op.operands:
        mark = state.mark(v)
        if mark.open:
            return None
        value = state.program.values[v]
        known.append(
            (
                value.shape,
                value.dtype,
                value.literal,
                state.home(v),
                state.stored.get(v),
                mark,
            )
        )
    makes = tuple(
        (state.program.values[v].shape, state.hints.get(v), state.rows.get(v))
        for v in op.results
    )
    return op.kind, op.params, tuple(known), makes, tuple(data_axes)


def _decide(state: State, op: Op, rule: Rule, data_axes: Sequence[str]) -> Choice:
    manual = manual_choice(rule, state.mesh)
    if manual is not None:
        return manual
    choice = _rows_kept(state, op, rule)
    for axis in state.mesh.names:
        if state.mesh.size(axis) == 1 or axis in choice.axes:
            continue
        wished = wished_choice(state, op, rule, choice, axis)
        if wished is not None:
            choice = wished
            continue
        found = _candidates(state, op, rule, choice, axis)
        found = _restricted(state, op, found, axis, axis in data_axes)
        if len(found) > 1:
            found.sort(key=lambda c: _price(state, op, rule, c, axis))
        choice = found[0].choice
    return choice


def _rows_kept(state: State, op: Op, rule: Rule) -> Choice:
    """The choice of an op that cuts a batch into the slices of a scan, to begin with.

    The scanned dimension will be whole, so a split that would fall on it (or across it)
    is handed to the rows of each slice instead: one exchange of rows before the loop.
    """
    found = state.rows.get(op.results[0]) if op.results else None
    value = op.operands[0] if op.operands else -1
    if found is None or not state.mark(value).batch:
        return Choice()
    scanned, rows = found
    dims = rule.operands[0]
    d = next(d for d, names in enumerate(dims) if scanned in names)
    splits = state.home(value).dims[d]
    digits = [follow(rule, dims, d, s, state.mesh.size(s.axis)) for s in splits]
    if all(digit is not None and digit[0] != scanned for digit in digits):
        return Choice()
    size = rule.factor(rows).size
    choice = Choice.of({rows: rows_over(size, (s.axis for s in splits), state.mesh)})
    return Choice() if choice_problems(rule, choice, state.mesh) else choice


def rows_over(size: int, axes: Iterable[str], mesh: Mesh) -> Dim:
    """``size`` rows in blocks over the last of ``axes``, as many as divide them."""
    names = tuple(axes)
    while names and size % mesh.group_size(names):
        names = names[1:]
    return contiguous(size, names, mesh)


def _candidates(
    state: State, op: Op, rule: Rule, choice: Choice, axis: str
) -> list[Candidate]:
    size = state.mesh.size(axis)
    found = [Candidate(choice)]
    seen = {choice}

    def offer(name: str, split: Split, operand: int) -> None:
        new = choice.with_split(name, split)
        if not choice_problems(rule, new, state.mesh):
            if new not in seen or operand >= 0:
                found.append(Candidate(new, operand))
            seen.add(new)

    for i, value in enumerate(op.operands):
        where = state.home(value).find(axis)
        if where and not state.mark(value).free:
            digit = follow(rule, rule.operands[i], *where, size)
            if digit:
                offer(*digit, i)
    for i, value in enumerate(op.results):
        hint = state.hints.get(value)
        where = hint.find(axis) if hint else None
        if where:
            digit = follow(rule, rule.results[i], *where, size)
            if digit and rule.factor(digit[0]).traits.split:
                offer(*digit, -1)
    for number, flow in enumerate(rule.flows):
        flowing = [
            state.home(op.operands[i]).operator(axis) == flow.operator
            for i in flow.operands
        ]
        free = [state.mark(op.operands[i]).free for i in flow.operands]
        if any(flowing) and all(a or b for a, b in zip(flowing, free, strict=True)):
            new = choice.with_flow(axis, number)
            found.append(Candidate(new, flow.operands[0], True))
    return found


def _restricted(
    state: State, op: Op, found: list[Candidate], axis: str, is_data: bool
) -> list[Candidate]:
    """Stationary weights first; a partial value flows; then the batch."""

    def keeps(candidate: Candidate) -> bool:
        if candidate.operand < 0:
            return False
        return axis in state.mark(op.operands[candidate.operand]).keep

    def batch(candidate: Candidate) -> bool:
        if candidate.operand < 0:
            return False
        return state.mark(op.operands[candidate.operand]).batch

    tests = [keeps, lambda c: c.is_flow]
    if is_data:
        tests.append(batch)
    for test in tests:
        some = [c for c in found if test(c)]
        if some:
            return some
    return found


def _price(
    state: State, op: Op, rule: Rule, candidate: Candidate, axis: str
) -> tuple[int, int, str]:
    """Bytes moved over ``axis`` to read the operands and to give the results."""
    wanted, given = layouts(rule, candidate.choice)
    total = 0
    for value, layout in zip(op.operands, wanted, strict=True):
        mark = state.mark(value)
        if not mark.free and axis not in mark.open:
            total += state.reading_bytes(value, layout, axis)
    for value, layout in zip(op.results, given, strict=True):
        goal = state.hints.get(value)
        here = layout.only(axis)
        if goal is not None:
            total += state.cost(value, here, goal.only(axis))
        elif here.partial and not candidate.is_flow:
            total += state.cost(value, here, here.settled())
    split = sum(1 for _, digits in candidate.choice.splits for _ in digits)
    return total, -split, str(candidate.choice)


def hint_layout(
    rule: Rule, result: Layout, index: int, operand: int, mesh_sizes: (dict[str, int])
) -> Layout | None:
    """The layout of an operand that would give a result the layout ``result``."""
    dims = rule.results[index]
    choice = Choice()
    for d, splits in enumerate(result.dims):
        for split in splits:
            digit = follow(rule, dims, d, split, mesh_sizes[split.axis])
            if digit is None:
                return None
            choice = choice.with_split(*digit)
    return layouts(rule, choice)[0][operand].settled()
