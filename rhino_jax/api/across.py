"""Arrays of several processes: made of what each holds, and taken back whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rhino_jax import compat
from rhino_jax.api.entry import aval_of
from rhino_jax.runtime.publish import agreed, group_of

_EQUAL_ROWS = "Give every process as many rows: drop or pad the rest."

Shape = tuple[int, ...]


def from_whole(x: Any, where: Sharding) -> jax.Array:
    """A global array laid as ``where`` says; every process holds ``x`` whole."""
    if _is_key(x):
        data = from_whole(_host(x), where)
        wrap = partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
        return jax.jit(wrap, out_shardings=where)(data)
    host = _host(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def rows_of(shape: Shape, where: Sharding) -> Shape:
    """The shape of the rows of a global array that one process brings.

    Every process brings as many, the first process the first. A shape whose rows can
    not be shared out so is returned whole.
    """
    count = len(_ranks(where))
    if not shape or shape[0] % count:
        return shape
    return (shape[0] // count, *shape[1:])


def from_rows(rows: Any, shape: Shape, where: Sharding) -> jax.Array:
    """A global array laid as ``where`` says, from this process's rows of it.

    Where the layout gives each process its own rows nothing is sent. Otherwise (the
    batch lies whole on each process, or is split within processes first) rows change
    processes.
    """
    host = _host(rows)
    ranks = _ranks(where)
    first = ranks.index(jax.process_index()) * host.shape[0]
    own = where if _keeps_rows(where, shape) else _by_process(where, len(shape))

    def read(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return host[(slice(start - first, stop - first), *index[1:])]

    made = jax.make_array_from_callback(shape, own, read)
    return made if own is where else jax.device_put(made, where)


@lru_cache(maxsize=1024)
def _keeps_rows(where: Sharding, shape: Shape) -> bool:
    """Whether every process needs only the rows that it brings."""
    ranks = _ranks(where)
    each = shape[0] // len(ranks)
    places: Mapping[Any, Any] = where.devices_indices_map(shape)
    for device, index in places.items():
        start, stop, _ = index[0].indices(shape[0])
        first = ranks.index(device.process_index) * each
        if not first <= start <= stop <= first + each:
            return False
    return True


@lru_cache(maxsize=1024)
def _by_process(where: Sharding, ndim: int) -> NamedSharding:
    """Rows split by process, whole on each device of it."""
    devices: Iterable[Any] = where.device_set
    order = sorted(devices, key=lambda d: (d.process_index, d.id))
    grid = np.array(order, object).reshape(len(_ranks(where)), -1)
    mesh = jax.sharding.Mesh(grid, ("process", "device"))
    return NamedSharding(mesh, PartitionSpec("process", *[None] * (ndim - 1)))


@lru_cache(maxsize=1024)
def _ranks(where: Sharding) -> tuple[int, ...]:
    devices: Iterable[Any] = where.device_set
    return tuple(sorted({device.process_index for device in devices}))


def fetched(tree: Any) -> Any:
    """``tree`` with every array as a NumPy array (keys as keys of this process)."""
    return jax.tree.map(_fetched, tree)


def _fetched(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if not (x.is_fully_addressable or x.is_fully_replicated):
        assert isinstance(x.sharding, NamedSharding), x.sharding
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
    if _is_key(x):
        data: Any = np.asarray(jax.random.key_data(x))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return np.asarray(x)


def global_shapes(batch: Any) -> Any:
    """The shapes of the global batch that every process brings equal rows of.

    Plan with them: ``train_step.init(init_fn, rng, rhino.global_shapes(batch))``, then
    ``train_step.shard_batch(batch)`` takes the rows of each process. Every process must
    call it. On one process they are the batch's own shapes.

    Args:
        batch: this process's rows; every array's first dimension are rows.

    Raises:
        ProcessError: processes bring other trees, shapes or dtypes (which, by process).

    >>> global_shapes({"x": np.zeros((4, 2), np.float32)})
    {'x': ShapeDtypeStruct(shape=(4, 2), dtype=float32)}
    """
    group = None if compat.key_values() is None else group_of(jax.devices())
    count = len(group.ranks) if group else 1
    if group is not None:
        leaves = jax.tree.leaves_with_path(batch)
        rows = {jax.tree_util.keystr(path): _said(x) for path, x in leaves}
        facts = {"process's part of the batch": rows}
        agreed(group, "global_shapes", facts, lambda: "", _EQUAL_ROWS)
    return jax.tree.map(lambda x: _times(x, count), batch)


def _said(x: Any) -> str:
    shape, dtype, _ = aval_of(x)
    return f"{dtype}{list(shape)}"


def _times(x: Any, count: int) -> jax.ShapeDtypeStruct:
    shape, dtype, weak = aval_of(x)
    whole = (shape[0] * count, *shape[1:]) if shape else shape
    return jax.ShapeDtypeStruct(whole, dtype, weak_type=weak)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(
        x.dtype, jax.dtypes.prng_key
    )


def _host(x: Any) -> np.ndarray:
    """``x`` in this process's memory, with the dtype that JAX gives it."""
    if _is_key(x):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x, aval_of(x)[1])
