"""Keys, random bits and iotas on a shard: the elements that the whole draw has there.

Element n of a threefry draw is enciphered from the counter n, so a shard computes the
counters of its own elements. Where ``jax_threefry_partitionable`` is off, counters
stand in pairs half a draw apart: each element enciphers its pair and keeps its half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from rhino_jax import compat
from rhino_jax.errors import TraceError
from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands
from rhino_jax.rules import random

_WORD = 2**32
Pair = tuple[jax.Array, jax.Array]


def _iota(shard: Shard) -> jax.Array:
    params = shard.params
    dim = params["dimension"]
    index = shard.result_index(dim).astype(params["dtype"])
    return lax.broadcast_in_dim(index, shard.shape(), (dim,))


def flat_counters(indices: Sequence[jax.Array], shape: Sequence[int]) -> Pair:
    """uint32 high and low words of the row-major flat index of every element.

    ``indices[d]`` are the indices along dimension d of ``shape``; the result has the
    shape of their grid. 64 bits without 64-bit types, as JAX counts.
    """
    grid = tuple(len(index) for index in indices)
    high = low = jnp.zeros(grid, jnp.uint32)
    small = math.prod(shape) <= _WORD
    for d, index in enumerate(indices):
        top, bottom = _times(index.astype(jnp.uint32), math.prod(shape[d + 1 :]))
        bottom = lax.broadcast_in_dim(bottom, grid, (d,))
        low = low + bottom
        if not small:
            carry = (low < bottom).astype(jnp.uint32)
            high = high + lax.broadcast_in_dim(top, grid, (d,)) + carry
    return high, low


def _times(index: jax.Array, stride: int) -> Pair:
    """High and low words of ``index * stride``, by halves of words.

    Not by ``lax.mulhi``, which has no lowering inside a ``shard_map`` in jax 0.10.2.
    """
    stride_high, stride_low = map(np.uint32, divmod(stride % _WORD**2, _WORD))
    upper, lower = map(np.uint32, divmod(int(stride_low), 2**16))
    a, b = index >> 16, index & 0xFFFF
    middle = a * lower + ((b * lower) >> 16)
    carried = b * upper + (middle & 0xFFFF)
    top = a * upper + (middle >> 16) + (carried >> 16)
    return top + index * stride_high, index * stride_low


def _cipher(words: jax.Array, high: jax.Array, low: jax.Array) -> Pair:
    """uint32 [*keys, *draw] twice: counters of one draw, enciphered by every key."""
    batch = words.shape[:-1]
    shape = (*batch, *high.shape)
    outer = tuple(range(len(batch)))
    inner = tuple(range(len(batch), len(shape)))
    first, second = threefry2x32_p.bind(
        lax.broadcast_in_dim(words[..., 0], shape, outer),
        lax.broadcast_in_dim(words[..., 1], shape, outer),
        lax.broadcast_in_dim(high, shape, inner),
        lax.broadcast_in_dim(low, shape, inner),
    )
    return first, second


def _paired(words: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """Words ``index`` of the ``count`` words that the paired draw makes of a key."""
    half = (count + 1) // 2
    upper = index >= half
    left = jnp.where(upper, index - half, index)
    right = left + np.uint32(half)
    # An odd count is filled up with a zero, not with the next counter.
    right = jnp.where(right < count, right, np.uint32(0))
    first, second = _cipher(words, left, right)
    return jnp.where(upper, second, first)


def _draw(shard: Shard, keys: jax.Array) -> tuple[jax.Array, Pair]:
    """The words of the keys, and the counters of the elements drawn from each."""
    batch = len(shard.reads[0].shape)
    drawn = range(batch, len(shard.makes[0].shape))
    indices = [shard.result_index(d) for d in drawn]
    counters = flat_counters(indices, shard.makes[0].shape[batch:])
    return jax.random.key_data(keys), counters


def _one_by_one(shard: Shard) -> bool:
    """Whether elements need no counters: the draw from each key is whole."""
    drawn = len(shard.makes[0].shape) - len(shard.reads[0].shape)
    return not any(shard.is_split(f"i{d}") for d in range(drawn))


def _random_bits(shard: Shard, keys: jax.Array) -> jax.Array:
    if _one_by_one(shard):
        return shard.bind(keys)
    words, (high, low) = _draw(shard, keys)
    width, shape = shard.params["bit_width"], shard.params["shape"]
    dtype = jnp.dtype(shard.makes[0].dtype)
    if not compat.threefry_partitionable(shard.op.source):
        return _paired_bits(words, low, width, math.prod(shape)).astype(dtype)
    first, second = _cipher(words, high, low)
    if width == 64:
        return (first.astype(dtype) << 32) | second.astype(dtype)
    return (first ^ second).astype(dtype)


def _paired_bits(words: jax.Array, index: jax.Array, width: int, size: int) -> Any:
    """The bits of ``index`` in a draw of ``size`` from counters in pairs."""
    count = -(-size * width // 32)
    if count >= _WORD - 1:
        raise TraceError(
            f"a draw of {count} words (the limit is {_WORD - 2}) can not be split "
            "while jax_threefry_partitionable is off: turn it on"
        )
    if width == 64:
        wide = jnp.uint64
        high = _paired(words, index, count).astype(wide)
        return (high << 32) | _paired(words, index + np.uint32(size), count)
    parts = np.uint32(32 // width)
    word = _paired(words, index // parts, count)
    return word >> (index % parts * np.uint32(width))


def _random_split(shard: Shard, keys: jax.Array) -> jax.Array:
    if _one_by_one(shard):
        return shard.bind(keys)
    words, (high, low) = _draw(shard, keys)
    if compat.threefry_partitionable(shard.op.source):
        pair = _cipher(words, high, low)
    else:
        count = 2 * math.prod(shard.params["shape"])
        index = low * np.uint32(2)
        pair = (_paired(words, index, count), _paired(words, index + 1, count))
    new = jnp.stack(pair, axis=-1)
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(keys))


LOCALS: Mapping[str, LocalFn] = {
    **dict.fromkeys(random.RULES, as_it_stands),
    "iota": _iota,
    "random_bits": _random_bits,
    "random_split": _random_split,
}
