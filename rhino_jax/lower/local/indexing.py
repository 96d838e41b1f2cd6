"""Gather, scatter and dynamic slices on a shard.

Indices are clamped or judged against the whole dimension first, as the mode says,
then turned into positions on the shard. A split position is held by one shard: a
gather gives zero elsewhere, a scatter sends the update out of bounds, where it is
dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.factors import INDEXED
from rhino_jax.ir.layout import Dim
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.local.shard import LocalFn, Shard
from rhino_jax.lower.reshard import index_along
from rhino_jax.rules.indexing import SCATTERS, Numbers, slice_sizes

_FILL = lax.GatherScatterMode.FILL_OR_DROP
_CLIP = lax.GatherScatterMode.CLIP


def locate(
    index: jax.Array, size: int, digits: Dim, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Where each global ``index`` lies: its position on a shard, and whether on ours.

    ``index`` is within ``[0, size)`` of a dimension split at ``digits``. The position
    is the number that the digits left on the shard form.
    """
    position = jnp.zeros_like(index)
    mine = jnp.ones(index.shape, jnp.bool_)
    rest, high = index, size
    for split in digits:
        span = split.stride * mesh.size(split.axis)
        position = position * (high // span) + rest // span
        rest = rest % span
        here = index_along(split.axis, mesh).astype(index.dtype)
        mine &= rest // split.stride == here
        rest, high = rest % split.stride, split.stride
    return position * high + rest, mine


def _zero(like: jax.Array) -> jax.Array:
    """The element that adds nothing to a sum, or to an or."""
    return jnp.zeros((), like.dtype)


def _is_block(size: int, digits: Dim, mesh: Mesh) -> bool:
    """Whether each shard holds one run of neighbours."""
    for split in digits:
        if split.stride * mesh.size(split.axis) != size:
            return False
        size = split.stride
    return True


# ---- gather and scatter -----------------------------------------------------------


@dataclass(frozen=True)
class _Vectors:
    """Index vectors as positions on this shard.

    ``columns`` are the components, those of split dimensions now local; ``valid`` says
    that the whole vector is in bounds, ``mine`` that this shard holds all of it.
    """

    columns: list[jax.Array]
    split: list[bool]
    valid: jax.Array
    mine: jax.Array


def _lookups(shard: Shard) -> dict[int, str]:
    """Operand dimension -> its factor, for the split dimensions that are looked up."""
    return {
        d: dim[0]
        for d, dim in enumerate(shard.rule.operands[0])
        if dim and shard.rule.factor(dim[0]).kind == INDEXED and shard.is_split(dim[0])
    }


def _vectors(
    shard: Shard, indices: jax.Array, lookups: Mapping[int, str], clip: bool
) -> _Vectors:
    taken = slice_sizes(shard.op, shard.reads)
    valid = jnp.ones(indices.shape[:-1], jnp.bool_)
    mine = valid
    columns, split = [], []
    for c, d in enumerate(Numbers.of(shard.op).mapped):
        n, column = shard.reads[0].shape[d], indices[..., c]
        # Compared in its own type, which may be too narrow for the bound.
        last = min(n - taken[d], int(jnp.iinfo(column.dtype).max))
        bounds = (jnp.array(0, column.dtype), jnp.array(last, column.dtype))
        inside = lax.clamp(bounds[0], column, bounds[1])
        if clip:
            column = inside
        else:
            valid &= inside == column
        if d in lookups:
            digits = shard.choice.on(lookups[d])
            position = inside.astype(jnp.int32)
            column, held = locate(position, n, digits, shard.mesh)
            mine &= held
        # What no longer fits in 32 bits is not valid, and is sent out of bounds.
        columns.append(column.astype(jnp.int32))
        split.append(d in lookups)
    return _Vectors(columns, split, valid, mine)


def _joined(vectors: _Vectors, dims: list[int], keep: jax.Array) -> jax.Array:
    """Index vectors again; those not kept point past the end of split dimensions."""
    columns = [
        jnp.where(keep, column, n) if is_split else column
        for column, is_split, n in zip(
            vectors.columns, vectors.split, dims, strict=True
        )
    ]
    return jnp.stack(columns, axis=-1)


def _still_sorted(shard: Shard) -> bool:
    """Whether a promise of sorted indices still holds of this shard's vectors."""
    touched = {name for dim in shard.rule.operands[1] for name in dim}
    return bool(shard.params["indices_are_sorted"]) and not any(
        shard.is_split(name) for name in touched
    )


def _first(shard: Shard, lookups: Mapping[int, str]) -> jax.Array:
    """Whether this is the first of the shards whose terms are added up."""
    first = jnp.bool_(True)
    for factor in lookups.values():
        for split in shard.choice.on(factor):
            first &= index_along(split.axis, shard.mesh) == 0
    return first


def _gather(shard: Shard, x: jax.Array, indices: jax.Array) -> jax.Array:
    numbers, lookups = Numbers.of(shard.op), _lookups(shard)
    single = (*numbers.collapsed, *numbers.batching)
    sizes = tuple(
        local if taken == whole and d not in single else taken
        for d, (taken, whole, local) in enumerate(
            zip(
                slice_sizes(shard.op, shard.reads),
                shard.reads[0].shape,
                x.shape,
                strict=True,
            )
        )
    )
    if not lookups:
        return shard.bind(
            x, indices, slice_sizes=sizes, indices_are_sorted=_still_sorted(shard)
        )
    fills = shard.params["mode"] == _FILL
    found = _vectors(shard, indices, lookups, clip=not fills)
    ends = [x.shape[d] for d in numbers.mapped]
    # Out of bounds here is out of bounds there: the primitive itself fills.
    local = _joined(found, ends, found.valid)
    out = shard.bind(x, local, slice_sizes=sizes, indices_are_sorted=False)
    # What fills must enter the sum once.
    keep = jnp.where(found.valid, found.mine, _first(shard, lookups))
    outer = [d for d in range(out.ndim) if d not in numbers.window]
    mask = lax.broadcast_in_dim(keep, out.shape, outer)
    return jnp.where(mask, out, _zero(out))


def _scatter(
    shard: Shard, x: jax.Array, indices: jax.Array, updates: jax.Array
) -> jax.Array:
    lookups = _lookups(shard)
    # Pads of a split loop over updates all point at one element.
    padded = any(
        shard.is_ragged(name) for dim in shard.rule.operands[1] for name in dim
    )
    promises = {
        "unique_indices": bool(shard.params["unique_indices"]) and not padded,
        "indices_are_sorted": _still_sorted(shard) and not lookups,
    }
    if not lookups:
        return shard.bind(x, indices, updates, **promises)
    clip = shard.params["mode"] == _CLIP
    found = _vectors(shard, indices, lookups, clip)
    ends = [x.shape[d] for d in Numbers.of(shard.op).mapped]
    local = _joined(found, ends, found.valid & found.mine)
    return shard.bind(x, local, updates, mode=_FILL, **promises)


# ---- dynamic slices ---------------------------------------------------------------


def _starts(
    whole: tuple[int, ...], taken: tuple[int, ...], starts: tuple[jax.Array, ...]
) -> list[jax.Array]:
    """int32 scalars: the starts, clamped so that the slice is within bounds."""
    found = []
    for n, size, start in zip(whole, taken, starts, strict=True):
        last = min(n - size, int(jnp.iinfo(start.dtype).max))
        low, high = jnp.array(0, start.dtype), jnp.array(last, start.dtype)
        found.append(lax.clamp(low, start, high).astype(jnp.int32))
    return found


def _along(mask: jax.Array, dim: int, rank: int) -> jax.Array:
    """A vector over dimension ``dim``, ready to broadcast."""
    return jnp.expand_dims(mask, [d for d in range(rank) if d != dim])


def _dynamic_slice(shard: Shard, x: jax.Array, *starts: jax.Array) -> jax.Array:
    whole, taken = shard.reads[0].shape, tuple(shard.op.param["slice_sizes"])
    at = _starts(whole, taken, starts)
    sizes = list(taken)
    picked: dict[int, jax.Array] = {}
    masks: list[jax.Array] = []
    for d, (n, size) in enumerate(zip(whole, taken, strict=True)):
        if n == size:
            sizes[d] = x.shape[d]
            continue
        outer, inner = shard.rule.operands[0][d], shard.rule.results[0][d]
        digits = shard.choice.on(outer[0])
        mine = shard.choice.on(inner[0]) if inner else ()
        if not digits and not mine:
            continue
        offsets = shard.index(inner[0]) if inner else jnp.zeros(1, jnp.int32)
        position, held = locate(at[d] + offsets, n, digits, shard.mesh)
        if digits:
            masks.append(_along(held, d, x.ndim))
        if len(position) == 1 or (not digits and _is_block(size, mine, shard.mesh)):
            at[d], sizes[d] = position[0], len(position)
        else:
            at[d], sizes[d] = jnp.int32(0), x.shape[d]
            picked[d] = position
    out = shard.bind(x, *at, slice_sizes=tuple(sizes))
    for d, position in picked.items():
        out = jnp.take(out, position, axis=d, mode="clip")
    if not masks:
        return out
    return jnp.where(functools.reduce(jnp.bitwise_and, masks), out, _zero(out))


def _dynamic_update_slice(
    shard: Shard, x: jax.Array, update: jax.Array, *starts: jax.Array
) -> jax.Array:
    """A window of the shard that holds the intersection is read, changed, written."""
    whole, given = shard.reads[0].shape, shard.reads[1].shape
    at = _starts(whole, given, starts)
    sizes = list(update.shape)
    masks: list[jax.Array] = []
    for d, (n, size) in enumerate(zip(whole, given, strict=True)):
        dim = shard.rule.operands[0][d]
        digits = shard.choice.on(dim[0]) if dim and n != size else ()
        if not digits:
            continue
        start, index = at[d], shard.index(dim[0])
        if size == 1:
            at[d], _ = locate(start, n, digits, shard.mesh)
        elif _is_block(n, digits, shard.mesh):
            sizes[d] = min(size, len(index))
            at[d] = jnp.clip(start - index[0], 0, len(index) - sizes[d])
        else:
            at[d], sizes[d] = jnp.int32(0), len(index)
        row = lax.dynamic_slice(index, (at[d],), (sizes[d],)) - start
        masks.append(_along((row >= 0) & (row < size), d, x.ndim))
        if size > 1:
            update = jnp.take(update, row, axis=d, mode="clip")
    if masks:
        held = lax.dynamic_slice(x, at, sizes)
        update = jnp.where(functools.reduce(jnp.bitwise_and, masks), update, held)
    return shard.bind(x, update, *at)


LOCALS: Mapping[str, LocalFn] = {
    "gather": _gather,
    **dict.fromkeys(SCATTERS, _scatter),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
