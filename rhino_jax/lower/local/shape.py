"""Shape primitives on a shard: the same, with local sizes."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands


def _broadcast_in_dim(shard: Shard, x: jax.Array) -> jax.Array:
    return shard.bind(x, shape=shard.shape(), sharding=None)


def _reshape(shard: Shard, x: jax.Array) -> jax.Array:
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
    "transpose": as_it_stands,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": as_it_stands,
    "split": _split,
}
