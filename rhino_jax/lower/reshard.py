"""Carry out the steps of a move on the shard each device holds.

A layout hands digits of a dimension to axes (see :mod:`rhino_jax.ir.layout`), so the
local shard is the array of the digits that are left. Every step works on the same
picture: the local array is reshaped until each digit that comes or goes is a
dimension of its own, the collective replaces leading dimensions, and the rest is
reshaped back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rhino_jax.ir.layout import Layout, Split, padded_size
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    EMBED,
    FREE,
    MASK,
    PERMUTE,
    REDUCE_SCATTER,
    SLICE,
    Move,
    Step,
)

Pairs = Sequence[tuple[int, int]]
"""(from, to): numbers of devices."""

LANES, TILE = 128, 8 * 128
"""Elements in a row, and in a tile, of a TPU's vector memory."""


@dataclass(frozen=True)
class Here(Mesh):
    """The mesh during one turn of the accumulation loop: ``turn`` is its int32 number.

    A device learns its index along other axes from JAX, along time from the loop.
    """

    turn: jax.Array | None = field(default=None, compare=False)


def index_along(axis: str, mesh: Mesh) -> jax.Array:
    """int32 []: where along ``axis`` this device, in this turn, stands."""
    if axis != TIME:
        return lax.axis_index(axis)
    assert isinstance(mesh, Here) and mesh.turn is not None, "time stands still here"
    return mesh.turn


def hand_on(x: jax.Array, axes: tuple[str, ...], pairs: Pairs, mesh: Mesh) -> jax.Array:
    """``x`` of device ``a`` on device ``b`` for every pair, zeros where none comes.

    Devices are numbered along ``axes``, the first outermost, as by ``lax.axis_index``;
    ``lax.ppermute`` numbers them in the order of the mesh, whatever it is given.
    """
    ordered = mesh.in_order(axes)
    numbers = np.arange(mesh.group_size(axes)).reshape([mesh.size(a) for a in ordered])
    place = numbers.transpose([ordered.index(a) for a in axes]).reshape(-1).tolist()
    return lax.ppermute(x, ordered, [(place[a], place[b]) for a, b in pairs])


def run_move(x: jax.Array, shape: tuple[int, ...], move: Move, mesh: Mesh) -> jax.Array:
    """``x``, the local shard of a value of global ``shape``, after every step."""
    for step in move.steps:
        x = run_step(x, shape, step, mesh)
    return x


def run_step(x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh) -> jax.Array:
    """``x`` after one step."""
    if mesh.group_size(step.axes) == 1 and step.kind != PERMUTE:
        return x
    assert TIME not in step.axes or step.kind in FREE, f"{step.kind} between turns"
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(x)
        words = jax.random.key_data(x)
        tail = (*shape, *words.shape[x.ndim :])
        moved = run_step(words, tail, _with_key_words(step, words.ndim - x.ndim), mesh)
        return jax.random.wrap_key_data(moved, impl=impl)
    return _RUN[step.kind](x, shape, step, mesh)


def _with_key_words(step: Step, extra: int) -> Step:
    pad = ((),) * extra
    return Step(
        step.kind,
        step.axes,
        Layout((*step.source.dims, *pad), step.source.partial),
        Layout((*step.target.dims, *pad), step.target.partial),
        step.wire_bytes,
    )


def _all_reduce(
    x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh
) -> jax.Array:
    operator = step.source.operator(step.axes[0])
    assert operator is not None
    return reduce_over(x, operator, step.axes)


def reduce_over(x: jax.Array, operator: str, axes: tuple[str, ...]) -> jax.Array:
    """The terms of ``x`` along ``axes`` combined by ``operator``."""
    if x.dtype == jnp.bool_:
        byte = reduce_over(x.astype(jnp.uint8), operator, axes)
        return byte.astype(jnp.bool_)
    if operator == "sum":
        return lax.psum(x, axes)
    return lax.pmax(x, axes) if operator in ("max", "or") else lax.pmin(x, axes)


def _permute(x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh) -> jax.Array:
    a, b = step.axes
    n = mesh.size(a)
    # Device (i, j) of the product axis hands its shard to (j, i).
    pairs = [(i * n + j, j * n + i) for i in range(n) for j in range(n)]
    return lax.ppermute(x, (a, b), pairs)


def _mask(x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh) -> jax.Array:
    """Keep the value on the first shard; elsewhere the neutral element."""
    first = jnp.bool_(True)
    for axis in step.axes:
        first &= index_along(axis, mesh) == 0
    operator = step.target.operator(step.axes[0])
    assert operator is not None
    return jnp.where(first, x, neutral(operator, x.dtype))


def neutral(operator: str, dtype: np.dtype) -> jax.Array:
    """What ``operator`` leaves a term unchanged by.

    >>> float(neutral("sum", np.dtype("float32")))
    0.0
    """
    if operator in ("max", "min"):
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.array(-np.inf if operator == "max" else np.inf, dtype)
        if dtype == jnp.bool_:
            return jnp.array(operator == "min", dtype)
        info = jnp.iinfo(dtype)
        return jnp.array(info.min if operator == "max" else info.max, dtype)
    return jnp.array(operator == "and", dtype)


@dataclass(frozen=True)
class _Piece:
    """A part of one dimension: the axis that takes it, or "" for what stays."""

    size: int
    axis: str = ""
    before: bool = True  # present locally before the step
    after: bool = True  # present locally after the step


def _pieces(shape: tuple[int, ...], step: Step, mesh: Mesh) -> list[list[_Piece]]:
    """Every dimension as the parts that stay and the digits that come or go."""
    found = []
    moving = set(step.axes)
    for n, old, new in zip(shape, step.source.dims, step.target.dims, strict=True):
        high = max(padded_size(n, old, mesh), padded_size(n, new, mesh))
        items: dict[Split, tuple[bool, bool]] = {}
        for split in old:
            # A digit that leaves its axis is absent before and present after.
            items[split] = (False, split.axis in moving)
        for split in new:
            if split.axis in moving:
                items[split] = (True, False)
        pieces = []
        for split in sorted(items, key=lambda s: -s.stride):
            size = mesh.size(split.axis)
            pieces.append(_Piece(high // (split.stride * size)))
            before, after = items[split]
            if before or after:
                pieces.append(_Piece(size, split.axis, before, after))
            high = split.stride
        found.append([*pieces, _Piece(high)])
    return found


def outside(shape: tuple[int, ...], step: Step, mesh: Mesh) -> int:
    """Of a gather or scatter along one axis: how many runs of elements of one device
    follow one another in the dimension that is whole on one side."""
    (axis,) = step.axes
    for dim in _pieces(shape, step, mesh):
        local = [p for p in dim if p.before or p.after]
        for place, piece in enumerate(local):
            if piece.axis == axis:
                return math.prod(p.size for p in local[:place])
    raise AssertionError(f"{axis} moves no digit of {step}")


def _padded(x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh) -> jax.Array:
    """``x`` padded with zeros where the target is more ragged than the source.

    Local elements lie in the order of their global indices, so a shard's part of the
    pad comes last, whatever digits are split already.
    """
    widths = []
    for n, old, new in zip(shape, step.source.dims, step.target.dims, strict=True):
        high = max(padded_size(n, old, mesh), padded_size(n, new, mesh))
        parts = mesh.group_size(tuple(split.axis for split in old))
        widths.append((0, (high - padded_size(n, old, mesh)) // parts))
    return jnp.pad(x, widths) if any(w for _, w in widths) else x


def _cut(x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh) -> jax.Array:
    """``x`` without the pad that a ragged source left behind."""
    local = step.target.local_shape(shape, mesh)
    if x.shape == local:
        return x
    return lax.slice(x, (0,) * x.ndim, local)


def _expose(
    x: jax.Array, pieces: list[list[_Piece]], axes: tuple[str, ...]
) -> tuple[jax.Array, list[_Piece]]:
    """``x`` with the digits of ``axes`` in front, in that order, and what follows."""
    flat = [p for dim in pieces for p in dim if p.before]
    x = x.reshape([p.size for p in flat])
    front = [next(i for i, p in enumerate(flat) if p.axis == a) for a in axes]
    rest = [i for i in range(len(flat)) if i not in front]
    return x.transpose(*front, *rest), [flat[i] for i in rest]


def _restore(
    x: jax.Array,
    pieces: list[list[_Piece]],
    axes: tuple[str, ...],
    local: tuple[int, ...],
) -> jax.Array:
    """The inverse of exposing, for digits of ``axes`` that now stand in front."""
    flat = [p for dim in pieces for p in dim if p.after]
    spot = {axis: i for i, axis in enumerate(axes)}
    order, next_rest = [], len(axes)
    for piece in flat:
        if piece.axis:
            order.append(spot[piece.axis])
        else:
            order.append(next_rest)
            next_rest += 1
    x = x.transpose(*order)
    sizes = [math.prod(p.size for p in dim if p.after) for dim in pieces]
    return x.reshape(sizes)


def _slice(x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh) -> jax.Array:
    pieces = _pieces(shape, step, mesh)
    x, _ = _expose(_padded(x, shape, step, mesh), pieces, step.axes)
    for axis in step.axes:
        x = lax.dynamic_index_in_dim(x, index_along(axis, mesh), 0, keepdims=False)
    return _restore(x, pieces, (), shape)


def _merge_front(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(math.prod(x.shape[:count]), *x.shape[count:])


def _split_front(x: jax.Array, axes: tuple[str, ...], mesh: Mesh) -> jax.Array:
    return x.reshape(*(mesh.size(a) for a in axes), *x.shape[1:])


def _reduce_scatter(
    x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh
) -> jax.Array:
    pieces = _pieces(shape, step, mesh)
    x, _ = _expose(_padded(x, shape, step, mesh), pieces, step.axes)
    x = _merge_front(x, len(step.axes))
    shard = x.shape[1:]
    if len(shard) > 2 and math.prod(shard) % TILE == 0:
        # A TPU scatters rows of whole tiles; a kernel's small dimensions it would
        # all-reduce.
        x = x.reshape(x.shape[0], -1, LANES)
    x = lax.psum_scatter(x, step.axes, scatter_dimension=0, tiled=False)
    return _restore(x.reshape(shard), pieces, (), shape)


def _all_gather(
    x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh
) -> jax.Array:
    pieces = _pieces(shape, step, mesh)
    x, _ = _expose(x, pieces, ())
    x = lax.all_gather(x, step.axes, axis=0, tiled=False)
    x = _split_front(x, step.axes, mesh)
    return _cut(_restore(x, pieces, step.axes, shape), shape, step, mesh)


def put_together(
    turns: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh
) -> jax.Array:
    """The all-gather over time: [turns, *shard] of every turn's rows as one shard."""
    if jnp.issubdtype(turns.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(turns)
        words = jax.random.key_data(turns)
        extra = words.ndim - turns.ndim
        wide = _with_key_words(step, extra)
        tail = (*shape, *words.shape[turns.ndim :])
        moved = put_together(words, tail, wide, mesh)
        return jax.random.wrap_key_data(moved, impl=impl)
    assert step.kind == ALL_GATHER and step.axes == (TIME,), step
    pieces = _pieces(shape, step, mesh)
    flat = [p.size for dim in pieces for p in dim if p.before]
    x = turns.reshape(turns.shape[0], *flat)
    return _cut(_restore(x, pieces, step.axes, shape), shape, step, mesh)


def _all_to_all(
    x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh
) -> jax.Array:
    pieces = _pieces(shape, step, mesh)
    x, _ = _expose(_padded(x, shape, step, mesh), pieces, step.axes)
    x = _merge_front(x, len(step.axes))
    x = lax.all_to_all(x, step.axes, split_axis=0, concat_axis=0, tiled=True)
    x = _split_front(x, step.axes, mesh)
    return _cut(_restore(x, pieces, step.axes, shape), shape, step, mesh)


def _embed(x: jax.Array, shape: tuple[int, ...], step: Step, mesh: Mesh) -> jax.Array:
    """One's own part in its place among zeros: a term of the sum that is the value."""
    pieces = _pieces(shape, step, mesh)
    x, _ = _expose(x, pieces, ())
    operator = step.target.operator(step.axes[0])
    assert operator is not None
    fill = neutral(operator, x.dtype)
    for axis in reversed(step.axes):
        wide = jnp.full((mesh.size(axis), *x.shape), fill, x.dtype)
        x = lax.dynamic_update_index_in_dim(wide, x, index_along(axis, mesh), 0)
    return _cut(_restore(x, pieces, step.axes, shape), shape, step, mesh)


_RUN = {
    ALL_REDUCE: _all_reduce,
    REDUCE_SCATTER: _reduce_scatter,
    ALL_GATHER: _all_gather,
    ALL_TO_ALL: _all_to_all,
    PERMUTE: _permute,
    SLICE: _slice,
    MASK: _mask,
    EMBED: _embed,
}
