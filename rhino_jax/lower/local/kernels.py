"""Pallas kernels on a shard: the same kernel over a part of its grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rhino_jax.lower.local.shard import LocalFn, Shard
from rhino_jax.rules.kernels import BLOCKS, KERNEL, axis_name


def _kernel(shard: Shard, *args: jax.Array) -> Any:
    axes = {axis for dims in shard.op.param[BLOCKS] for axis, _ in dims if axis >= 0}
    sizes = {axis: shard.size(axis_name(axis)) for axis in axes}
    shapes = [x.shape for x in args]
    made = [shard.shape(i) for i in range(len(shard.makes))]
    return shard.bind(*args, **kernel_on(shard.params, sizes, shapes, made))


def kernel_on(
    params: Mapping[str, Any],
    sizes: dict[int, int],
    reads: Sequence[tuple[int, ...]],
    makes: Sequence[tuple[int, ...]],
) -> dict[str, Any]:
    """The parameters of a kernel that change on a shard.

    ``sizes``: axis of the grid -> its local size; the local shapes of operands and
    results.
    """
    grid = params["grid_mapping"]
    mappings = tuple(
        one.replace(array_aval=one.array_aval.update(shape=tuple(shape)))
        for one, shape in zip(grid.block_mappings, (*reads, *makes), strict=True)
    )
    local = tuple(sizes.get(axis, n) for axis, n in enumerate(grid.grid))
    avals = zip(params["out_avals"], makes, strict=True)
    return {
        "grid_mapping": grid.replace(grid=local, block_mappings=mappings),
        "out_avals": tuple(aval.update(shape=tuple(shape)) for aval, shape in avals),
    }


LOCALS: Mapping[str, LocalFn] = {KERNEL: _kernel}
