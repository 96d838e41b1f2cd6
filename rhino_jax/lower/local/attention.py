"""Attention on a shard: as it stands on its heads, around a ring on its rows.

The kernel is the vendor's where this machine has it (cuDNN and a GPU to run it), else
:mod:`rhino_jax.lower.kernels.attention`. A vendor's kernel knows no positions: it takes
whole blocks, all seen or the ones on the diagonal. Where a mask cuts blocks otherwise
(strided rows, a window around a ring), the other one is run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax import compat
from rhino_jax.errors import TraceError
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.kernels import attention as blockwise
from rhino_jax.lower.kernels.attention import Hiding, Scores, accumulating
from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands, global_index
from rhino_jax.lower.reshard import hand_on, index_along
from rhino_jax.rules.attention import (
    BACKWARD,
    BIAS,
    COTANGENT,
    FORWARD,
    KEY,
    KEY_LENGTHS,
    KEYS,
    QUERIES,
    QUERY,
    QUERY_LENGTHS,
    RESULT,
    SEQUENCE,
    SUMS,
    VALUE,
    Attention,
    by_vendor,
    shardable,
)

Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class _Ring:
    """The devices that hand a shard's keys and values around, and who is who."""

    mesh: Mesh
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: jax.Array
    """int32 [rows]: positions of the rows of the first device."""

    @staticmethod
    def of(shard: Shard) -> _Ring:
        digits = shard.choice.on(SEQUENCE)
        alone = tuple(Split(split.axis, split.stride) for split in digits)
        here = global_index(shard.rule.factor(SEQUENCE).size, alone, shard.mesh)
        offset = sum(index_along(d.axis, shard.mesh) * d.stride for d in digits)
        return _Ring(
            shard.mesh,
            tuple(d.axis for d in digits),
            tuple(shard.mesh.size(d.axis) for d in digits),
            tuple(d.stride for d in digits),
            here - jnp.int32(offset),
        )

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def here(self) -> jax.Array:
        """int32 []: this device's number in the ring."""
        return lax.axis_index(self.axes)

    def positions(self, number: jax.Array) -> jax.Array:
        """int32 [rows]: those of the rows that device ``number`` has."""
        found = self.first
        for size, stride in zip(
            reversed(self.sizes), reversed(self.strides), strict=True
        ):
            found = found + (number % size) * stride
            number = number // size
        return found

    def hand_on(self, *arrays: jax.Array) -> Arrays:
        pairs = [(i, (i + 1) % self.count) for i in range(self.count)]
        return tuple(hand_on(x, self.axes, pairs, self.mesh) for x in arrays)


@dataclass(frozen=True)
class _Here:
    """One attention op on this device: what stays, while keys and values may go by.

    ``given`` are the op's operands as they lie here. Results of blocks are as
    :mod:`rhino_jax.lower.kernels.attention` has them.
    """

    shard: Shard
    about: Attention
    given: Arrays

    @property
    def group(self) -> int:
        """Query heads of one key head here."""
        heads = self.about.heads_dim
        return self.given[QUERY].shape[heads] // self.given[KEY].shape[heads]

    @property
    def hiding(self) -> Hiding:
        return Hiding(self.about.scale, self.about.causal, self.about.window)

    def heads_first(self, x: jax.Array) -> jax.Array:
        """[b, heads, sequence, depth]; or, from that, as the op has its arrays."""
        return x if self.about.heads_first else jnp.swapaxes(x, 1, 2)

    def of_queries(self, x: jax.Array) -> jax.Array:
        """[b, h, g, t, d] of what is like queries."""
        return self.grouped(self.heads_first(x))

    def grouped(self, x: jax.Array) -> jax.Array:
        """[b, h, g, ...] of [b, heads, ...]."""
        return x.reshape(x.shape[0], -1, self.group, *x.shape[2:])

    def ungrouped(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def scores(self, rows: jax.Array, columns: jax.Array) -> Scores:
        found = Scores(rows, columns)
        if self.about.bias:
            bias = self.given[BIAS]
            bias = self.grouped(bias) if bias.shape[1] > 1 else bias[:, :, None]
            found = found._replace(bias=bias)
        if self.about.padded:
            found = found._replace(
                row_lengths=self.given[QUERY_LENGTHS],
                column_lengths=self.given[KEY_LENGTHS],
            )
        return found

    def forward(
        self, k: jax.Array, v: jax.Array, rows: jax.Array, columns: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Queries here with keys at ``columns``."""
        return blockwise.forward(
            self.of_queries(self.given[QUERY]),
            self.heads_first(k),
            self.heads_first(v),
            self.scores(rows, columns),
            self.hiding,
        )

    def backward(
        self, k: jax.Array, v: jax.Array, rows: jax.Array, columns: jax.Array
    ) -> blockwise.Gradients:
        """The gradients of what :meth:`forward` does."""
        return blockwise.backward(
            self.of_queries(self.given[QUERY]),
            self.heads_first(k),
            self.heads_first(v),
            self.scores(rows, columns),
            self.hiding,
            self.grouped(self.given[SUMS]),
            self.of_queries(self.given[RESULT]),
            self.of_queries(self.given[COTANGENT]),
            self.about.bias_gradient,
        )

    def part(self, x: jax.Array, rows: slice) -> jax.Array:
        """Some rows of queries, keys or what is like them."""
        dim = self.about.sequence_dim
        return lax.slice_in_dim(x, rows.start, rows.stop, axis=dim)

    def vendor_forward(
        self, k: jax.Array, v: jax.Array, mask: Any, rows: slice, columns: int
    ) -> tuple[jax.Array, jax.Array]:
        """Some queries here with the first ``columns`` keys, as :meth:`forward`."""
        q = self.part(self.given[QUERY], rows)
        if not columns:
            nothing = jnp.zeros_like(self.of_queries(q), accumulating(q.dtype))
            shape = (*nothing.shape[:-1], v.shape[-1])
            sums = jnp.full(shape[:-1], -jnp.inf, nothing.dtype)
            return jnp.broadcast_to(nothing[..., :1], shape), sums
        k, v = (self.part(x, slice(0, columns)) for x in (k, v))
        rest = self.given[BIAS:]
        changed = {"mask_type": mask, "is_training": True}
        out, sums = _bind(self.shard, q, k, v, *rest, **changed)
        wide = self.of_queries(out).astype(accumulating(q.dtype))
        return wide, self.grouped(sums).astype(wide.dtype)

    def vendor_backward(
        self, k: jax.Array, v: jax.Array, mask: Any, rows: slice, columns: int
    ) -> Arrays:
        """Their gradients, as :meth:`backward`: of these queries, of all keys."""
        q = self.part(self.given[QUERY], rows)
        wide = accumulating(q.dtype)
        if not columns:
            whole = self.of_queries(q), self.heads_first(k), self.heads_first(v)
            return tuple(jnp.zeros_like(x, wide) for x in whole)
        others = k.shape[self.about.sequence_dim] - columns
        k, v = (self.part(x, slice(0, columns)) for x in (k, v))
        sums = lax.slice_in_dim(self.given[SUMS], rows.start, rows.stop, axis=2)
        out, cotangent = (self.part(self.given[i], rows) for i in (RESULT, COTANGENT))
        rest = (*self.given[BIAS:SUMS], sums, out, cotangent)
        dq, *found = _bind(self.shard, q, k, v, *rest, mask_type=mask)
        unseen = ((0, 0), (0, 0), (0, others), (0, 0))
        terms = (jnp.pad(self.heads_first(x).astype(wide), unseen) for x in found)
        return self.of_queries(dq).astype(wide), *terms

    def joined(self, runs: list[Any]) -> Any:
        """Results of one run of queries after the other as those of all."""
        queries, *others = zip(*runs, strict=True)
        if self.about.backward:
            keys = (functools.reduce(jnp.add, terms) for terms in others)
            return jnp.concatenate(queries, 3), *keys
        return tuple(jnp.concatenate(parts, 3) for parts in (queries, *others))

    def results(self, out: jax.Array, sums: jax.Array) -> Arrays:
        """The forward op's results, rounded and arranged as it has them."""
        found = self.heads_first(self.ungrouped(out)), self.ungrouped(sums)
        return self.rounded(found)

    def gradients(self, found: blockwise.Gradients) -> Arrays:
        """The backward op's results, rounded and arranged as it has them."""
        q = self.heads_first(self.ungrouped(found.q))
        every = [q, self.heads_first(found.k), self.heads_first(found.v)]
        if found.bias is not None:
            bias = self.ungrouped(found.bias)
            shape = self.given[BIAS].shape
            alone = tuple(d for d in (0, 1) if shape[d] == 1)
            every.append(jnp.sum(bias, alone, keepdims=True))
        return self.rounded(every)

    def rounded(self, found: Any) -> Arrays:
        makes = self.shard.makes
        return tuple(x.astype(v.dtype) for x, v in zip(found, makes, strict=False))


def _bind(shard: Shard, *args: jax.Array, **changed: Any) -> Any:
    """The vendor's kernel."""
    if shard.op.source is not None:
        return shard.bind(*args, **changed)
    params = compat.cudnn_params(shard.op.param) | changed
    return compat.cudnn_bind(shard.op.kind, args, params)


def _forward(shard: Shard, *given: jax.Array) -> Any:
    about = Attention.of(shard.op)
    here = _Here(shard, about, given)
    if shard.is_split(SEQUENCE):
        return here.results(*_around_forward(here))

    def stand_in(*given: jax.Array) -> Arrays:
        one = _Here(shard, about, given)
        positions = _positions(shard, given, about)
        return one.results(*one.forward(given[KEY], given[VALUE], *positions))

    return _once(shard, stand_in, given)


def _backward(shard: Shard, *given: jax.Array) -> Any:
    about = Attention.of(shard.op)
    if shard.is_split(SEQUENCE):
        here = _Here(shard, about, given)
        return here.gradients(_around_backward(here))

    def stand_in(*given: jax.Array) -> Arrays:
        one = _Here(shard, about, given)
        positions = _positions(shard, given, about)
        return one.gradients(one.backward(given[KEY], given[VALUE], *positions))

    return _once(shard, stand_in, given)


def _positions(
    shard: Shard, given: Arrays, about: Attention
) -> tuple[jax.Array, jax.Array]:
    """Where the queries and the keys that are here stand, of no ring."""
    whole = [
        jnp.arange(given[i].shape[about.sequence_dim], dtype=jnp.int32)
        for i in (QUERY, KEY)
    ]
    found = [
        shard.index(name) if shard.is_split(name) else everywhere
        for name, everywhere in zip((QUERIES, KEYS), whole, strict=True)
    ]
    return found[0], found[1]


def _once(
    shard: Shard,
    stand_in: Callable[..., Arrays],
    given: Arrays,
) -> Any:
    """The op on whole sequences: the vendor's kernel where there is one."""
    if not shardable(shard.op, shard.reads):
        if not compat.cudnn_runs():
            raise TraceError(
                f"{shard.op.where}: attention with dropout, packed sequences or pages "
                "is run by cuDNN alone, and there is none here: lower it on a GPU"
            )
        return as_it_stands(shard, *given)

    def vendor(*xs: jax.Array) -> Arrays:
        found = zip(_bind(shard, *xs), shard.makes, strict=True)
        return tuple(x.astype(v.dtype) for x, v in found)

    split = shard.is_split(QUERIES) or shard.is_split(KEYS)
    fits = not split and by_vendor(shard.op)
    return _by_vendor(fits, vendor, stand_in, given)


def _by_vendor(
    fits: bool,
    vendor: Callable[..., Any],
    stand_in: Callable[..., Any],
    args: Arrays,
) -> Any:
    """The vendor's kernel, where it ``fits`` and there is one, on a GPU."""
    if not fits or not compat.cudnn_runs():
        return stand_in(*args)
    return lax.platform_dependent(*args, cuda=vendor, default=stand_in)


# ---- around a ring ----------------------------------------------------------------


def _around_forward(here: _Here) -> tuple[jax.Array, jax.Array]:
    ring = _Ring.of(here.shard)
    rows = ring.positions(ring.here)
    k, v = here.given[KEY], here.given[VALUE]

    def met(k: jax.Array, v: jax.Array, turn: Any) -> tuple[jax.Array, jax.Array]:
        number = (ring.here - turn) % ring.count

        def stand_in(k: jax.Array, v: jax.Array) -> Any:
            return here.forward(k, v, rows, ring.positions(number))

        def vendor(k: jax.Array, v: jax.Array) -> Any:
            def kernel(mask: Any, rows: slice, columns: int) -> Any:
                return here.vendor_forward(k, v, mask, rows, columns)

            return _by_rounds(here, ring.here, number, kernel)

        return _by_vendor(bool(_rounds(here)), vendor, stand_in, (k, v))

    def turned(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        k, v, total = carry
        # Handed on before they are used, so that a compiler may do both at once.
        coming = ring.hand_on(k, v)
        return (*coming, blockwise.merged(total, met(k, v, turn))), None

    shapes = jax.eval_shape(lambda k, v: met(k, v, 0), k, v)
    nothing = jnp.zeros(shapes[0].shape, shapes[0].dtype)
    total = nothing, jnp.full(shapes[1].shape, -jnp.inf, shapes[1].dtype)
    turns = jnp.arange(ring.count - 1, dtype=jnp.int32)
    (k, v, total), _ = lax.scan(turned, (k, v, total), turns)
    return blockwise.merged(total, met(k, v, ring.count - 1))


def _around_backward(here: _Here) -> blockwise.Gradients:
    ring = _Ring.of(here.shard)
    rows = ring.positions(ring.here)
    k, v = here.given[KEY], here.given[VALUE]

    def met(k: jax.Array, v: jax.Array, turn: Any) -> Any:
        number = (ring.here - turn) % ring.count

        def stand_in(k: jax.Array, v: jax.Array) -> Any:
            return here.backward(k, v, rows, ring.positions(number))[:3]

        def vendor(k: jax.Array, v: jax.Array) -> Any:
            def kernel(mask: Any, rows: slice, columns: int) -> Any:
                return here.vendor_backward(k, v, mask, rows, columns)

            return _by_rounds(here, ring.here, number, kernel)

        return _by_vendor(bool(_rounds(here)), vendor, stand_in, (k, v))

    def added(terms: Arrays, more: Arrays) -> Arrays:
        return tuple(x + y for x, y in zip(terms, more, strict=True))

    def turned(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        k, v, total = carry
        coming = ring.hand_on(k, v)
        dq, dk, dv = added(total, met(k, v, turn))
        return (*coming, (dq, *ring.hand_on(dk, dv))), None

    shapes = jax.eval_shape(lambda k, v: met(k, v, 0), k, v)
    total = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)
    turns = jnp.arange(ring.count - 1, dtype=jnp.int32)
    (k, v, total), _ = lax.scan(turned, (k, v, total), turns)
    dq, dk, dv = added(total, met(k, v, ring.count - 1))
    home = (x.astype(here.shard.makes[1].dtype) for x in (dk, dv))
    return blockwise.Gradients(dq, *ring.hand_on(*home))


def _mask(shard: Shard) -> Any:
    if shard.op.source is not None:
        return shard.params["mask_type"]
    return compat.cudnn_params(shard.op.param)["mask_type"]


MOST_ROUNDS = 16


def _rounds(here: _Here) -> int:
    """How many runs of neighbours a shard's rows are; 0 where runs are no shards'.

    A kernel that knows no positions can do every turn of a ring run by run.
    """
    shard, whole = here.shard, here.shard.rule.factor(SEQUENCE).size
    digits = shard.choice.on(SEQUENCE)
    spans = [digit.stride * shard.mesh.size(digit.axis) for digit in digits]
    nested = all(a.stride == b for a, b in zip(digits, spans[1:], strict=False))
    found = whole // spans[0]
    fits = nested and found <= MOST_ROUNDS and here.about.window is None
    return found if fits and by_vendor(shard.op) else 0


def _by_rounds(
    here: _Here, mine: jax.Array, number: jax.Array, kernel: Callable[..., Any]
) -> Any:
    """The vendor's kernel on the keys of device ``number``.

    ``kernel(mask, rows, columns)`` is for a run of queries and the first ``columns``
    keys. Under a causal mask queries see all earlier runs, and of their own one all, a
    triangle or none, as the other device stands before, with or behind this one.
    """
    mask, rows = _mask(here.shard), here.shard.size(SEQUENCE)
    if not here.about.causal:
        return kernel(mask, slice(0, rows), rows)
    every = type(mask)["NO_MASK"]
    run = rows // _rounds(here)

    def earlier(own: int) -> Any:
        starts = range(0, rows, run)
        return here.joined(
            [kernel(every, slice(at, at + run), at + own * run) for at in starts]
        )

    return lax.switch(
        1 + jnp.sign(number - mine),
        (
            lambda: earlier(1),
            lambda: kernel(mask, slice(0, rows), rows),
            lambda: earlier(0),
        ),
    )


LOCALS: Mapping[str, LocalFn] = {FORWARD: _forward, BACKWARD: _backward}
