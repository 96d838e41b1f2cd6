"""The step as one manual program: the plan, carried out.

The whole Program runs inside one ``jax.shard_map`` that is manual over every axis of
the mesh. Each op runs on its shard by its local form, in the layout its choice says;
between ops stand the moves of the plan, and there is no other communication. Partial
values are plain local arrays that nobody has summed yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
from jax import lax

from rhino_jax import compat
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary, waited_for, whole
from rhino_jax.ir.factors import Choice, Rule
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import WAITS, Op, Program
from rhino_jax.ir.steps import COLLECTED, Move
from rhino_jax.lower.control import CONTROL
from rhino_jax.lower.local import run_local
from rhino_jax.lower.local.collective_matmul import Around
from rhino_jax.lower.local.shard import Shard
from rhino_jax.lower.pipeline.ticks import Ring
from rhino_jax.lower.reshard import run_move
from rhino_jax.rules import rule_of

Arrays = Sequence[jax.Array]


@dataclass
class Frame:
    """The values of one Program while it runs: each in the layouts it is at hand in."""

    program: Program
    mesh: Mesh
    versions: dict[int, dict[Layout, jax.Array]]

    def put(self, value: int, layout: Layout, array: jax.Array) -> None:
        self.versions.setdefault(value, {})[layout] = array

    def get(self, value: int, layout: Layout) -> jax.Array:
        literal = self.program.values[value].literal
        if literal is not None and layout.partial == ():
            return _literal(self.program, value)
        held = self.versions[value]
        assert layout in held, (
            f"value %{value} is wanted as {layout}, "
            f"at hand as {', '.join(map(str, held))}"
        )
        return held[layout]

    def shard(self, op: Op, rule: Rule, choice: Choice) -> Shard:
        reads, makes = self.program.operand_values(op), self.program.result_values(op)
        return Shard(op, rule, choice, self.mesh, reads, makes)

    def shard_of(self, move: Move, beside: Sequence[int]) -> jax.Array:
        """What a move begins with."""
        source = self.get(move.value, move.source)
        return self._apart(source, move.value, beside) if move.again else source

    def move(self, move: Move, beside: Sequence[int] = ()) -> None:
        source = self.shard_of(move, beside)
        shape = self.program.values[move.value].shape
        self.put(move.value, move.target, run_move(source, shape, move, self.mesh))

    def _apart(self, source: jax.Array, value: int, beside: Sequence[int]) -> jax.Array:
        """``source`` behind a barrier, so that no compiler merges what is done again.

        The barrier waits for another operand of the op that reads it
        (:func:`~rhino_jax.ir.assignment.waited_for`): alone it is seen through.
        """
        at_hand = (v for v in beside if v in self.versions)
        anchor = waited_for(self.program, value, at_hand)
        if anchor is None:
            return lax.optimization_barrier(source)
        held = self.versions[anchor]
        layouts = list(held)
        source, *waited = lax.optimization_barrier((source, *held.values()))
        self.versions[anchor] = dict(zip(layouts, waited, strict=True))
        return source

    def after(
        self, waits: Sequence[int], args: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """``args``, no sooner than the values ``waits`` are there, as they lie now."""
        held = [(v, x) for v in waits for x in self.versions.get(v, {})]
        if not held:
            return args
        arrays = [self.versions[v][x] for v, x in held]
        done = lax.optimization_barrier((*args, *arrays))
        for (v, x), array in zip(held, done[len(args) :], strict=True):
            self.versions[v] = {**self.versions[v], x: array}
        return done[: len(args)]


def _literal(program: Program, value: int) -> jax.Array:
    v = program.values[value]
    return compat.literal(v.literal, v.dtype, v.weak)


def run(
    program: Program, assignment: Assignment, mesh: Mesh, args: Arrays
) -> list[jax.Array]:
    """Run ``program`` on local shards, inside a ``shard_map`` over ``mesh``."""
    assert assignment.loop is None, "microbatches are lower/accumulate's"
    frame = entered(program, assignment, mesh, args)
    run_ops(frame, assignment, range(len(program.ops)))
    return finished(frame, assignment)


def entered(
    program: Program, assignment: Assignment, mesh: Mesh, args: Arrays
) -> Frame:
    """A frame with the inputs of ``program`` at hand."""
    frame = Frame(program, mesh, {})
    for value, layout, array in zip(
        program.inputs, assignment.inputs, args, strict=True
    ):
        frame.put(value, layout, array)
    return frame


def run_ops(frame: Frame, assignment: Assignment, indices: Iterable[int]) -> None:
    """Run some ops, in the order given, each with its moves."""
    for index in indices:
        op = frame.program.ops[index]
        with compat.as_written(op.source):
            _run_op(frame, op, assignment.ops[index])


def finished(frame: Frame, assignment: Assignment) -> list[jax.Array]:
    """The outputs, once every op has run."""
    for move in assignment.final:
        frame.move(move)
    return [
        frame.get(value, layout)
        for value, layout in zip(frame.program.outputs, assignment.outputs, strict=True)
    ]


def _run_op(frame: Frame, op: Op, plan: OpPlan) -> None:
    program = frame.program
    for move in plan.before:
        if not move.within:
            frame.move(move, op.operands)
    rule: Rule | None = None if op.programs else rule_of(program, op)
    wanted, given = boundary(program, op, plan, rule)
    outs: Arrays
    for move in (*plan.before, *plan.after):
        if move.within:
            _run_product(frame, op, plan, move)
            return
    args = tuple(
        frame.get(value, layout)
        for value, layout in zip(op.operands, wanted, strict=True)
    )
    if plan.staged:
        (inner,), (done,) = op.programs, plan.inner
        outs = Ring(op, plan, frame.mesh, partial(_turn, inner, done)).run(args)
    elif rule is None:
        bodies = [
            partial(_body, frame.mesh, inner, done)
            for inner, done in zip(op.programs, plan.inner, strict=True)
        ]
        outs = CONTROL[op.kind](op, bodies, args)
    elif op.local is not None:
        outs = run(op.local, whole(op.local), Mesh(()), args)
    else:
        args = frame.after(op.param.get(WAITS, ()), args)
        outs = run_local(frame.shard(op, rule, plan.choice), args)
    for value, layout, array in zip(op.results, given, outs, strict=True):
        frame.put(value, layout, array)
    for move in plan.after:
        frame.move(move)


def _run_product(frame: Frame, op: Op, plan: OpPlan, within: Move) -> None:
    """A product that gathers an operand, or scatters its result, as it goes."""
    program, (step,) = frame.program, within.steps
    rule = rule_of(program, op)
    wanted, given = boundary(program, op, plan, rule)
    gathers = within in plan.before
    operand = op.operands.index(within.value) if gathers else -1
    args = tuple(
        frame.shard_of(within, op.operands)
        if place == operand
        else frame.get(value, layout)
        for place, (value, layout) in enumerate(zip(op.operands, wanted, strict=True))
    )
    ready = frame.after(op.param.get(WAITS, ()), args)
    around = Around(frame.shard(op, rule, plan.choice), step, operand)
    out, collected = around.run(ready, within.within == COLLECTED)
    (made,), (layout,) = op.results, given
    frame.put(made, layout if gathers else within.target, out)
    if collected is not None:
        frame.put(within.value, within.target, collected)
    for move in plan.after:
        if move is not within:
            frame.move(move)


def _body(
    mesh: Mesh, program: Program, assignment: Assignment, *args: jax.Array
) -> list[jax.Array]:
    return run(program, assignment, mesh, args)


def _turn(
    program: Program, assignment: Assignment, mesh: Mesh, *args: jax.Array
) -> list[jax.Array]:
    return run(program, assignment, mesh, args)
