"""A pipeline's state spread over all devices of several processes, and brought back.

Orbax saves and reads arrays that every process has a part of. A leaf of a stage lies on
one worker's devices: on its way to a checkpoint it is divided among all workers where
one of its dimensions can be, so that the state takes its own size once more. Leaf by
leaf, each waited for: programs over several processes that need nothing of one another
run in no certain order on CPU devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rhino_jax import compat
from rhino_jax.api.across import picking, words_of
from rhino_jax.ir.mesh import STAGE
from rhino_jax.runtime.crossing import is_here, parts_of


@dataclass(frozen=True)
class Spreading:
    """Between the workers of a mesh with a leading axis over them, and all of it."""

    mesh: Mesh

    @cached_property
    def workers(self) -> Sequence[frozenset[Any]]:
        """The devices of every worker."""
        rows = self.mesh.devices.reshape(self.mesh.devices.shape[0], -1)
        return [frozenset(row) for row in rows]

    def sharding(self, shape: Sequence[int], home: Sharding) -> NamedSharding:
        """How a leaf lies when it is spread: as at home, and over the workers too."""
        spec = compat.partitions(_spec(home))
        entries = [*spec, *[()] * (len(shape) - len(spec))]
        sizes = dict(self.mesh.shape)
        for i, names in enumerate(entries):
            parts = math.prod(sizes[name] for name in names) * sizes[STAGE]
            if shape[i] and shape[i] % parts == 0:
                entries[i] = (STAGE, *names)
                break
        return NamedSharding(self.mesh, PartitionSpec(*[e or None for e in entries]))

    def spread(self, x: jax.Array, home: Sharding) -> jax.Array:
        """``x``, which lies as ``home`` says, over all workers."""
        where = self.sharding(x.shape, home)
        if compat.is_key(x):
            words = self._spread(words_of(x), home, where)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
        return self._spread(x, home, where)

    def _spread(self, x: jax.Array, home: Sharding, where: Sharding) -> jax.Array:
        here = parts_of(x)
        empty = jax.ShapeDtypeStruct((1, *home.shard_shape(x.shape)), x.dtype)
        stacked = NamedSharding(self.mesh, PartitionSpec(STAGE, *_spec(home)))
        held = [
            here[device][None]
            if device in here
            else jnp.zeros(empty.shape, empty.dtype, device=device)
            for device in self.mesh.devices.flat
            if is_here(device)
        ]
        shape = (len(self.workers), *x.shape)
        all_rows = jax.make_array_from_single_device_arrays(shape, stacked, held)
        worker = self.workers.index(frozenset(home.device_set))
        return jax.block_until_ready(picking(worker, where)(all_rows))

    def back(self, x: jax.Array, home: Sharding) -> jax.Array:
        """The inverse of :meth:`spread`."""
        if compat.is_key(x):
            words = self.back(jax.random.key_data(x), home)
            if not home.addressable_devices:
                return compat.absent(x.shape, x.dtype, False, home)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
        weak = bool(x.weak_type)
        everywhere = NamedSharding(self.mesh, _spec(home))
        parts = parts_of(jax.block_until_ready(jax.device_put(x, everywhere)))
        if not home.addressable_devices:
            return compat.absent(x.shape, x.dtype, weak, home)
        held = [parts[device] for device in home.addressable_devices]
        made = jax.make_array_from_single_device_arrays(x.shape, home, held)
        return compat.as_weak(made) if weak else made


def _spec(home: Sharding) -> PartitionSpec:
    return home.spec if isinstance(home, NamedSharding) else PartitionSpec()
