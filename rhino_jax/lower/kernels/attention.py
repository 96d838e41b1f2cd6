"""Attention block by block, in memory linear in the sequence.

The softmax is kept up to date while keys come by (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018; Rabe and Staats, "Self-attention does not
need O(n^2) memory", 2021); the backward pass makes scores again from the sums of
exponentials (Dao et al., "FlashAttention", 2022). Blocks that a mask hides whole are
skipped.

Shapes: queries [b, h, g, t, d], keys [b, h, u, d], values [b, h, u, e], bias
[b or 1, h or 1, g or 1, t, u]; sums of exponentials are logarithms [b, h, g, t].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.program import accumulator_dtype

LONGEST, SHORTEST = 1024, 128
BLOCK_BYTES = 64 * 2**20
"""Rows of a block, and about how large the scores of one may be."""

ABSENT = -1
"""The position of a key that only fills a block up."""


class Scores(NamedTuple):
    """Where queries (``rows``) and keys (``columns``) stand, and what is added.

    Positions are int32 [t] and [u]; lengths int32 [b], or None.
    """

    rows: jax.Array
    columns: jax.Array
    bias: jax.Array | None = None
    row_lengths: jax.Array | None = None
    column_lengths: jax.Array | None = None


@dataclass(frozen=True)
class Hiding:
    """Which keys a query does not see: later ones, those ``window`` and more back."""

    scale: float
    causal: bool = False
    window: int | None = None

    def seen(self, at: Scores, filled: bool) -> jax.Array | None:
        """bool [b or 1, 1, 1, t, u]; None where all keys are seen."""
        rows, columns = at.rows[:, None], at.columns[None, :]
        found = [columns != ABSENT] if filled else []
        if self.causal:
            found.append(columns <= rows)
        if self.window is not None:
            found.append(columns > rows - self.window)
        for lengths, where in ((at.row_lengths, rows), (at.column_lengths, columns)):
            if lengths is not None:
                found.append(where < lengths[:, None, None])
        if not found:
            return None
        both = found[0]
        for one in found[1:]:
            both = both & one
        return both[None, None, None] if both.ndim == 2 else both[:, None, None]


def accumulating(dtype: Any) -> Any:
    """The dtype of scores and sums: float32 at least."""
    return jnp.dtype(accumulator_dtype(jnp.dtype(dtype).name))


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, at: Scores, hiding: Hiding
) -> tuple[jax.Array, jax.Array]:
    """The result [b, h, g, t, e] and the sums of exponentials, not yet rounded.

    What sees no key is zero, its sum minus infinity.
    """
    tiles = _Tiles.of(q, k)
    at = tiles.filled_up(at)
    wide = accumulating(q.dtype)
    columns = _blocks(k, 2, tiles.u), _blocks(v, 2, tiles.u), tiles.columns

    def row(args: Any) -> tuple[jax.Array, jax.Array]:
        query, i = args
        shape = query.shape[:-1]

        def column(carry: Any, args: Any) -> tuple[Any, None]:
            key, value, j = args
            seen = hiding.seen(tiles.cut(at, i, j), tiles.filled)

            def met(carry: Any) -> Any:
                total, top, sums = carry
                score = _scores(query, key, tiles.bias(at, i, j), seen, hiding)
                higher = jnp.maximum(top, jnp.max(score, -1))
                base = _finite(higher)
                fade, p = jnp.exp(top - base), jnp.exp(score - base[..., None])
                total = total * fade[..., None] + _product(
                    "bhgtu,bhue->bhgte", p.astype(value.dtype), value
                )
                return total, higher, sums * fade + jnp.sum(p, -1)

            return _if_seen(seen, met, carry), None

        start = (
            jnp.zeros((*shape, v.shape[-1]), wide),
            jnp.full(shape, -jnp.inf, wide),
            jnp.zeros(shape, wide),
        )
        (total, top, sums), _ = lax.scan(column, start, columns)
        out = total / jnp.where(sums == 0, 1, sums)[..., None]
        return out, _finite(top) + jnp.log(sums)

    out, sums = lax.map(row, (_blocks(q, 3, tiles.t), tiles.rows))
    length = q.shape[3]
    return _joined(out, 3, length), _joined(sums, 3, length)


def merged(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Results for two sets of keys, as one for all of them."""
    sums = jnp.logaddexp(one[1], other[1])
    base = _finite(sums)
    mine, theirs = (x * jnp.exp(part - base)[..., None] for x, part in (one, other))
    return mine + theirs, sums


class Gradients(NamedTuple):
    """Of queries, keys, values and bias (None where there is none), not yet rounded."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None = None


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: Scores,
    hiding: Hiding,
    sums: jax.Array,
    out: jax.Array,
    cotangent: jax.Array,
    of_bias: bool = False,
) -> Gradients:
    """Gradients of :func:`forward`, given its results (for all keys, not these alone).

    ``of_bias``: that of the bias too, [b, h, g, t, u].
    """
    tiles = _Tiles.of(q, k)
    at = tiles.filled_up(at)
    wide = accumulating(q.dtype)
    inner = jnp.sum(cotangent.astype(wide) * out.astype(wide), -1)
    rows = tuple(_blocks(x, 3, tiles.t) for x in (q, cotangent, sums, inner))
    numbers = tiles.rows

    def column(dq: jax.Array, args: Any) -> tuple[jax.Array, Any]:
        key, value, j = args

        def row(carry: Any, args: Any) -> tuple[Any, Any]:
            (query, given, total, inner), dq, i = args
            seen = hiding.seen(tiles.cut(at, i, j), tiles.filled)

            def met(carry: Any) -> Any:
                dk, dv, dq, _ = carry
                score = _scores(query, key, tiles.bias(at, i, j), seen, hiding)
                p = jnp.exp(score - _finite(total)[..., None])
                dp = _product("bhgte,bhue->bhgtu", given, value)
                ds = p * (dp - inner[..., None])
                low = (ds * hiding.scale).astype(query.dtype)
                dv += _product("bhgtu,bhgte->bhue", p.astype(given.dtype), given)
                dk += _product("bhgtu,bhgtd->bhud", low, query)
                dq += _product("bhgtu,bhud->bhgtd", low, key)
                return dk, dv, dq, ds if of_bias else None

            shape = (*query.shape[:-1], key.shape[2])
            ds = jnp.zeros(shape, wide) if of_bias else None
            dk, dv, dq, ds = _if_seen(seen, met, (*carry, dq, ds))
            return (dk, dv), (dq, ds)

        start = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
        (dk, dv), (dq, ds) = lax.scan(row, start, (rows, dq, numbers))
        return dq, (dk, dv, ds)

    start = jnp.zeros(rows[0].shape, wide)
    blocks = _blocks(k, 2, tiles.u), _blocks(v, 2, tiles.u), tiles.columns
    dq, (dk, dv, ds) = lax.scan(column, start, blocks)
    t, u = q.shape[3], k.shape[2]
    if ds is not None:  # [columns, rows, b, h, g, t, u]
        ds = ds.transpose(2, 3, 4, 1, 5, 0, 6)
        ds = ds.reshape(*ds.shape[:3], ds.shape[3] * ds.shape[4], -1)[..., :t, :u]
    return Gradients(_joined(dq, 3, t), _joined(dk, 2, u), _joined(dv, 2, u), ds)


# ---- blocks ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """Blocks of ``t`` queries and ``u`` keys, and how many there are of either."""

    t: int
    u: int
    num_rows: int
    num_columns: int
    extra_rows: int
    extra_columns: int

    @staticmethod
    def of(q: jax.Array, k: jax.Array) -> _Tiles:
        length, width = q.shape[3], k.shape[2]
        size = jnp.dtype(accumulating(q.dtype)).itemsize
        fitting = math.isqrt(BLOCK_BYTES // (size * math.prod(q.shape[:3])))
        longest = min(max(fitting, SHORTEST), LONGEST)
        longest = 1 << (longest.bit_length() - 1)
        t, u = min(length, longest), min(width, longest)
        rows, columns = -(-length // t), -(-width // u)
        return _Tiles(t, u, rows, columns, rows * t - length, columns * u - width)

    @property
    def filled(self) -> bool:
        return bool(self.extra_columns)

    @property
    def rows(self) -> jax.Array:
        return jnp.arange(self.num_rows, dtype=jnp.int32)

    @property
    def columns(self) -> jax.Array:
        return jnp.arange(self.num_columns, dtype=jnp.int32)

    def filled_up(self, at: Scores) -> Scores:
        more = self.extra_rows, self.extra_columns
        rows = jnp.pad(at.rows, (0, more[0]), constant_values=ABSENT)
        columns = jnp.pad(at.columns, (0, more[1]), constant_values=ABSENT)
        bias = at.bias
        if bias is not None:
            bias = jnp.pad(bias, [(0, 0)] * 3 + [(0, n) for n in more])
        return at._replace(rows=rows, columns=columns, bias=bias)

    def cut(self, at: Scores, i: jax.Array, j: jax.Array) -> Scores:
        """Positions in one block."""
        return at._replace(
            rows=lax.dynamic_slice_in_dim(at.rows, i * self.t, self.t),
            columns=lax.dynamic_slice_in_dim(at.columns, j * self.u, self.u),
        )

    def bias(self, at: Scores, i: jax.Array, j: jax.Array) -> jax.Array | None:
        if at.bias is None:
            return None
        found = lax.dynamic_slice_in_dim(at.bias, i * self.t, self.t, 3)
        return lax.dynamic_slice_in_dim(found, j * self.u, self.u, 4)


def _blocks(x: jax.Array, dim: int, size: int) -> jax.Array:
    """[count, ..., size, ...]: ``dim`` in blocks, the last one filled with zeros."""
    count = -(-x.shape[dim] // size)
    x = jnp.pad(
        x, [(0, count * size - n if d == dim else 0) for d, n in enumerate(x.shape)]
    )
    x = x.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :])
    return jnp.moveaxis(x, dim, 0)


def _joined(blocks: jax.Array, dim: int, length: int) -> jax.Array:
    """The inverse of :func:`_blocks`."""
    x = jnp.moveaxis(blocks, 0, dim)
    x = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=dim)


def _scores(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    seen: jax.Array | None,
    hiding: Hiding,
) -> jax.Array:
    found = _product("bhgtd,bhud->bhgtu", query, key) * hiding.scale
    if bias is not None:
        found = found + bias.astype(found.dtype)
    return found if seen is None else jnp.where(seen, found, -jnp.inf)


def _product(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(dims, x, y, preferred_element_type=accumulating(x.dtype))


def _if_seen(seen: jax.Array | None, met: Callable[[Any], Any], carry: Any) -> Any:
    """``met(carry)``, unless nothing is seen: then ``carry``."""
    if seen is None:
        return met(carry)
    return lax.cond(jnp.any(seen), met, lambda carry: carry, carry)


def _finite(x: jax.Array) -> jax.Array:
    """``x`` with zeros for what no key was seen by."""
    return jnp.where(jnp.isfinite(x), x, 0)
