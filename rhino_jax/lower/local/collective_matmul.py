"""A product that gathers an operand, or scatters its result, while it works.

``n`` devices hold a shard each of what the product needs in one piece. Every shard is
handed around the ring, half of them one way and half the other, and multiplied as it
comes by; compilers send the next one meanwhile. Rows or columns are written to their
place in the result; shards of a contracted dimension are terms of it. A result that is
to be scattered goes around itself: every device adds its term to what comes by, and
what arrives in the end is its own shard's sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.factors import Dims
from rhino_jax.ir.program import accumulator_dtype
from rhino_jax.ir.steps import Step, changed_dim
from rhino_jax.lower.local.shard import Shard
from rhino_jax.lower.reshard import hand_on, outside


@dataclass(frozen=True)
class _Places:
    """One dimension as [outer, count, inner], ``count`` the devices' places.

    It is taken apart only where it must be (``outer`` above 1): compilers drag
    dimensions that are put together again through what follows.
    """

    dim: int
    outer: int
    count: int

    def part(self, x: jax.Array, number: jax.Array) -> jax.Array:
        """The part of ``x`` at place ``number``."""
        size = x.shape[self.dim] // self.count
        if self.outer == 1:
            return lax.dynamic_slice_in_dim(x, number * size, size, self.dim)
        split = self._apart(x, self.count)
        return self.joined(lax.dynamic_index_in_dim(split, number, self.dim + 1))

    def room(self, part: jax.Array) -> jax.Array:
        """For all parts like ``part``, nothing written yet."""
        shape = list(self._apart(part, 1).shape)
        shape[self._at] *= self.count
        return lax.empty(tuple(shape), part.dtype)

    def put(self, room: jax.Array, part: jax.Array, number: jax.Array) -> jax.Array:
        one = self._apart(part, 1)
        start = number * one.shape[self._at]
        return lax.dynamic_update_slice_in_dim(room, one, start, self._at)

    def joined(self, x: jax.Array) -> jax.Array:
        """Of a room or its part, the dimension in one again."""
        if self.outer == 1:
            return x
        return x.reshape(*x.shape[: self.dim], -1, *x.shape[self.dim + 3 :])

    @property
    def _at(self) -> int:
        return self.dim if self.outer == 1 else self.dim + 1

    def _apart(self, x: jax.Array, count: int) -> jax.Array:
        if self.outer == 1:
            return x
        shape = (self.outer, count, x.shape[self.dim] // (self.outer * count))
        return x.reshape(*x.shape[: self.dim], *shape, *x.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Around:
    """One product, and the step that it does by itself: a gather of operand number
    ``operand``, or (-1) a scatter of its result."""

    shard: Shard
    step: Step
    operand: int

    def run(
        self, args: Sequence[jax.Array], collect: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """The result, and the operand in one piece where that is to be collected."""
        if self.operand < 0:
            return self._scattered(args), None
        return self._gathering(args, collect)

    @property
    def axis(self) -> str:
        (axis,) = self.step.axes
        return axis

    @property
    def count(self) -> int:
        return self.shard.mesh.size(self.axis)

    @property
    def factor(self) -> tuple[str, ...]:
        """The dimension, in the rule, that is worked on part by part."""
        dims = (*self.shard.rule.operands, *self.shard.rule.results)[self.operand]
        return dims[changed_dim(self.step)]

    def _places(self, dims: Dims) -> _Places | None:
        """Of the parts in the dimensions of one operand or result; None: none there."""
        if self.factor not in dims:
            return None
        values = (*self.shard.reads, *self.shard.makes)
        outer = outside(values[self.operand].shape, self.step, self.shard.mesh)
        return _Places(dims.index(self.factor), outer, self.count)

    def _hand_on(self, x: jax.Array, by: int) -> jax.Array:
        pairs = [(i, (i + by) % self.count) for i in range(self.count)]
        return hand_on(x, self.step.axes, pairs, self.shard.mesh)

    def _met(self, own: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Every device's shard and its number, one's own first."""
        here, n = lax.axis_index(self.axis), self.count
        yield own, here
        ahead = behind = own
        for turn in range(1, n // 2 + 1):
            ahead = self._hand_on(ahead, 1)
            yield ahead, (here - turn) % n
            if 2 * turn < n:
                behind = self._hand_on(behind, -1)
                yield behind, (here + turn) % n

    def _gathering(
        self, args: Sequence[jax.Array], collect: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        rule, other = self.shard.rule, 1 - self.operand
        mine, terms = (self._places(rule.operands[k]) for k in (self.operand, other))
        rows = self._places(rule.results[0])
        assert mine is not None
        whole = total = None
        for part, number in self._met(args[self.operand]):
            if collect:
                room = mine.room(part) if whole is None else whole
                whole = mine.put(room, part, number)
            beside = args[other] if terms is None else terms.part(args[other], number)
            pair = (part, beside) if self.operand == 0 else (beside, part)
            one = self._product(pair, rows is None)
            if rows is None:
                total = one if total is None else total + one
            else:
                room = rows.room(one) if total is None else total
                total = rows.put(room, one, number)
        assert total is not None
        dtype = self.shard.makes[0].dtype
        made = total.astype(dtype) if rows is None else rows.joined(total)
        return made, None if whole is None else mine.joined(whole)

    def _scattered(self, args: Sequence[jax.Array]) -> jax.Array:
        """Sums of terms come by from both sides; one's own term is added last."""
        operands = [self._places(dims) for dims in self.shard.rule.operands]
        here, n = lax.axis_index(self.axis), self.count

        def term(number: jax.Array) -> jax.Array:
            parts = [
                x if places is None else places.part(x, number % n)
                for x, places in zip(args, operands, strict=True)
            ]
            return self._product(parts)

        arrived = []
        for by, turns in ((1, n // 2), (-1, (n - 1) // 2)):
            sums: jax.Array | None = None
            for turn in range(turns):
                one = term(here + by * (turns - turn))
                sums = self._hand_on(one if sums is None else sums + one, by)
            if sums is not None:
                arrived.append(sums)
        return sum(arrived, term(here))

    def _product(self, pair: Sequence[jax.Array], terms: bool = False) -> jax.Array:
        """The product of two parts; of ``terms``, as they are accumulated."""
        changed = {}
        if terms:
            made = accumulator_dtype(str(self.shard.makes[0].dtype))
            changed = {"preferred_element_type": jnp.dtype(made)}
        out: jax.Array = self.shard.bind(*pair, **changed)
        return out
