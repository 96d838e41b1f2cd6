"""Arrays of several processes: made of what each holds, and taken back whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rhino_jax import compat
from rhino_jax.api.entry import aval_of
from rhino_jax.errors import ProcessError
from rhino_jax.ir.spans import spans
from rhino_jax.runtime.publish import agreed, group_of

_EQUAL_ROWS = "Give every process as many rows: drop or pad the rest."

Shape = tuple[int, ...]
Devices = frozenset[Any]


def from_whole(x: Any, where: Sharding) -> jax.Array:
    """A global array laid as ``where`` says; every process holds ``x`` whole."""
    shape, dtype, weak = aval_of(x)
    if not where.addressable_devices:
        return compat.absent(shape, dtype, weak, where)
    if compat.is_key(x):
        data = from_whole(_host(x), where)
        wrap = partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
        return jax.jit(wrap, out_shardings=where)(data)
    host = _host(x)
    made = jax.make_array_from_callback(shape, where, lambda index: host[index])
    return compat.as_weak(made) if weak else made


def laid(x: Any, where: Sharding) -> jax.Array:
    """``x`` laid as ``where`` says; every process holds it whole, or it is global.

    Raises:
        ProcessError: it lies on devices of other processes than it is wanted on.
    """
    held = getattr(x, "is_fully_addressable", True)
    if held and where.is_fully_addressable:
        return jax.device_put(x, where)
    if held:
        return from_whole(x, where)
    if ranks_of(x.sharding.device_set) != ranks_of(where.device_set):
        raise ProcessError(
            f"an array {x.dtype}{list(x.shape)} lies on devices of process "
            f"{spans(ranks_of(x.sharding.device_set))}, and is wanted on those of "
            f"{spans(ranks_of(where.device_set))}: hand it over as NumPy arrays, "
            "place(fetch(state)), or by save and restore"
        )
    return jax.device_put(x, where)


def rows_of(shape: Shape, devices: Devices) -> Shape:
    """The shape of the rows of a global array that one process brings.

    Every process of a plan on ``devices`` brings as many, the first process the first.
    A shape whose rows can not be shared out so is returned whole.
    """
    count = len(ranks_of(devices))
    if not shape or shape[0] % count:
        return shape
    return (shape[0] // count, *shape[1:])


def from_rows(rows: Any, shape: Shape, where: Sharding, devices: Devices) -> jax.Array:
    """A global array laid as ``where`` says, from this process's rows of it.

    Where the layout gives each process its own rows nothing is sent. Otherwise (the
    batch lies whole on each process, or is split within processes first) rows change
    processes; where it lies on some of the plan's ``devices`` alone, by way of all.
    """
    host = _host(rows)
    ranks = ranks_of(devices)
    first = ranks.index(jax.process_index()) * host.shape[0]

    def read(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return host[(slice(start - first, stop - first), *index[1:])]

    keeps = where.device_set == devices and _keeps_rows(where, shape)
    own = where if keeps else _by_process(devices, len(shape))
    made = jax.make_array_from_callback(shape, own, read)
    if where.device_set != devices:
        return from_whole(_whole(made), where)
    return made if own is where else jax.device_put(made, where)


@lru_cache(maxsize=1024)
def _keeps_rows(where: Sharding, shape: Shape) -> bool:
    """Whether every process needs only the rows that it brings."""
    ranks = ranks_of(where.device_set)
    each = shape[0] // len(ranks)
    places: Mapping[Any, Any] = where.devices_indices_map(shape)
    for device, index in places.items():
        start, stop, _ = index[0].indices(shape[0])
        first = ranks.index(device.process_index) * each
        if not first <= start <= stop <= first + each:
            return False
    return True


@lru_cache(maxsize=1024)
def _by_process(devices: Devices, ndim: int) -> NamedSharding:
    """Rows split by process, whole on each device of it."""
    order = sorted(devices, key=lambda d: (d.process_index, d.id))
    grid = np.array(order, object).reshape(len(ranks_of(devices)), -1)
    mesh = jax.sharding.Mesh(grid, ("process", "device"))
    return NamedSharding(mesh, PartitionSpec("process", *[None] * (ndim - 1)))


def ranks_of(devices: Collection[Any]) -> tuple[int, ...]:
    """The processes that ``devices`` belong to."""
    return tuple(sorted({device.process_index for device in devices}))


def fetched(tree: Any, devices: Devices = frozenset()) -> Any:
    """``tree`` with every array as a NumPy array (keys as keys of this process).

    Args:
        devices: of the plan, where arrays may lie on those of some of its processes
            alone (the stages of a pipeline): these are sent to all.
    """
    leaves, structure = jax.tree.flatten(tree)
    lacking = np.zeros((1, len(leaves)), bool)
    if len(ranks_of(devices)) > 1:
        lacking = _whole(_of_each(np.array([not _near(x) for x in leaves]), devices))
    found = [
        _fetched(x, list(lacks), devices)
        for x, lacks in zip(leaves, lacking.T, strict=True)
    ]
    return jax.tree.unflatten(structure, found)


def _near(x: Any) -> bool:
    """Whether this process has a part in ``x``; with the others it can have all."""
    return not isinstance(x, jax.Array) or bool(x.sharding.addressable_devices)


def _fetched(x: Any, lacks: list[bool], devices: Devices) -> Any:
    """``lacks``: which of the processes of ``devices`` have no part in ``x``."""
    if not isinstance(x, jax.Array):
        return x
    if compat.is_key(x):
        words = _fetched(words_of(x), lacks, devices)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    host = _whole(x) if _near(x) else np.zeros(x.shape, x.dtype)
    if not any(lacks):
        return host
    bytes_ = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
    from_one = _of_each(bytes_, devices)
    everywhere = NamedSharding(from_one.sharding.mesh, PartitionSpec())
    sent = picking(lacks.index(False), everywhere)(from_one)
    return np.asarray(sent).view(host.dtype).reshape(host.shape)


@lru_cache(maxsize=1024)
def picking(position: int, where: Sharding) -> Any:
    """A jitted function: one place of an array's leading dimension."""
    return jax.jit(lambda x: x[position], out_shardings=where)


def words_of(x: jax.Array) -> jax.Array:
    """The words of keys, which may be nowhere in this process."""
    if _near(x):
        return jax.random.key_data(x)
    bare = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kind = jax.eval_shape(jax.random.key_data, bare)
    return compat.absent(kind.shape, kind.dtype, False, x.sharding)


def _whole(x: jax.Array) -> np.ndarray:
    """``x`` in this process's memory; all processes that have a part in it call."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        assert isinstance(x.sharding, NamedSharding), x.sharding
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
    return np.asarray(x)


def _of_each(mine: np.ndarray, devices: Devices) -> Any:
    """What every process of ``devices`` brings, along a new leading dimension."""
    split = _by_process(devices, mine.ndim + 1)
    shape = (len(ranks_of(devices)), *mine.shape)
    return jax.make_array_from_callback(shape, split, lambda _: mine[None])


def global_shapes(batch: Any) -> Any:
    """See :func:`rhino_jax.global_shapes`."""
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


def _host(x: Any) -> np.ndarray:
    """``x`` in this process's memory, with the dtype that JAX gives it."""
    if compat.is_key(x):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x, aval_of(x)[1])
