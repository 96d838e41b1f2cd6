"""Convolutions and pooling on a shard: the same, with local counts and windows.

A split group leaves fewer groups. Where the place inside a block is split, the block
is smaller: the stride (or, in a weight's gradient, the dilation) that steps from one
block to the next is the local size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands
from rhino_jax.rules import convolution

_COUNTS = ("feature_group_count", "batch_group_count")


def _conv_general_dilated(shard: Shard, x: jax.Array, w: jax.Array) -> jax.Array:
    changed: dict[str, Any] = {}
    if shard.is_split("g"):
        (count,) = (name for name in _COUNTS if shard.params[name] > 1)
        changed[count] = shard.size("g")
    changed["window_strides"] = _local(shard, "w", shard.params["window_strides"])
    changed["rhs_dilation"] = _local(shard, "t", shard.params["rhs_dilation"])
    return shard.bind(x, w, **changed)


def _pool(shard: Shard, x: jax.Array) -> jax.Array:
    window = _local(shard, "w", shard.params["window_dimensions"])
    strides = _local(shard, "w", shard.params["window_strides"])
    return shard.bind(x, window_dimensions=window, window_strides=strides)


def _local(shard: Shard, letter: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """``sizes`` by spatial dimension, local where factor ``letter`` of it is split."""
    return tuple(
        shard.size(f"{letter}{i}") if shard.is_split(f"{letter}{i}") else size
        for i, size in enumerate(sizes)
    )


_POOLS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")

LOCALS: Mapping[str, LocalFn] = {
    **dict.fromkeys(convolution.RULES, as_it_stands),
    **dict.fromkeys(_POOLS, _pool),
    "conv_general_dilated": _conv_general_dilated,
}
