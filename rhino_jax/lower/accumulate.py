"""The accumulation loop: the ops of the loop once for every microbatch.

What the loop needs runs first; then one ``lax.scan`` whose counter is the index along
the time axis; then the rest. Terms of a sum are added up as the turns go by, narrow
floating types in float32. Rows that leave the loop are stacked and put together again,
and of what is the same in every turn the last is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.assignment import Assignment, phases
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.pipeline.flow import leaving as leaves_by
from rhino_jax.ir.program import Program
from rhino_jax.ir.steps import Move
from rhino_jax.lower.manual import Frame, entered, finished, run_ops
from rhino_jax.lower.reshard import Here, put_together
from rhino_jax.lower.totals import COMBINE, empty

Arrays = Sequence[jax.Array]


def run(
    program: Program, assignment: Assignment, mesh: Mesh, args: Arrays
) -> list[jax.Array]:
    """Run a step with microbatches on local shards, inside a ``shard_map``."""
    loop = assignment.loop
    assert loop is not None, "a plan without microbatches"
    before, inside, after = phases(program, loop.ops)
    frame = entered(program, assignment, mesh, args)
    run_ops(frame, assignment, before)
    leaving = [m for m in loop.leave if leaves_by(m)]
    _accumulate(frame, assignment, inside, loop.trips, leaving)
    for move in loop.leave:
        if move not in leaving:
            frame.move(move)
    run_ops(frame, assignment, after)
    return finished(frame, assignment)


def _accumulate(
    frame: Frame,
    assignment: Assignment,
    ops: Sequence[int],
    trips: int,
    leaving: Sequence[Move],
) -> None:
    """Run the loop; ``frame`` then holds what leaves it, out of time."""
    program, mesh = frame.program, frame.mesh
    sums = [m for m in leaving if m.source.operator(TIME)]
    rest = [m for m in leaving if not m.source.operator(TIME)]

    def turn(
        totals: list[jax.Array], number: jax.Array
    ) -> tuple[list[jax.Array], Arrays]:
        held = {v: dict(versions) for v, versions in frame.versions.items()}
        here = Frame(program, Here(mesh.axes, number), held)
        run_ops(here, assignment, ops)
        terms = [here.get(m.value, m.source) for m in sums]
        added = [
            COMBINE[operator_of(m)](total, term.astype(total.dtype))
            for m, total, term in zip(sums, totals, terms, strict=True)
        ]
        return added, [here.get(m.value, m.source) for m in rest]

    start = [empty_total(program, m, mesh) for m in sums]
    totals, stacks = lax.scan(turn, start, jnp.arange(trips, dtype=jnp.int32))
    for move, total in zip(sums, totals, strict=True):
        dtype = program.values[move.value].dtype
        frame.put(move.value, move.target, total.astype(dtype))
    for move, stack in zip(rest, stacks, strict=True):
        whole = gathered(program, move, stack, mesh) if move.steps else stack[-1]
        frame.put(move.value, move.target, whole)


def gathered(program: Program, move: Move, stack: jax.Array, mesh: Mesh) -> jax.Array:
    """[turns, *shard] of the rows of every turn as one shard."""
    (step,) = move.steps
    return put_together(stack, program.values[move.value].shape, step, mesh)


def operator_of(move: Move) -> str:
    """The operator with which the turns' terms of a leaving sum are combined."""
    operator = move.source.operator(TIME)
    assert operator is not None
    return operator


def empty_total(program: Program, move: Move, mesh: Mesh) -> jax.Array:
    """The accumulator before the first turn."""
    value = program.values[move.value]
    shape = move.source.local_shape(value.shape, mesh)
    return empty(operator_of(move), shape, value.dtype)
