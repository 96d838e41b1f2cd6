"""The attached devices as a Cluster: what a plan for this machine is priced with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jax

from rhino_jax.api.measured import measured_cluster
from rhino_jax.cluster.hardware import CATALOGUE, CUDA, GIB, catalogue_name
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import ClusterError
from rhino_jax.runtime.job import hosts


def attached_cluster(devices: Sequence[Any], folder: Path | None = None) -> Cluster:
    """The cluster that ``devices`` (of ``jax.devices()``) are.

    A GPU that the catalogue does not know is measured, and that kept in ``folder``. A
    device's memory is what its allocator may take: JAX leaves a quarter of a GPU's
    alone unless ``XLA_PYTHON_CLIENT_MEM_FRACTION`` says otherwise.

    Processes on one machine share its links between GPUs. Simulated CPU devices share
    memory within a process only.

    Raises:
        ClusterError: TPUs that the catalogue does not know, or GPUs of several hosts;
            uneven hosts.
    """
    first = devices[0]
    if first.platform == "cpu":
        return parse_cluster(f"cpu:{_even([d.process_index for d in devices])}")
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
    machine = hosts(sorted({device.process_index for device in devices}))
    where = _even([machine[device.process_index] for device in devices])
    return _as_told(parse_cluster(f"{name}:{where}"), devices)


def _even(places: Sequence[object]) -> str:
    """How a cluster of so many hosts is written: the place of each device, in order.

    Devices are numbered host by host; a host met again later counts as another one.

    >>> _even(["a", "a", "b", "b"]), _even([0, 0, 0]), _even("abab")
    ('2x2', '1x3', '4x1')
    """
    sizes = [len(list(run)) for _, run in groupby(places)]
    if len(set(sizes)) > 1:
        raise ClusterError(
            f"hosts with different numbers of devices: {sorted(sizes)}; use as many of "
            "each"
        )
    return f"{len(sizes)}x{sizes[0]}"


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
