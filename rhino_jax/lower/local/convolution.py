"""Convolutions and pooling on a shard: the same, with local counts and windows.

A split group leaves fewer groups. Where the place inside a block is split, the block
is smaller: the stride (or, in a weight's gradient, the dilation) that steps from one
block to the next is the local size. Where windows overlap, a block is first joined with
its neighbours' edges, and the window moves over all of that, hardly padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax

from rhino_jax.lower.local.halo import extended, split_windows
from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands
from rhino_jax.lower.reshard import neutral
from rhino_jax.rules import convolution
from rhino_jax.rules.window import Overlap, Window

_COUNTS = ("feature_group_count", "batch_group_count")

Padding = tuple[tuple[int, int], ...]


def _conv_general_dilated(shard: Shard, x: jax.Array, w: jax.Array) -> jax.Array:
    changed: dict[str, Any] = {}
    if shard.is_split("g"):
        (count,) = (name for name in _COUNTS if shard.params[name] > 1)
        changed[count] = shard.size("g")
    changed["window_strides"] = _local(shard, "w", shard.params["window_strides"])
    changed["rhs_dilation"] = _local(shard, "t", shard.params["rhs_dilation"])
    windows = convolution.convolved(shard.op, shard.reads, shard.makes)
    changed["padding"] = _padding(shard, windows)
    if any(factor.operator for factor in split_windows(shard)):
        x, w = _apart(x, w)
    return shard.bind(*extended(shard, (x, w), (0, 0)), **changed)


def _pool(shard: Shard, x: jax.Array) -> jax.Array:
    window = _local(shard, "w", shard.params["window_dimensions"])
    strides = _local(shard, "w", shard.params["window_strides"])
    operator = _OPERATORS[shard.op.kind]
    fill = 0 if operator == "sum" else neutral(operator, x.dtype)
    (x,) = extended(shard, (x,), (fill,))
    padding = _padding(shard, _pooled(shard))
    return shard.bind(
        x, window_dimensions=window, window_strides=strides, padding=padding
    )


def _reduce_window(shard: Shard, *args: jax.Array) -> list[jax.Array]:
    """What is past the ends is the initial number."""
    count = len(args) // 2
    fills: list[jax.Array | int] = [*args[count:], *([0] * count)]
    padding = _padding(shard, _pooled(shard))
    return shard.bind(*extended(shard, args, fills), padding=padding)


def _select_and_gather_add(shard: Shard, *args: jax.Array) -> jax.Array:
    """What is past the ends is never selected, as in the op itself."""
    fills = (0, _never_selected(shard, args[1]))
    padding = _padding(shard, _pooled(shard))
    return shard.bind(*extended(shard, args, fills), padding=padding)


def _select_and_scatter_add(
    shard: Shard, source: jax.Array, operand: jax.Array
) -> jax.Array:
    """All windows that lie over this block, and of what they give its own elements."""
    factors = split_windows(shard)
    if not factors:
        return shard.bind(source, operand)
    source, operand = _apart(source, operand)
    fills = (0, _never_selected(shard, operand))
    padding = list(shard.params["padding"])
    start, stop = [0] * operand.ndim, list(operand.shape)
    for factor in factors:
        dim, _ = shard.rule.place(factor.name, 1)
        padding[dim] = (0, 0)
        (before,) = (halo.before for halo in factor.halos if halo.operand == 1)
        start[dim], stop[dim] = before, before + operand.shape[dim]
    out = shard.bind(*extended(shard, (source, operand), fills), padding=tuple(padding))
    return lax.slice(out, start, stop)


def _apart(*args: jax.Array) -> Sequence[jax.Array]:
    """``args`` of a gradient, no sooner than all are there.

    The forward pass sent the same edges: merged with these, its copies of whole blocks
    would stand until now.
    """
    return lax.optimization_barrier(args)


def _never_selected(shard: Shard, x: jax.Array) -> jax.Array:
    greatest = shard.params["select_prim"].name == "ge"
    return neutral("max" if greatest else "min", x.dtype)


def _pooled(shard: Shard) -> tuple[Window, ...]:
    """The windows of an op that pools its first operand."""
    return convolution.pooled(shard.op, shard.reads[0].shape, shard.makes[0].shape)


def _padding(shard: Shard, windows: Sequence[Window]) -> Padding:
    """The padding with which windows move over blocks with their halos."""
    padding = list(shard.params["padding"])
    for factor in split_windows(shard):
        number = int(factor.name[1:])
        found = _overlap(factor.operator, windows[number])
        padding[number] = found.padding
    return tuple(padding)


def _overlap(operator: str, window: Window) -> Overlap:
    """Of blocks of the window, where these are added up; else of the result."""
    found = window.of_window if operator else window.of_made
    assert found is not None, "a window that no rule splits"
    return found


def _local(shard: Shard, letter: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """``sizes`` by spatial dimension, local where factor ``letter`` of it is split."""
    return tuple(
        shard.size(f"{letter}{i}") if shard.is_split(f"{letter}{i}") else size
        for i, size in enumerate(sizes)
    )


_OPERATORS = {
    "reduce_window_sum": "sum",
    "reduce_window_max": "max",
    "reduce_window_min": "min",
}
"""Of primitives that pool by one."""

LOCALS: Mapping[str, LocalFn] = {
    **dict.fromkeys(convolution.RULES, as_it_stands),
    **dict.fromkeys(_OPERATORS, _pool),
    "conv_general_dilated": _conv_general_dilated,
    "reduce_window": _reduce_window,
    "select_and_gather_add": _select_and_gather_add,
    "select_and_scatter_add": _select_and_scatter_add,
}
