"""What users have split by hand, on a shard.

Collectives inside a ``shard_map`` run as they stand, over axes of the plan's mesh that
bear the same names. JAX types what a device has by the axes over which it varies; in
the plan's one manual program it does not, so what only changes that type changes
nothing, and what is typed to be the same everywhere is an ordinary collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from rhino_jax import compat
from rhino_jax.errors import RuleError, problems
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.program import Value
from rhino_jax.ir.steps import named_axes
from rhino_jax.lower.devices import abstract_mesh
from rhino_jax.lower.local.shard import LocalFn, Shard
from rhino_jax.rules.manual import PARTITIONED


def _pvary(shard: Shard, x: jax.Array) -> Any:
    return x


def _psum(shard: Shard, x: jax.Array) -> Any:
    return lax.psum(x, named_axes(shard.op))


def _all_gather(shard: Shard, x: jax.Array) -> Any:
    param = shard.params
    return lax.all_gather(
        x,
        named_axes(shard.op),
        axis=param["all_gather_dimension"],
        tiled=param["tiled"],
    )


def _partitioned(shard: Shard, *args: jax.Array) -> Any:
    """What ``partition`` gives for arrays that lie as they do here.

    Raises:
        RuleError: it wants them to lie otherwise than its own rule lets them.
    """
    if not any(axis != TIME for axis in shard.choice.axes):
        return shard.bind(*args)
    param = shard.params
    ins, outs = param["in_tree"], param["out_tree"]
    mesh = abstract_mesh(Mesh(tuple(a for a in shard.mesh.axes if a.name != TIME)))
    wanted, given = shard.layouts
    reads = [
        _placed(value, layout, shard.mesh, mesh)
        for value, layout in zip(shard.reads, wanted, strict=True)
    ]
    makes = [
        _placed(value, layout, shard.mesh, mesh)
        for value, layout in zip(shard.makes, given, strict=True)
    ]
    _, run, made, read = param["partition"](
        *param["static_args"], mesh, ins.unflatten(reads), outs.unflatten(makes)
    )
    _check_as_asked(shard, reads, ins.flatten_up_to(read))
    _check_as_asked(shard, makes, outs.flatten_up_to(made))
    return jax.tree.leaves(run(*ins.unflatten(args)))


def _placed(value: Value, layout: Layout, wide: Mesh, mesh: Any) -> Any:
    """A value as all devices see it, where it lies, in one turn of a loop over time."""
    over = layout.without((TIME,))
    shape = [
        n * wide.group_size(tuple(split.axis for split in dim))
        for n, dim in zip(layout.local_shape(value.shape, wide), over.dims, strict=True)
    ]
    spec = PartitionSpec(*(tuple(split.axis for split in dim) for dim in over.dims))
    dtype = compat.dtype_named(value.dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _check_as_asked(shard: Shard, asked: Sequence[Any], have: Sequence[Any]) -> None:
    wrong = [
        f"{x.shape}: {y.spec} instead of {x.sharding.spec}"
        for x, y in zip(asked, have, strict=True)
        if not y.is_equivalent_to(x.sharding, len(x.shape))
    ]
    if wrong:
        raise RuleError(
            problems(
                f"{shard.op.where}: partition wants arrays otherwise than its "
                "sharding_rule lets them lie:",
                wrong,
                "Name what must be whole in need_replication_factors.",
            )
        )


LOCALS: Mapping[str, LocalFn] = {
    "pvary": _pvary,
    "psum_invariant": _psum,
    "all_gather_invariant": _all_gather,
    PARTITIONED: _partitioned,
}
