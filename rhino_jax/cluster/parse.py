"""Clusters as users write them: "h100:2x8", "v5e:4x4", "cpu:8", "my.yaml"."""

from __future__ import annotations

import math
import re

from rhino_jax.cluster.hardware import CATALOGUE, CPU, GPUS
from rhino_jax.cluster.links import (
    DOMAINS,
    POD_CHIPS,
    TORUS_DIMENSIONS,
    cpu_cluster,
    gpu_cluster,
    tpu_cluster,
)
from rhino_jax.cluster.own import SUFFIXES, read_cluster
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import ClusterError, nearest

ALIASES = {
    **{"a100": "a100-80", "v100": "v100-16", "v5litepod": "v5e"},
    **{"v7": "tpu7x", "ironwood": "tpu7x"},
}
_TEXT = re.compile(r"\s*([\w\-]+)\s*:\s*(\d+(?:x\d+)*?)(?:x(\d+)slices?)?\s*")


def parse_cluster(text: str) -> Cluster:
    """Read a cluster.

    "h100:2x8" is two hosts of eight GPUs ("h100:8" one host), "v5e:4x4" a TPU slice of
    4 by 4 chips, "v5e:16x16x4slices" four of 16 by 16, "cpu:8" eight simulated devices,
    "cpu:2x4" as many in two processes, "my.yaml" what that file describes
    (:mod:`rhino_jax.cluster.own`). Its name is the text in full: "a100:8" is named
    "a100-80:1x8".

    >>> parse_cluster("a100:8").name, parse_cluster("v4:2x2x4").num_devices
    ('a100-80:1x8', 32)

    Raises:
        ClusterError: an unknown device (with the nearest names), a size that is no
            size, or a shape that this device does not come in; a file that describes
            no cluster.
    """
    if text.strip().lower().endswith(SUFFIXES):
        return read_cluster(text.strip())
    found = _TEXT.fullmatch(text.lower())
    known = [*CATALOGUE, *ALIASES]
    if not found:
        close = nearest(text.lower().partition(":")[0].strip(), known)
        raise ClusterError(
            f"{text!r} is no cluster. Write device:size, such as "
            f"{example(close[0] if close else 'h100')}; devices: {', '.join(known)}."
        )
    name = ALIASES.get(found.group(1), found.group(1))
    if name not in CATALOGUE:
        close = nearest(name, known)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ClusterError(
            f"{text!r}: no device is named {name!r}; {hint}Known: {', '.join(known)}. "
            f"A cluster is written like {example(close[0] if close else 'h100')}."
        )
    shape = tuple(int(side) for side in found.group(2).split("x"))
    slices = int(found.group(3) or 1)
    if 0 in shape or slices == 0:
        raise ClusterError(
            f"{text!r}: a size of 0 leaves no device; write at least 1, such as "
            f"{example(name)}."
        )
    if CATALOGUE[name].platform in (CPU, *GPUS) and found.group(3):
        raise ClusterError(
            f"{text!r}: only TPUs come in slices; write {example(name)}."
        )
    if CATALOGUE[name].platform == CPU:
        return _cpu(text, shape)
    if CATALOGUE[name].platform in GPUS:
        return _gpu(text, name, shape)
    return _tpu(text, name, shape, slices)


def example(name: str) -> str:
    """A valid cluster of a device.

    >>> [example(name) for name in ("cpu", "a100", "v5p")]
    ['cpu:8', 'a100:2x8', 'v5p:4x4x4']
    """
    name_in_full = ALIASES.get(name, name)
    if CATALOGUE[name_in_full].platform == CPU:
        return f"{name}:8"
    if CATALOGUE[name_in_full].platform in GPUS:
        return f"{name}:2x8"
    return f"{name}:" + "x".join("4" * TORUS_DIMENSIONS[name_in_full])


def _cpu(text: str, shape: tuple[int, ...]) -> Cluster:
    if len(shape) > 2:
        raise ClusterError(
            f"{text!r} has {len(shape)} numbers, CPU devices have two: cpu:processes x "
            "devices a process, such as cpu:2x4 (cpu:8 is one process)."
        )
    processes, per_process = shape if len(shape) == 2 else (1, shape[0])
    return cpu_cluster(per_process, processes)


def _gpu(text: str, name: str, shape: tuple[int, ...]) -> Cluster:
    if len(shape) > 2:
        raise ClusterError(
            f"{text!r} has {len(shape)} numbers, GPUs have two: {name}:hosts x GPUs a "
            f"host, such as {example(name)}."
        )
    hosts, per_host = shape if len(shape) == 2 else (1, shape[0])
    if per_host > DOMAINS.get(name, per_host):
        raise ClusterError(
            f"{text!r}: one NVLink domain of {name} has {DOMAINS[name]} GPUs, not "
            f"{per_host}; write {name}:domains x GPUs a domain, such as "
            f"{name}:2x{DOMAINS[name]}."
        )
    return gpu_cluster(name, hosts, per_host)


def _tpu(text: str, name: str, shape: tuple[int, ...], slices: int) -> Cluster:
    dimensions = TORUS_DIMENSIONS[name]
    if len(shape) != dimensions:
        raise ClusterError(
            f"{text!r} has {len(shape)} numbers, a {name} torus has {dimensions}: "
            f"write its chips as {example(name)}."
        )
    whole_hosts = all(side % 2 == 0 for side in shape[:2])
    if not whole_hosts and math.prod(shape) >= 4:
        raise ClusterError(
            f"{text!r}: hosts of {name} have 2x2 chips, so the first two numbers must "
            f"be even (or the whole slice below 4 chips), such as {example(name)}."
        )
    chips = math.prod(shape)
    if chips > POD_CHIPS[name]:
        raise ClusterError(
            f"{text!r} has {chips} chips in one slice, a pod of {name} has "
            f"{POD_CHIPS[name]}; write several slices, such as {example(name)}x2slices."
        )
    return tpu_cluster(name, shape, slices)
