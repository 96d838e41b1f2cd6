"""Shape primitives on a shard: the same, with local sizes.

Some have no equation: a rewrite of the Program has put them there.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands


def _broadcast_in_dim(shard: Shard, x: jax.Array) -> jax.Array:
    if shard.op.source is None:
        dims = shard.op.param["broadcast_dimensions"]
        return jax.lax.broadcast_in_dim(x, shard.shape(), dims)
    return shard.bind(x, shape=shard.shape(), sharding=None)


def _transpose(shard: Shard, x: jax.Array) -> jax.Array:
    return jax.lax.transpose(x, shard.op.param["permutation"])


def _reshape(shard: Shard, x: jax.Array) -> jax.Array:
    if shard.op.source is None:
        return jax.lax.reshape(x, shard.shape())
    return shard.bind(x, new_sizes=shard.shape(), sharding=None)


def _split(shard: Shard, x: jax.Array) -> list[jax.Array]:
    axis = shard.params["axis"]
    sizes = tuple(shard.shape(i)[axis] for i in range(len(shard.makes)))
    return shard.bind(x, sizes=sizes)


def _rematerialize(shard: Shard, *args: jax.Array) -> list[jax.Array]:
    return list(jax.lax.optimization_barrier(args))


LOCALS: Mapping[str, LocalFn] = {
    "rematerialize": _rematerialize,
    "optimization_barrier": as_it_stands,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": as_it_stands,
    "split": _split,
}
