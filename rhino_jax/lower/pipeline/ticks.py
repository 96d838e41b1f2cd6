"""A pipelined scan on one device: its own layers for one microbatch, in every tick.

All stages run one program. In tick ``t`` the stage at place ``p`` works on what it
counts as its number ``t - p``: microbatch after microbatch, round after round. Before
its first and after its last it computes all the same, the last one once more, so that
what it stacks is never wrong in the end; what it adds up then counts nothing.

The carry goes round in a ring. The first stage keeps the rows of all microbatches: what
entered the loop, overwritten by what comes back, which is read in the next round or is
what leaves the loop. Stacked results lie as they will be read, all examples side by
side: a tick writes the rows of its microbatch in place, so no value is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.analysis.loops import accumulators, kept, passed
from rhino_jax.ir.assignment import OpPlan
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import STAGE, TIME, Mesh
from rhino_jax.ir.program import Op, Value
from rhino_jax.ir.staged import Staged
from rhino_jax.lower.reshard import Here, neutral
from rhino_jax.lower.totals import COMBINE, empty

Arrays = Sequence[jax.Array]
Held = tuple[list[jax.Array], list[jax.Array], list[jax.Array]]
"""In a loop over layers: what is passed on, what is added to, what is stacked."""
Body = Callable[..., list[jax.Array]]
"""The mesh in one tick, then a body's inputs, to its outputs; all are local shards."""


@dataclass(frozen=True)
class Part:
    """What one microbatch has of a value.

    ``whole`` is the local shape of the value outside the loop, ``shape`` inside.
    ``view`` is ``whole`` with a dimension of its own, ``at``, for the microbatch's
    number; None where every microbatch has it all.
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    view: tuple[int, ...] = ()
    at: int | None = None

    @staticmethod
    def of(value: Value, layout: Layout, mesh: Mesh) -> Part:
        """Of a body's value in ``layout``; ``mesh`` has the time axis."""
        whole = layout.without((TIME,)).local_shape(value.shape, mesh)
        shape = layout.local_shape(value.shape, mesh)
        where = layout.find(TIME)
        if where is None:
            return Part(whole, shape, whole)
        dim, split = where
        below = split.stride
        for other in layout.dims[dim]:
            if other.stride < split.stride:
                below //= mesh.size(other.axis)
        count = mesh.size(TIME)
        rows = (whole[dim] // (count * below), count, below)
        return Part(whole, shape, (*whole[:dim], *rows, *whole[dim + 1 :]), dim + 1)

    def read(self, array: jax.Array, number: jax.Array) -> jax.Array:
        """The rows of microbatch ``number`` of the whole."""
        if self.at is None:
            return array
        found = lax.dynamic_index_in_dim(array.reshape(self.view), number, self.at)
        return found.reshape(self.shape)

    def write(self, array: jax.Array, rows: jax.Array, number: jax.Array) -> jax.Array:
        """``array`` with the rows of microbatch ``number`` in place."""
        if self.at is None:
            return rows
        one = rows.reshape(self._one)
        seen = array.reshape(self.view)
        done = lax.dynamic_update_index_in_dim(seen, one, number, self.at)
        return done.reshape(self.whole)

    def take(self, stack: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        """The rows of one layer of a stack ``[layers, *whole]``."""
        seen = stack.reshape(stack.shape[0], *self.view)
        start = self._start(layer, number)
        return lax.dynamic_slice(seen, start, (1, *self._one)).reshape(self.shape)

    def store(
        self, stack: jax.Array, rows: jax.Array, layer: jax.Array, number: jax.Array
    ) -> jax.Array:
        """``stack`` with the rows of one layer in place."""
        seen = stack.reshape(stack.shape[0], *self.view)
        one = rows.astype(stack.dtype).reshape(1, *self._one)
        done = lax.dynamic_update_slice(seen, one, self._start(layer, number))
        return done.reshape(stack.shape)

    @property
    def _one(self) -> tuple[int, ...]:
        return tuple(1 if d == self.at else n for d, n in enumerate(self.view))

    def _start(self, layer: jax.Array, number: jax.Array) -> list[jax.Array]:
        zero = jnp.zeros((), jnp.int32)
        inside = [number if d == self.at else zero for d in range(len(self.view))]
        return [layer, *inside]


class State(NamedTuple):
    """What a stage keeps from tick to tick."""

    received: list[jax.Array]
    last: list[jax.Array]
    """What it took in, once more."""
    pending: list[jax.Array]
    totals: list[jax.Array]
    stacks: list[jax.Array]


@dataclass(frozen=True)
class Now:
    """Which layers of which microbatch a stage is at, int32 [] each; ``counts`` is
    false before its first and after its last."""

    place: jax.Array
    round: jax.Array
    number: jax.Array
    counts: jax.Array
    over: jax.Array


class Ring:
    """One pipelined scan on one device."""

    def __init__(self, op: Op, plan: OpPlan, mesh: Mesh, body: Body) -> None:
        assert plan.staged is not None
        (self.program,), (self.inner,) = op.programs, plan.inner
        self.op, self.staged, self.body = op, plan.staged, body
        self.mesh = self.staged.over(mesh)
        self.consts, self.carry = op.param["num_consts"], op.param["num_carry"]
        carries = self.program, self.consts, self.carry
        self.passed = passed(*carries)
        self.added = sorted(accumulators(*carries))
        self.kept = sorted(kept(*carries))
        handed = [self.program.outputs[i] for i in self.passed]
        assert [move.value for move in plan.handed] == handed, "the plan hands on else"
        self.turns = self.staged.turns(op.param["length"])
        self.inputs = self._parts(self.program.inputs, self.inner.inputs)
        self.outputs = self._parts(self.program.outputs, self.inner.outputs)

    def _parts(self, values: Sequence[int], layouts: Sequence[Layout]) -> list[Part]:
        return [
            Part.of(self.program.values[v], layout, self.mesh)
            for v, layout in zip(values, layouts, strict=True)
        ]

    def _made(self, output: int) -> tuple[str, str | None]:
        """The dtype of an output of the body, and how its terms are combined."""
        value = self.program.values[self.program.outputs[output]]
        return value.dtype, self.inner.outputs[output].operator(TIME)

    def run(self, args: Arrays) -> list[jax.Array]:
        """The scan's results from its operands, as they lie outside."""
        first = self.consts + self.carry
        carry = args[self.consts : first]
        taken = [jnp.zeros(self.outputs[i].shape, carry[i].dtype) for i in self.passed]
        start = State(
            taken,
            taken,
            [carry[i] for i in self.passed],
            [self._total(i, carry[i]) for i in self.added],
            [self._stack(k) for k in range(self.carry, len(self.outputs))],
        )

        def tick(state: State, time: jax.Array) -> tuple[State, None]:
            return self._tick(state, time, args), None

        ticks = jnp.arange(self.staged.ticks, dtype=jnp.int32)
        end, _ = lax.scan(tick, start, ticks)
        first_stage = self._place() == 0
        results = dict(zip(self.added, end.totals, strict=True))
        results |= {i: carry[i] for i in self.kept}
        for i, array in zip(self.passed, end.pending, strict=True):
            results[i] = jnp.where(first_stage, array, jnp.zeros_like(array))
        made = [*(results[i] for i in range(self.carry)), *end.stacks]
        return [x.astype(self._made(k)[0]) for k, x in enumerate(made)]

    def _total(self, i: int, start: jax.Array) -> jax.Array:
        """An accumulator as it enters: what was there counts once, as a term."""
        dtype, operator = self._made(i)
        if operator is None:
            return start
        zero = empty(operator, start.shape, dtype)
        return COMBINE[operator](zero, start.astype(zero.dtype))

    def _stack(self, k: int) -> jax.Array:
        dtype, operator = self._made(k)
        shape = (self.turns * self.staged.rounds, *self.outputs[k].whole)
        if operator is None:
            return jnp.zeros(shape, dtype)
        return empty(operator, shape, dtype)

    # ---- one tick

    def _place(self) -> jax.Array:
        """How many stages stand before this one."""
        index = lax.axis_index(STAGE)
        return self.staged.stages - 1 - index if self.op.param["reverse"] else index

    def _now(self, time: jax.Array) -> Now:
        cut: Staged = self.staged
        place = self._place()
        done = time - place
        count = jnp.clip(done, 0, cut.work - 1)
        return Now(
            place,
            count // cut.microbatches,
            count % cut.microbatches,
            (done >= 0) & (done < cut.work),
            done >= cut.work,
        )

    def _tick(self, state: State, time: jax.Array, args: Arrays) -> State:
        now = self._now(time)
        taken = []
        for n, i in enumerate(self.passed):
            own = self.outputs[i].read(state.pending[n], now.number)
            x = jnp.where(now.place == 0, own, state.received[n])
            taken.append(jnp.where(now.over, state.last[n], x))
        terms = [self._term(i, t, now) for i, t in self._pairs(state.totals)]
        given, terms, stacks = self._layers(now, taken, terms, state.stacks, args)
        received = [self._handed(x) for x in given]
        return State(
            received,
            taken,
            self._kept(state.pending, received, time),
            [
                self._counted(i, total, term, now)
                for (i, total), term in zip(
                    self._pairs(state.totals), terms, strict=True
                )
            ],
            stacks,
        )

    def _pairs(self, totals: Sequence[jax.Array]) -> list[tuple[int, jax.Array]]:
        return list(zip(self.added, totals, strict=True))

    def _handed(self, x: jax.Array) -> jax.Array:
        """The carry, on its way to the next stage."""
        count = self.staged.stages
        step = -1 if self.op.param["reverse"] else 1
        ring = [(i, (i + step) % count) for i in range(count)]
        return lax.ppermute(x, STAGE, ring)

    def _kept(
        self, pending: Arrays, received: Arrays, time: jax.Array
    ) -> list[jax.Array]:
        """What came back to the first stage, in the place of what it took in."""
        done = time - (self.staged.stages - 1)
        number = jnp.maximum(done, 0) % self.staged.microbatches
        kept = []
        for n, i in enumerate(self.passed):
            part = self.outputs[i]
            x = jnp.where(done >= 0, received[n], part.read(pending[n], number))
            kept.append(part.write(pending[n], x, number))
        return kept

    def _term(self, i: int, total: jax.Array, now: Now) -> jax.Array:
        """What the layers of one tick add to: rows so far, or nothing yet."""
        part, (dtype, _) = self.outputs[i], self._made(i)
        if part.at is not None:
            return part.read(total, now.number)
        return jnp.zeros(part.shape, dtype)

    def _counted(
        self, i: int, total: jax.Array, term: jax.Array, now: Now
    ) -> jax.Array:
        part, (_, operator) = self.outputs[i], self._made(i)
        if part.at is not None:
            was = part.read(total, now.number)
            return part.write(total, jnp.where(now.counts, term, was), now.number)
        # What is the same for every microbatch counts with the first.
        counts = now.counts if operator else now.counts & (now.number == 0)
        return total + jnp.where(counts, term, 0).astype(total.dtype)

    # ---- layers

    def _layers(
        self, now: Now, taken: Arrays, terms: Arrays, stacks: Arrays, args: Arrays
    ) -> Held:
        """One microbatch through the layers of one round."""
        first = self.consts + self.carry
        here = Here(self.mesh.axes, now.number)
        consts = [
            part.read(x, now.number)
            for part, x in zip(
                self.inputs[: self.consts], args[: self.consts], strict=True
            )
        ]
        kept = {
            i: self.inputs[self.consts + i].read(args[self.consts + i], now.number)
            for i in self.kept
        }
        slices = list(zip(self.inputs[first:], args[first:], strict=True))
        reverse, rounds = self.op.param["reverse"], self.staged.rounds
        base = (rounds - 1 - now.round if reverse else now.round) * self.turns

        def run(held: Held, turn: jax.Array) -> tuple[Held, None]:
            passed, added, stacks = held
            layer = base + (self.turns - 1 - turn if reverse else turn)
            carry = dict(zip(self.passed, passed, strict=True))
            carry |= dict(zip(self.added, added, strict=True))
            carry |= kept
            outs = self.body(
                here,
                *consts,
                *(carry[i] for i in range(self.carry)),
                *(part.take(x, layer, now.number) for part, x in slices),
            )
            return (
                [outs[i] for i in self.passed],
                [outs[i] for i in self.added],
                [
                    self._stored(k, stack, outs[k], layer, now)
                    for k, stack in enumerate(stacks, self.carry)
                ],
            ), None

        begin = (list(taken), list(terms), list(stacks))
        turns = jnp.arange(self.turns, dtype=jnp.int32)
        (given, added, done), _ = lax.scan(run, begin, turns)
        return given, added, done

    def _stored(
        self, k: int, stack: jax.Array, made: jax.Array, layer: jax.Array, now: Now
    ) -> jax.Array:
        part, (_, operator) = self.outputs[k], self._made(k)
        if operator is not None:
            term = jnp.where(now.counts, made, neutral(operator, made.dtype))
            total = part.take(stack, layer, now.number)
            made = COMBINE[operator](total, term.astype(total.dtype))
        return part.store(stack, made, layer, now.number)
