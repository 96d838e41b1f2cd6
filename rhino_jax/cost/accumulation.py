"""The loop over microbatches as one device carries it out.

Its body's ops are ops of the Program itself; its carries are the accumulators, narrow
ones in float32. What compilers make ready ahead of the loop is in
:mod:`rhino_jax.cost.ahead`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rhino_jax.cost.ahead import batches_ahead, tables_ahead
from rhino_jax.cost.instructions import (
    ACCUMULATE,
    CONVERT,
    FUSED,
    OPAQUE,
    ZEROS,
    Buffer,
    Instruction,
    Unfolded,
    with_stores,
)
from rhino_jax.cost.simplify import looked_up, simplified
from rhino_jax.ir.assignment import Assignment, Loop
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TIME
from rhino_jax.ir.program import Program, accumulator_dtype
from rhino_jax.ir.steps import Move

if TYPE_CHECKING:
    from rhino_jax.cost.buffers import Frame, Unfolding


def accumulated(
    work: Unfolding, frame: Frame, assignment: Assignment, loop: Loop
) -> None:
    """The loop over microbatches, and the moves with which values leave it."""
    program, place = frame.program, loop.ops[0]
    leaving = [m for m in loop.leave if TIME in m.source.axes or not m.steps]
    sums = [m for m in leaving if m.source.operator(TIME)]
    body, used = _turn(work, frame, assignment, loop, leaving)
    reads = [
        frame.versions[v][layout]
        for at, (v, layout) in zip(body.inputs, used, strict=False)
        if body.readers[at] or at in body.outputs
    ]
    if work.habits.tables_ahead:
        for prepared in (tables_ahead, batches_ahead):
            body, copies = prepared(work, frame, body, used, place)
            reads += copies
    pairs = []
    for move in leaving:
        made = _total(work, program, move, loop.trips)
        if move in sums:
            start = _total(work, program, move, loop.trips)
            zero = move.source.operator(TIME) == "sum"
            kind = ZEROS if zero else "broadcast_in_dim"
            work.emit(Instruction(kind, FUSED, (), (start,), program, place))
            pairs.append((start, made))
        frame.put(move.value, move.target, made)
    starts = tuple(start for start, _ in pairs)
    work.emit(
        Instruction(
            ACCUMULATE,
            OPAQUE,
            tuple(dict.fromkeys((*reads, *starts))),
            tuple(frame.versions[m.value][m.target] for m in leaving),
            program,
            place,
            bodies=(body,),
            trips=loop.trips,
            overwrites=tuple(pairs),
        )
    )
    for move in leaving:
        _narrow(work, frame, move, place)
    for move in loop.leave:
        if move not in leaving:
            made_by = program.ops[program.producer[move.value]]
            work.move(frame, move, place, made_by)


def _total(work: Unfolding, program: Program, move: Move, trips: int) -> int:
    """A buffer for what the loop gives: an accumulator, or all turns' rows."""
    value = program.values[move.value]
    if move.source.operator(TIME):
        dtype = accumulator_dtype(value.dtype)
        size = work.size(value.shape, dtype, move.source)
    else:
        size = trips * work.size(value.shape, value.dtype, move.source)
    work.buffers.append(Buffer(move.value, size, value.name or f"%{move.value}"))
    return len(work.buffers) - 1


def _narrow(work: Unfolding, frame: Frame, move: Move, place: int) -> None:
    """A total in the value's own dtype again."""
    value = frame.program.values[move.value]
    if move.source.operator(TIME) and accumulator_dtype(value.dtype) != value.dtype:
        total = frame.get(move.value, move.target)
        own = work.new(frame.program, move.value, move.target)
        work.emit(
            Instruction(
                CONVERT,
                FUSED,
                (total,),
                (own,),
                frame.program,
                place,
            )
        )
        frame.put(move.value, move.target, own)


def _turn(
    outer: Unfolding,
    frame: Frame,
    assignment: Assignment,
    loop: Loop,
    leaving: list[Move],
) -> tuple[Unfolded, list[tuple[int, Layout]]]:
    """One turn of the accumulation loop, and the versions at hand outside.

    Its inputs are those versions, then the accumulators; these are its outputs too.
    """
    program = frame.program
    work = outer.inside()
    inside = work.enter(program, assignment)
    given, inputs = [], []
    for v, held_as in frame.versions.items():
        at = program.producer.get(v)
        op = None if at is None else program.ops[at]
        for layout in held_as:
            buffer = inside.put(v, layout)
            made = op and Instruction(
                *(op.kind, FUSED, (), (buffer,), program, 0, op),
                known=at is None or work.knows(op, assignment.ops[at]),
            )
            if made and made.constant is not None:  # compilers make it in the loop
                work.emit(made)
                continue
            given.append((v, layout))
            inputs.append(buffer)
    work.ops(inside, assignment, loop.ops)
    outputs, stacked = [], []
    for move in leaving:
        term = inside.get(move.value, move.source)
        if not move.source.operator(TIME):
            stacked.append(term)
            continue
        held, added = (_total(work, program, move, loop.trips) for _ in range(2))
        inputs.append(held)
        outputs.append(added)
        work.emit(
            Instruction(
                "add",
                FUSED,
                (held, term),
                (added,),
                program,
                program.producer[move.value],
            )
        )
    instructions = with_stores(work.instructions, tuple(stacked), program)
    first = len(given)
    same = tuple((first + i, i) for i in range(len(outputs)))
    body = Unfolded(
        tuple(work.buffers),
        instructions,
        tuple(inputs),
        tuple(outputs),
        same,
        tuple(work.pinned),
    )
    if work.habits.tables_ahead:
        body = looked_up(body)
    return simplified(body, work.habits), given
