"""Matrix products in groups on a shard: the counts of its own rows, its own groups.

A shard of the rows counts how many of them lie in each group. A shard of the groups
puts an empty group (a matrix of zeros, or a result that is thrown away) in front of
each run of its groups, for the rows of the groups that lie before it elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.lower.local.shard import LocalFn, Shard
from rhino_jax.rules.ragged import GROUP, SUMS, Numbers


def _ragged_dot_general(
    shard: Shard, lhs: jax.Array, rhs: jax.Array, counts: jax.Array
) -> jax.Array:
    numbers = Numbers.of(shard.op)
    (along,) = shard.rule.operands[0][numbers.ragged]
    if shard.is_split(along):
        counts = _own_rows(shard.index(along), counts)
    if not shard.is_split(GROUP):
        return shard.bind(lhs, rhs, counts)
    runs, length = _runs(shard)
    counts = _own_groups(shard.index(GROUP), counts, runs)
    if numbers.form == SUMS:
        out = shard.bind(lhs, rhs, counts)
        out = out.reshape(runs, length + 1, *out.shape[1:])[:, 1:]
        return out.reshape(runs * length, *out.shape[2:])
    assert numbers.group is not None
    return shard.bind(lhs, _with_gaps(rhs, numbers.group, runs), counts)


def _ends(counts: jax.Array) -> jax.Array:
    return lax.cumsum(counts, counts.ndim - 1)


def _own_rows(index: jax.Array, counts: jax.Array) -> jax.Array:
    """How many of the rows at ``index`` (rising) lie in each group."""
    ends = _ends(counts)
    index = index.astype(counts.dtype)
    inside = (ends - counts)[..., None] <= index
    return jnp.sum(inside & (index < ends[..., None]), axis=-1, dtype=counts.dtype)


def _runs(shard: Shard) -> tuple[int, int]:
    """How many runs of neighbours the groups of a shard are, and how long one is."""
    digits = shard.choice.on(GROUP)
    size, runs = shard.rule.factor(GROUP).size, 1
    for split in digits:
        runs *= size // (split.stride * shard.mesh.size(split.axis))
        size = split.stride
    assert runs * size == shard.size(GROUP)
    return runs, size


def _own_groups(index: jax.Array, counts: jax.Array, runs: int) -> jax.Array:
    """The counts of the groups at ``index``, in front of each run those of a gap."""
    ends = _ends(counts)
    ends, own = ends[..., index], counts[..., index]
    grid = (*own.shape[:-1], runs, own.shape[-1] // runs)
    ends, own = ends.reshape(grid), own.reshape(grid)
    first = ends[..., :1] - own[..., :1]
    before = jnp.concatenate(
        [jnp.zeros_like(first[..., :1, :]), ends[..., :-1, -1:]], axis=-2
    )
    whole = jnp.concatenate([first - before, own], axis=-1)
    return whole.reshape(*own.shape[:-2], math.prod(whole.shape[-2:]))


def _with_gaps(rhs: jax.Array, dim: int, runs: int) -> jax.Array:
    """``rhs`` with a matrix of zeros in front of each run of its groups."""
    length = rhs.shape[dim] // runs
    grid = rhs.reshape(*rhs.shape[:dim], runs, length, *rhs.shape[dim + 1 :])
    config = [(0, 0, 0)] * grid.ndim
    config[dim + 1] = (1, 0, 0)
    wide = lax.pad(grid, jnp.zeros((), rhs.dtype), config)
    return wide.reshape(*rhs.shape[:dim], runs * (length + 1), *rhs.shape[dim + 1 :])


LOCALS: Mapping[str, LocalFn] = {"ragged_dot_general": _ragged_dot_general}
