"""Assignments as plain data, for JSON, and back."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from rhino_jax.ir.assignment import Assignment, Loop, OpPlan
from rhino_jax.ir.factors import parse_choice
from rhino_jax.ir.layout import parse_layout
from rhino_jax.ir.staged import Staged
from rhino_jax.ir.steps import Move, Step


def assignment_data(assignment: Assignment) -> dict[str, Any]:
    """Everything in an Assignment as numbers, strings, lists and dictionaries."""
    data: dict[str, Any] = {
        "inputs": [str(x) for x in assignment.inputs],
        "outputs": [str(y) for y in assignment.outputs],
        "ops": [_op_data(op) for op in assignment.ops],
        "final": [_move_data(m) for m in assignment.final],
    }
    if assignment.loop:
        loop = assignment.loop
        leave = [_move_data(m) for m in loop.leave]
        data["loop"] = {"ops": list(loop.ops), "trips": loop.trips, "leave": leave}
    return data


def assignment_of(data: Any) -> Assignment:
    """The inverse of :func:`assignment_data`."""
    return Assignment(
        tuple(parse_layout(x) for x in data["inputs"]),
        tuple(parse_layout(y) for y in data["outputs"]),
        tuple(_op(op) for op in data["ops"]),
        tuple(_move(m) for m in data["final"]),
        _loop(data["loop"]) if "loop" in data else None,
    )


def _loop(data: Any) -> Loop:
    leave = tuple(_move(m) for m in data["leave"])
    return Loop(tuple(data["ops"]), data["trips"], leave)


def _op_data(op: OpPlan) -> dict[str, Any]:
    """Only what is not the default, so that a plan stays readable."""
    data: dict[str, Any] = {"choice": str(op.choice)}
    if op.before:
        data["before"] = [_move_data(m) for m in op.before]
    if op.after:
        data["after"] = [_move_data(m) for m in op.after]
    if op.inner:
        data["inner"] = [assignment_data(a) for a in op.inner]
    if op.note:
        data["note"] = op.note
    if op.staged:
        data["staged"] = list(astuple(op.staged))
        data["handed"] = [_move_data(m) for m in op.handed]
    return data


def _op(data: Any) -> OpPlan:
    return OpPlan(
        parse_choice(data["choice"]),
        tuple(_move(m) for m in data.get("before", ())),
        tuple(_move(m) for m in data.get("after", ())),
        tuple(assignment_of(a) for a in data.get("inner", ())),
        data.get("note", ""),
        Staged(*data["staged"]) if "staged" in data else None,
        tuple(_move(m) for m in data.get("handed", ())),
    )


def _move_data(move: Move) -> list[Any]:
    steps = [[s.kind, list(s.axes), str(s.target), s.wire_bytes] for s in move.steps]
    again = [move.again] if move.again or move.within else []
    within = [move.within] if move.within else []
    return [move.value, str(move.source), steps, *again, *within]


def _move(data: Any) -> Move:
    value, source, steps, *more = data
    again = bool(more and more[0])
    within = more[1] if len(more) > 1 else ""
    first = now = parse_layout(source)
    found = []
    for kind, axes, target, sent in steps:
        after = parse_layout(target)
        found.append(Step(kind, tuple(axes), now, after, sent))
        now = after
    return Move(value, first, now, tuple(found), again, within)
