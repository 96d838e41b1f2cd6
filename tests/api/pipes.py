"""What tests of pipelines share: meshes of workers, equality with the plain step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.equality import STATE_TOLERANCE, worst_leaf


def mesh(workers: int, **axes: int) -> jax.sharding.Mesh:
    """The first devices, with a leading axis over the workers."""
    sizes = {"stage": workers, **axes}
    shape = tuple(sizes.values())
    devices = np.array(jax.devices()[: int(np.prod(shape))], object)
    return jax.sharding.Mesh(devices.reshape(shape), tuple(sizes))


def check_equal(step: Any, state: Any, batch: Any, piped: Any, count: int = 2) -> None:
    """``count`` steps one after the other, state and metrics."""
    state = jax.device_get(state)
    now, expected = piped.place(state, batch), state
    for _ in range(count):
        now, found = piped(now, batch)
        expected, wanted = jax.jit(step)(expected, batch)
        error, path = worst_leaf((expected, wanted), (now, found))
        assert error <= STATE_TOLERANCE, f"{path}: {error}"
