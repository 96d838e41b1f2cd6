"""Cutting and joining on a shard: sizes and offsets scale with the period's part."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands


def _scaled(shard: Shard, dim: int, offset: int, step: int) -> int:
    """A global offset along ``dim`` as an offset on the shard.

    ``offset`` counts elements; it is a multiple of the period, but for a rest below
    ``step`` (see :func:`rhino_jax.rules.assembly.periodic`).
    """
    name = f"i{dim}"
    blocks, rest = divmod(offset, step)
    if not shard.is_split(name):
        return offset
    periods, within = divmod(blocks, shard.rule.factor(name).size)
    assert within == 0, f"offset {offset} of {shard.op.kind} cuts into {name}"
    return periods * shard.size(name) * step + rest


def _slice(shard: Shard, x: jax.Array) -> jax.Array:
    params, sizes = shard.params, shard.shape()
    steps = params["strides"] or (1,) * len(sizes)
    starts = tuple(
        _scaled(shard, d, start, step)
        for d, (start, step) in enumerate(
            zip(params["start_indices"], steps, strict=True)
        )
    )
    limits = tuple(
        start + max((size - 1) * step + 1, 0)
        for start, size, step in zip(starts, sizes, steps, strict=True)
    )
    return shard.bind(x, start_indices=starts, limit_indices=limits)


def _pad(shard: Shard, x: jax.Array, value: jax.Array) -> jax.Array:
    config = []
    for d, (low, _, interior) in enumerate(shard.params["padding_config"]):
        size = x.shape[d]
        low = _scaled(shard, d, low, interior + 1)
        spread = size + max(size - 1, 0) * interior
        config.append((low, shard.shape()[d] - low - spread, interior))
    return shard.bind(x, value, padding_config=tuple(config))


def _tile(shard: Shard, x: jax.Array) -> jax.Array:
    reps = tuple(
        count if count == 1 else shard.size(f"r{d}")
        for d, count in enumerate(shard.params["reps"])
    )
    return shard.bind(x, reps=reps)


LOCALS: Mapping[str, LocalFn] = {
    "slice": _slice,
    "pad": _pad,
    "concatenate": as_it_stands,
    "stack": as_it_stands,
    "unstack": as_it_stands,
    "rev": as_it_stands,
    "tile": _tile,
    "bitcast_convert_type": as_it_stands,
}
