"""A device that the catalogue does not know, measured: about 20 seconds, once.

Square products by type, a copy through memory, and an all-reduce of a small and of a
large array among the devices of one host. What is measured is what is reached, not what
a data sheet promises; it is kept beside the plans.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rhino_jax.api.cache import write_whole
from rhino_jax.cluster.hardware import CATALOGUE, CUDA, GIGA, TERA, Device
from rhino_jax.cluster.kernels import ELEMENTWISE, PRODUCT
from rhino_jax.cluster.profile import REFERENCE, kernels_of
from rhino_jax.cluster.topology import MEMORY as ALONE
from rhino_jax.cluster.topology import PCIE, Cluster, Link
from rhino_jax.errors import ClusterError
from rhino_jax.profiling.live import least

FORMAT = 1
SECONDS, RUNS = 20.0, 8
SIDE, COPIED_BYTES = 4096, 256 * 2**20
SMALL_BYTES, LARGE_BYTES = 1024, 64 * 2**20
TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "int8": "int8"}


@dataclass(frozen=True)
class Measured:
    """What a device and its links reach. One device has links of no importance."""

    kind: str
    flops_per_second: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    link_latency_seconds: float

    def __str__(self) -> str:
        peaks = ", ".join(
            f"{name} {peak / TERA:.3g}" for name, peak in self.flops_per_second.items()
        )
        return (
            f"{peaks} TFLOPS, memory {self.memory_bytes / 2**30:.1f} GiB at "
            f"{self.memory_bytes_per_second / GIGA:.3g} GB/s, links "
            f"{self.link_bytes_per_second / GIGA:.3g} GB/s"
        )


def measured_cluster(devices: Sequence[Any], folder: Path | None) -> Cluster:
    """The cluster that ``devices`` of one host are, by measurement; a warning says so.

    Args:
        folder: where measurements are kept; None keeps them for this process only.

    Raises:
        ClusterError: several hosts, or a device that does not tell its memory.
    """
    kind = devices[0].device_kind
    if jax.process_count() > 1:
        raise ClusterError(
            f"{kind!r} is not in the catalogue of devices, and only the devices of one "
            'host are measured; say what to plan for, such as cluster="h100:2x8" (the '
            "nearest device you know)"
        )
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ClusterError(
            f"{kind!r} is not in the catalogue of devices and does not tell its "
            'memory; say what to plan for, such as cluster="h100:1x8" (the nearest '
            "device you know)"
        )
    return as_cluster(_kept(tuple(devices), stats["bytes_limit"], folder), len(devices))


@functools.cache
def _kept(devices: tuple[Any, ...], memory_bytes: int, folder: Path | None) -> Measured:
    """A measurement read, or made and written."""
    kind = devices[0].device_kind
    path = folder and folder / f"device-{_digest(kind, len(devices))}.json"
    if path and path.exists():
        try:
            data = json.loads(path.read_text())
            if data.pop("format") == FORMAT:
                return Measured(**data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # measured again, and written over
    began = time.perf_counter()
    found = measure(devices, memory_bytes)
    where = f"kept in {path}" if path else "kept for this process"
    warnings.warn(
        f"{kind!r} is not in the catalogue of devices; measured in "
        f"{time.perf_counter() - began:.0f} s: {found} ({where})",
        stacklevel=2,
    )
    if folder and path:
        text = json.dumps({"format": FORMAT, **asdict(found)}, indent=1)
        write_whole(folder, path, text)
    return found


def _digest(kind: str, count: int) -> str:
    text = f"{kind}/{count}/{jax.__version__}/{FORMAT}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    devices: Sequence[Any],
    memory_bytes: int,
    seconds: float = SECONDS,
    side: int = SIDE,
    copied_bytes: int = COPIED_BYTES,
    large_bytes: int = LARGE_BYTES,
) -> Measured:
    """Measure the first of ``devices``, and the links among all of them.

    Args:
        seconds: for everything, compiling aside.
        side: of the square products.
        copied_bytes, large_bytes: of the array that is copied, and reduced.
    """
    share = seconds / (len(TYPES) + 3)
    one = devices[0]
    peaks = {
        name: 2 * side**3 / least(_product(side, dtype, one), share, RUNS)
        for name, dtype in TYPES.items()
    }
    copied = jax.device_put(np.zeros(copied_bytes // 4, np.float32), one)
    copying = functools.partial(jax.jit(lambda x: x + 1), copied)
    copy_seconds = least(copying, share, RUNS)
    bandwidth, latency = _links(devices, share, large_bytes)
    return Measured(
        one.device_kind,
        peaks,
        memory_bytes,
        2 * copied.nbytes / copy_seconds,
        bandwidth,
        latency,
    )


def _product(side: int, dtype: str, device: Any) -> Callable[[], Any]:
    x = jax.device_put(jnp.ones((side, side), dtype), device)
    wide = jnp.int32 if dtype == "int8" else None
    return functools.partial(
        jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=wide)), x
    )


def _links(
    devices: Sequence[Any], share: float, large_bytes: int
) -> tuple[float, float]:
    """Bytes a second and seconds a step of a ring all-reduce among ``devices``."""
    count = len(devices)
    if count == 1:
        return TERA, 1e-6
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    spec = jax.sharding.PartitionSpec("x")

    def reduced(num_bytes: int) -> float:
        x = jax.device_put(
            np.zeros((count, num_bytes // 4), np.float32),
            jax.sharding.NamedSharding(mesh, spec),
        )
        run = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=spec, out_specs=spec
            )
        )
        return least(functools.partial(run, x), share, RUNS)

    small, large = reduced(SMALL_BYTES), reduced(large_bytes)
    sent = 2 * (count - 1) / count * (large_bytes - SMALL_BYTES)
    return sent / max(large - small, 1e-9), max(small / (2 * (count - 1)), 1e-9)


def as_cluster(measured: Measured, count: int) -> Cluster:
    """Measurements as a Cluster of one host.

    What a product and a copy reach is taken for the share of the device's peak that
    the reference card reaches (:func:`rhino_jax.cluster.profile.kernels_of`).
    """
    kernels = kernels_of(CATALOGUE[REFERENCE])
    large = (1.0, *3 * (float(SIDE),))
    share = kernels.share(PRODUCT, "bf16", large)
    copied = kernels.share(ELEMENTWISE, "", (float(COPIED_BYTES),))
    peaks = {name: peak / share for name, peak in measured.flops_per_second.items()}
    source = "measured on the attached device"
    device = Device(
        measured.kind,
        CUDA,
        measured.kind,
        *(peaks["bf16"], peaks["f16"], peaks["f32"]),
        # No product of jax.lax runs float8 on every device: as bfloat16.
        *(peaks["bf16"], peaks["int8"]),
        measured.memory_bytes,
        measured.memory_bytes_per_second / copied,
        (
            ("flops_per_second", f"{source}; f8 as bf16"),
            ("memory_bytes", "as the attached device tells it"),
            ("memory_bytes_per_second", source),
        ),
    )
    link = Link(
        "measured",
        PCIE if count > 1 else ALONE,
        measured.link_bytes_per_second,
        measured.link_latency_seconds,
        *(source, source),
    )
    return Cluster(f"{measured.kind}:1x{count}", device, ((link, count),))
