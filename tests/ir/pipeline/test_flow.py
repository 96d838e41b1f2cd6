"""Reading an assignment tells who makes what, and what stays in the loop."""

from __future__ import annotations

from rhino_jax.ir.assignment import Assignment, Loop, OpPlan
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.pipeline.flow import (
    AFTER,
    BEFORE,
    FINAL,
    GIVEN,
    LAST,
    LEAVE,
    LOOP,
    OP,
    ROWS,
    TOTAL,
    flow,
    leaving,
    version_bytes,
)
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.ir.steps import Move
from rhino_jax.rules import rule_of

WHOLE = Layout.replicated(1)
HALF = Layout.of((("d", 4),))
ROW = Layout.of(((TIME, 2),))


def tanh(operand: int, result: int) -> Op:
    return Op("tanh", (operand,), (result,))


def chain(count: int) -> Program:
    """f32[8] -> tanh -> tanh ..."""
    values = tuple(Value((8,), "float32") for _ in range(count + 1))
    return Program(values, (0,), tuple(tanh(i, i + 1) for i in range(count)), (count,))


def along(axis: str, stride: int) -> Choice:
    """``tanh`` with its only dimension split."""
    (factor,) = rule_of(chain(1), chain(1).ops[0]).factors
    return Choice.of({factor.name: (Split(axis, stride),)})


def test_moves_make_versions_that_later_ops_read() -> None:
    program = chain(2)
    there, back = Move(1, WHOLE, HALF, ()), Move(2, HALF, WHOLE, ())
    assignment = Assignment(
        (WHOLE,),
        (WHOLE,),
        (OpPlan(after=(there,)), OpPlan(along("d", 4))),
        final=(back,),
    )
    found = flow(program, assignment, (0,), rule_of)
    first, second, last = found.units
    assert first.reads == (((0, WHOLE), GIVEN),)
    assert first.makes == ((1, WHOLE), (1, HALF))
    assert second.reads == (((1, HALF), 0),)
    assert last.kind == FINAL
    assert last.reads == (((2, HALF), 1),)
    assert [unit.phase for unit in found.units] == [LOOP, AFTER, AFTER]
    assert found.outputs == (((2, WHOLE), 2),)


def test_what_is_made_in_the_loop_leaves_it_by_a_move() -> None:
    """Before, in and after: the rows of op 1, put together for op 2."""
    program = chain(3)
    cut, leave = Move(1, WHOLE, ROW, ()), Move(2, ROW, WHOLE, ())
    assignment = Assignment(
        (WHOLE,),
        (WHOLE,),
        (OpPlan(), OpPlan(along(TIME, 2), before=(cut,)), OpPlan()),
        loop=Loop((1,), 4, (leave,)),
    )
    found = flow(program, assignment, (), rule_of)
    assert [(u.kind, u.index, u.phase) for u in found.units] == [
        (OP, 0, BEFORE),
        (OP, 1, LOOP),
        (LEAVE, 0, AFTER),
        (OP, 2, AFTER),
    ]
    assert found.units[1].reads == (((1, WHOLE), 0),)
    assert found.units[2].reads == (((2, ROW), 1),)
    assert found.units[2].how == ROWS
    assert found.units[3].reads == (((2, WHOLE), 2),)


def test_how_values_leave() -> None:
    total = Layout.of((), partial=[(TIME, "sum")])
    other = Layout.of((), partial=[("d", "sum")])
    assert leaving(Move(0, total, WHOLE, ())) == TOTAL
    assert leaving(Move(0, ROW, WHOLE, ())) == ROWS
    assert leaving(Move(0, WHOLE, WHOLE, ())) == LAST
    step = Move(0, other, WHOLE, (None,))  # type: ignore[arg-type]
    assert leaving(step) == ""


def test_bytes_of_a_part() -> None:
    program = chain(1)
    mesh = Mesh.of(d=2)
    assert version_bytes(program, (0, WHOLE), mesh) == 32
    assert version_bytes(program, (0, HALF), mesh) == 16
