"""Arrays of one worker brought to others, where their devices are of several processes.

They cross by a program over the devices of all workers that take part, each device's
part to the device of the same place. Every process that has one of them enters it, at
the same place of one order for all processes: so none waits for one that waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rhino_jax import compat

WORKER, DEVICE = "worker", "device"

Parts = Mapping[Any, jax.Array]
"""What each device of this process holds of an array."""


def devices_of(where: Any) -> tuple[Any, ...]:
    """The devices of a worker, given its mesh or its only device."""
    if isinstance(where, jax.sharding.Mesh):
        return tuple(where.devices.flat)
    return (where,)


def is_here(device: Any) -> bool:
    """Whether this process drives ``device``."""
    return bool(device.process_index == jax.process_index())


def parts_of(x: jax.Array | None) -> Parts:
    """What the devices of this process hold of ``x``; None is held elsewhere."""
    if x is None:
        return {}
    return {shard.device: shard.data for shard in x.addressable_shards}


@dataclass
class Turns:
    """Programs over several processes, entered one after the other.

    CPU devices need it (JAX 0.10.2): XLA has threads for one such program, and keeps
    no order between those that run on one device of a process and those that run on
    more. Two processes could each wait in the one that the other has not begun. What
    runs within a process may run beside. Elsewhere devices keep the order.
    """

    wait: bool
    last: jax.Array | None = None

    def enter(self, program: Any, args: Sequence[Any]) -> Any:
        """What ``program`` gives, once the one before has ended."""
        self.end()
        outs = program(*args)
        if self.wait and outs:
            self.last = min(outs, key=lambda x: x.size)
        return outs

    def end(self) -> None:
        """Wait for the last one."""
        if self.last is not None:
            self.last.block_until_ready()
        self.last = None


@dataclass(frozen=True)
class Crossing:
    """From the first of ``workers`` to the second; to all of them where ``to_all``.

    Each is as many devices. A device that gets nothing gives zeros, which are kept.
    """

    workers: tuple[tuple[Any, ...], ...]
    turns: Turns
    to_all: bool = False
    empty: dict[Any, jax.Array] = field(default_factory=dict, compare=False)

    @cached_property
    def sharding(self) -> NamedSharding:
        """Every device's own part, one behind the other."""
        grid = np.array(self.workers, object)
        mesh = jax.sharding.Mesh(grid, (WORKER, DEVICE))
        return NamedSharding(mesh, PartitionSpec((WORKER, DEVICE)))

    @cached_property
    def program(self) -> Any:
        def bring(x: jax.Array) -> jax.Array:
            if self.to_all:
                return jax.lax.all_gather(x, WORKER)[0]
            return jax.lax.ppermute(x, WORKER, [(0, 1)])

        def cross(*parts: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(map(bring, parts))

        spec = self.sharding.spec
        inside = jax.shard_map(
            cross,
            mesh=self.sharding.mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
        return jax.jit(inside)

    def __call__(
        self, sent: Sequence[Parts], avals: Sequence[jax.ShapeDtypeStruct]
    ) -> list[Parts]:
        """What the devices of this process got.

        Args:
            sent: what they hold of every array; nothing, where that is nowhere here.
            avals: of every array, the part of one device.
        """
        given = list(map(self._entered, sent, avals))
        arrived = self.turns.enter(self.program, given)
        return [
            {device: _received(x, aval) for device, x in parts_of(whole).items()}
            for whole, aval in zip(arrived, avals, strict=True)
        ]

    def carried(
        self,
        arrays: Sequence[jax.Array | None],
        kinds: Sequence[jax.ShapeDtypeStruct],
        targets: Sequence[Sharding],
    ) -> list[jax.Array]:
        """``arrays`` laid as ``targets`` say; ``kinds`` are their shapes and dtypes."""
        pairs = list(zip(kinds, targets, strict=True))
        parts = [
            jax.ShapeDtypeStruct(where.shard_shape(kind.shape), kind.dtype)
            for kind, where in pairs
        ]
        arrived = self([parts_of(x) for x in arrays], parts)
        return [
            jax.make_array_from_single_device_arrays(
                kind.shape,
                where,
                # In the sharding's own order, which keys are not brought into.
                [part[d] for d in where.addressable_devices_indices_map(kind.shape)],
                dtype=kind.dtype,
            )
            for (kind, where), part in zip(pairs, arrived, strict=True)
        ]

    def _entered(self, parts: Parts, aval: jax.ShapeDtypeStruct) -> jax.Array:
        wire = jax.eval_shape(_wired, aval)
        source = self.workers[0]
        devices = [d for worker in self.workers for d in worker if is_here(d)]
        held = [
            _wired(parts[device]) if device in source else self._zeros(wire, device)
            for device in devices
        ]
        assert all((x.shape, x.dtype) == (wire.shape, wire.dtype) for x in held), (
            f"{[(x.shape, x.dtype) for x in held]} crosses as {wire}"
        )
        count = self.sharding.num_devices
        shape = (count * wire.shape[0], *wire.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, held)

    def _zeros(self, wire: jax.ShapeDtypeStruct, device: Any) -> jax.Array:
        name = wire.shape, wire.dtype, device
        if name not in self.empty:
            self.empty[name] = jnp.zeros(wire.shape, wire.dtype, device=device)
        return self.empty[name]


def _wired(x: jax.Array) -> jax.Array:
    """A part as it crosses: keys as words, and at least one dimension."""
    if compat.is_key(x):
        x = jax.random.key_data(x)
    return x.reshape((1,)) if not x.ndim else x


def _received(x: jax.Array, aval: jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of :func:`_wired`."""
    if compat.is_key(aval):
        data = x.reshape((*aval.shape, x.shape[-1]))
        return jax.random.wrap_key_data(data, impl=compat.key_impl(aval.dtype))
    return x.reshape(aval.shape) if x.shape != aval.shape else x
