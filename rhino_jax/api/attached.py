"""The attached devices as a Cluster: what a plan for this machine is priced with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from rhino_jax.api.measured import measured_cluster
from rhino_jax.cluster.hardware import CATALOGUE, CUDA, GIB, catalogue_name
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import ClusterError


def attached_cluster(devices: Sequence[Any], folder: Path | None = None) -> Cluster:
    """The cluster that ``devices`` (of ``jax.devices()``) are.

    A GPU that the catalogue does not know is measured, and that kept in ``folder``. A
    device's memory is what its allocator may take: JAX leaves a quarter of a GPU's
    alone unless ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says otherwise.

    Raises:
        ClusterError: TPUs that the catalogue does not know, or GPUs of several hosts;
            uneven hosts.
    """
    first = devices[0]
    if first.platform == "cpu":
        return parse_cluster(f"cpu:{len(devices)}")
    name = catalogue_name(first.device_kind, getattr(first, "num_cores", 1) or 1)
    if name is None:
        if first.platform != "tpu":
            return measured_cluster(devices, folder)
        raise ClusterError(
            f"{first.device_kind!r} is not in the catalogue of devices; say what to "
            'plan for, such as cluster="h100:1x8" (the nearest device you know)'
        )
    if first.platform == "tpu":
        return _as_told(parse_cluster(f"{name}:{_torus(devices)}"), devices)
    hosts = Counter(device.process_index for device in devices)
    if len(set(hosts.values())) > 1:
        raise ClusterError(
            f"hosts with different numbers of devices: {sorted(hosts.values())}; "
            "use as many of each"
        )
    cluster = parse_cluster(f"{name}:{len(hosts)}x{len(devices) // len(hosts)}")
    return _as_told(cluster, devices)


def _as_told(cluster: Cluster, devices: Sequence[Any]) -> Cluster:
    """``cluster`` with the memory that this process's devices tell, in whole GiB.

    Whole ones, so that processes on hosts that differ a little make the same plan.
    """
    here = [d for d in devices if d.process_index == jax.process_index()]
    told = [(d.memory_stats() or {}).get("bytes_limit") for d in here]
    limits = [limit // GIB * GIB for limit in told if limit]
    if not limits:
        return cluster
    device = cluster.device
    memory_bytes = min(device.memory_bytes, *limits)
    return replace(cluster, device=replace(device, memory_bytes=memory_bytes))


def more_memory(cluster: Cluster) -> str:
    """How the devices could have more memory: their allocators may not take all.

    >>> more_memory(parse_cluster("h100:1x8"))
    ''
    """
    device = cluster.device
    known = CATALOGUE.get(device.name)
    if device.platform != CUDA or known is None:
        return ""
    if device.memory_bytes > known.memory_bytes * 0.9:
        return ""
    return (
        "set XLA_PYTHON_CLIENT_MEM_FRACTION=.95 before JAX starts (its allocator may "
        f"take {device.memory_bytes / GIB:.0f} of {known.memory_bytes / GIB:.0f} GiB)"
    )


def _torus(devices: Sequence[Any]) -> str:
    """The sides of the torus, and the slices, as a cluster is written.

    A number of chips that fills no box is written as a row.
    """
    coords = [tuple(device.coords) for device in devices]
    sides = [max(c[k] for c in coords) + 1 for k in range(len(coords[0]))]
    while len(sides) > 2 and sides[-1] == 1 and "lite" in devices[0].device_kind:
        sides.pop()
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    text = "x".join(map(str, sides))
    return f"{text}x{slices}slices" if slices > 1 else text
