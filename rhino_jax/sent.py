"""What a plan sends: collectives that it writes, and those that ops do themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rhino_jax.cost.handed import handed_on, turn_of
from rhino_jax.cost.manual import sent_by
from rhino_jax.ir.assignment import Assignment, Loop, OpPlan, trips_of, whole
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.ir.steps import Move, Step
from rhino_jax.rules import rule_of


@dataclass(frozen=True)
class Collective:
    """One collective of the compiled program.

    ``wire_bytes`` is what each device sends each time; ``count`` how often in a step
    (trip counts of loops multiplied out). ``where`` is the user's source line and
    ``phase`` the name stack it was written under.
    """

    kind: str
    axes: tuple[str, ...]
    wire_bytes: int
    count: int
    dtype: str
    shape: tuple[int, ...]
    where: str
    phase: str = ""

    @property
    def total_bytes(self) -> int:
        return self.wire_bytes * self.count


def collectives(
    program: Program, assignment: Assignment, mesh: Mesh, count: int = 1
) -> Iterator[Collective]:
    """Every collective that the plan writes, all loops multiplied out.

    All branches of a ``cond`` are counted; a ``while`` counts as one trip.
    """
    mesh = assignment.over(mesh)
    loop = assignment.loop or Loop((), 1)
    inside = set(loop.ops)
    for index, (op, plan) in enumerate(zip(program.ops, assignment.ops, strict=True)):
        turns = count * (loop.trips if index in inside else 1)
        for move in plan.before:
            yield from _of_move(program, move, op, mesh, turns)
        for inner, body in zip(op.programs, plan.inner, strict=True):
            yield from collectives(inner, body, mesh, turns * trips_of(op, plan))
            for move in plan.handed:
                assert plan.staged is not None
                yield from _of_move(inner, move, op, mesh, turns * plan.staged.ticks)
        if not op.programs:
            yield from _of_op(program, op, plan, mesh, turns)
        if op.local is not None:
            yield from collectives(op.local, whole(op.local), mesh, turns)
        for move in plan.after:
            yield from _of_move(program, move, op, mesh, turns)
    for move in (*loop.leave, *assignment.final):
        yield from _of_move(program, move, _maker(program, move.value), mesh, count)


def _maker(program: Program, value: int) -> Op | None:
    made = program.producer.get(value)
    return None if made is None else program.ops[made]


def _of_op(
    program: Program, op: Op, plan: OpPlan, mesh: Mesh, count: int
) -> Iterator[Collective]:
    """What an op sends of itself."""
    reads, makes = program.operand_values(op), program.result_values(op)
    rule = rule_of(program, op)
    for one in handed_on(rule, plan.choice, reads, makes, mesh):
        yield _written(one.step, one.value, op, count * one.turns)
    for value, step in sent_by(op, reads, makes, mesh):
        yield _written(step, value, op, count)


def _of_move(
    program: Program, move: Move, op: Op | None, mesh: Mesh, count: int
) -> Iterator[Collective]:
    value = program.values[move.value]
    for step in move.steps:
        if move.within:
            turn, turns = turn_of(step, mesh)
            yield _written(turn, value, op, count * turns)
        elif step.wire_bytes:
            yield _written(step, value, op, count)


def _written(step: Step, value: Value, op: Op | None, count: int) -> Collective:
    return Collective(
        step.kind,
        step.axes,
        step.wire_bytes,
        count,
        value.dtype,
        value.shape,
        str(op.where) if op else "",
        op.where.name_stack if op else "",
    )
