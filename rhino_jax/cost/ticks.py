"""A pipelined scan as one device carries it out: ticks, and in each its own layers.

Beside the loop stand the carry of two microbatches (what came from the stage before,
and what the last tick took in), and what is stacked; in a tick, what a layer holds.
Gradients of weights are added up tick by tick, narrow ones in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rhino_jax.cost.instructions import (
    CONVERT,
    FUSED,
    OPAQUE,
    TAKE,
    Buffer,
    Instruction,
    Unfolded,
)
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary
from rhino_jax.ir.mesh import TIME
from rhino_jax.ir.program import Op, Program, accumulator_dtype
from rhino_jax.ir.steps import Move

if TYPE_CHECKING:
    from rhino_jax.cost.buffers import Unfolding


def pipelined(
    work: Unfolding,
    program: Program,
    op: Op,
    plan: OpPlan,
    reads: tuple[int, ...],
    writes: tuple[int, ...],
    place: int,
) -> None:
    """Emit the loop over ticks of ``op``, which reads and writes these buffers."""
    assert plan.staged is not None
    (body,), carry = op.programs, op.param["num_carry"]
    first = op.param["num_consts"]
    starts = tuple(
        work.new(body, m.value, m.source) for m in (*plan.handed, *plan.handed)
    )
    for start in starts:
        work.emit(Instruction("broadcast_in_dim", FUSED, (), (start,), program, place))
    sums = {k: write for k, write in enumerate(writes) if _is_narrow(op, plan, k)}
    made = [
        _wide(work, program, op, plan, k) if k in sums else write
        for k, write in enumerate(writes)
    ]
    carried = zip(reads[first : first + carry], made, strict=False)
    work.emit(
        Instruction(
            op.kind,
            OPAQUE,
            tuple(dict.fromkeys((*reads, *starts))),
            tuple(made),
            program,
            place,
            op,
            plan,
            bodies=(_tick(work, op, plan),),
            trips=plan.staged.ticks,
            overwrites=tuple(carried),
        )
    )
    for k, own in sums.items():
        work.emit(Instruction(CONVERT, FUSED, (made[k],), (own,), program, place))


def _is_narrow(op: Op, plan: OpPlan, k: int) -> bool:
    """Whether result ``k`` is added up in a wider type than its own."""
    (body,), (inner,) = op.programs, plan.inner
    value = body.values[body.outputs[k]]
    added = inner.outputs[k].operator(TIME) is not None
    return added and accumulator_dtype(value.dtype) != value.dtype


def _wide(work: Unfolding, program: Program, op: Op, plan: OpPlan, k: int) -> int:
    """A buffer for the terms of result ``k``."""
    value = program.values[op.results[k]]
    _, given = boundary(program, op, plan, None)
    size = work.size(value.shape, accumulator_dtype(value.dtype), given[k])
    work.buffers.append(Buffer(op.results[k], size, value.name or f"{value}"))
    return len(work.buffers) - 1


def _tick(work: Unfolding, op: Op, plan: OpPlan) -> Unfolded:
    """One tick: a microbatch through the layers of this stage, and on to the next."""
    (body,), (inner,) = op.programs, plan.inner
    assert plan.staged is not None
    inside = work.inside()
    taken = [inside.new(body, m.value, m.source) for m in plan.handed]
    given = [inside.new(body, m.value, m.source) for m in plan.handed]
    inside.emit(
        Instruction(
            op.kind,
            OPAQUE,
            tuple(taken),
            tuple(given),
            body,
            0,
            op,
            plan,
            bodies=(work.body(op, 0, inner, added_up=True),),
            trips=plan.staged.turns(op.param["length"]),
            overwrites=tuple(zip(taken, given, strict=True)),
        )
    )
    handed = [
        _handed(inside, body, op, move, buffer)
        for move, buffer in zip(plan.handed, given, strict=True)
    ]
    return Unfolded(
        tuple(inside.buffers),
        tuple(inside.instructions),
        tuple(taken),
        tuple(handed),
        tuple((i, i) for i in range(len(taken))),
    )


def _handed(work: Unfolding, body: Program, op: Op, move: Move, buffer: int) -> int:
    (step,) = move.steps
    after = work.new(body, move.value, step.target)
    work.emit(
        Instruction(step.kind, OPAQUE, (buffer,), (after,), body, 0, op, step=step)
    )
    return after


def with_totals(
    work: Unfolding, program: Program, assignment: Assignment, stacked: Sequence[int]
) -> tuple[int, ...]:
    """Of a layer: its stacked results ``stacked`` (buffers), added to what is there."""
    found = []
    first = len(program.outputs) - len(stacked)
    for k, term in enumerate(stacked, first):
        value, layout = program.outputs[k], assignment.outputs[k]
        if layout.operator(TIME) is None:
            found.append(term)
            continue
        stack, total, added = (work.new(program, value, layout) for _ in range(3))
        work.emit(Instruction(TAKE, FUSED, (stack,), (total,), program, 0))
        work.emit(Instruction("add", FUSED, (total, term), (added,), program, 0))
        found.append(added)
    return tuple(found)
