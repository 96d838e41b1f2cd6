"""What every test needs: eight CPU devices, a compilation cache, meshes, 64 bits.

JAX reads its environment once, when it is first imported, so it is set here before
anything imports JAX. A variable that is already set is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import jax

    from rhino_jax.ir.mesh import Mesh

DEVICE_COUNT = 8

# With the GPU and TPU plugins installed, JAX would try (and fail) to start them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time of the tests; level 0 leaves LLVM's own optimizations
# out. A collective that some device never joins ends the process, not after minutes.
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={DEVICE_COUNT}"
    " --xla_backend_optimization_level=0"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=30"
    " --xla_cpu_collective_call_terminate_timeout_seconds=90",
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "rhino_jax" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types for one test."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def device_mesh() -> Callable[[Mesh], jax.sharding.Mesh]:
    """A function from a mesh of ours to one of JAX over the first CPU devices.

    The time axis spans no devices and is left out. Axes are Auto: JAX's own default
    differs between its constructors.
    """
    import jax
    import numpy as np

    from rhino_jax.ir.mesh import TIME

    def build(mesh: Mesh) -> jax.sharding.Mesh:
        axes = [axis for axis in mesh.axes if axis.name != TIME]
        devices = jax.devices("cpu")
        assert mesh.num_devices <= len(devices), (
            f"mesh ({mesh}) needs {mesh.num_devices} devices; XLA_FLAGS="
            f"{os.environ['XLA_FLAGS']!r} gives {len(devices)}"
        )
        grid = np.array(devices[: mesh.num_devices], object)
        return jax.sharding.Mesh(
            grid.reshape([axis.size for axis in axes]),
            tuple(axis.name for axis in axes),
            axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
        )

    return build
