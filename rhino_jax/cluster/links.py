"""The catalogue of links, each figure with its source, and clusters built from them.

Bandwidths are per device and one direction. Between hosts a device has its share of
its host's network adapters, as the system named in the source is built; how many GPUs
a host was asked to have does not change the share.

Latencies of GPU links are the step latencies of NCCL's own cost model (``hwLat`` in
src/graph/tuning.cc), of its rings and of its trees: protocol LL128 on NVLink and
InfiniBand; on PCIe and Ethernet, where LL128 is off, protocol Simple.
"""

from __future__ import annotations

from dataclasses import replace

from rhino_jax.cluster.hardware import CATALOGUE, GIGA, GPUS, TPU
from rhino_jax.cluster.topology import (
    CHIP,
    MEMORY,
    NETWORK,
    NVLINK,
    PCIE,
    Cluster,
    Link,
)
from rhino_jax.ir.mesh import TORUS

MICRO = 1e-6
_NCCL = "NCCL src/graph/tuning.cc, hwLat, ring (and tree)"
_RCCL = "RCCL src/graph/tuning.cc, hwLat, ring (and tree)"
_PART_2 = "How to Scale Your Model (JAX ML), part 2, one-way bandwidth per link"
_HOP = "How to Scale Your Model (JAX ML), part 3: about 1 us a hop over ICI"
_ICI_LATENCY = 1 * MICRO


def _nvlink(total_gigabytes: float, sheet: str, by: str = "NVSwitch") -> Link:
    return Link(
        *("NVLink", NVLINK, total_gigabytes / 2 * GIGA, 1.9 * MICRO),
        f"{sheet}: {total_gigabytes:g} GB/s both ways together, through {by}",
        f"{_NCCL}, NVLINK, LL128",
        tree_latency_seconds=1.25 * MICRO,
    )


def _pcie(generation: int, gigatransfers: float, sheet: str) -> Link:
    return Link(
        *("PCIe", PCIE, gigatransfers * 16 / 8 * 128 / 130 * GIGA, 5.7 * MICRO),
        f"{sheet}: PCIe Gen{generation} x16 ({gigatransfers:g} GT/s, 128b/130b coded)",
        f"{_NCCL}, PCI, Simple",
        tree_latency_seconds=4.0 * MICRO,
    )


def _infiniband(gigabits: float, system: str) -> Link:
    return Link(
        *("InfiniBand", NETWORK, gigabits / 8 * GIGA, 4.0 * MICRO),
        f"{system}: {gigabits:g} Gb/s for each GPU",
        f"{_NCCL}, NET, LL128",
        tree_latency_seconds=8.5 * MICRO,
    )


def _ethernet(host_gigabits: float, gpus: int, system: str) -> Link:
    return Link(
        *("Ethernet", NETWORK, host_gigabits / 8 / gpus * GIGA, 14.0 * MICRO),
        f"{system}: {host_gigabits:g} Gb/s a host, shared by {gpus} GPUs",
        f"{_NCCL}, NET, Simple",
        tree_latency_seconds=14.0 * MICRO,
    )


IN_HOST = {
    "t4": _pcie(3, 8, "NVIDIA T4 datasheet"),
    "l4": _pcie(4, 16, "NVIDIA L4 datasheet"),
    "a10g": _pcie(4, 16, "NVIDIA A10G datasheet"),
    "rtx4090": _pcie(4, 16, "NVIDIA Ada architecture brief"),
    "l40s": _pcie(4, 16, "NVIDIA L40S datasheet"),
    "v100-16": _nvlink(300, "NVIDIA V100 datasheet, SXM2 column", "a mesh of 8 GPUs"),
    "v100-32": _nvlink(300, "NVIDIA V100 datasheet, SXM2 column", "a mesh of 8 GPUs"),
    "a100-40": _nvlink(600, "NVIDIA A100 datasheet, SXM column"),
    "a100-80": _nvlink(600, "NVIDIA A100 datasheet, SXM column"),
    "h20": _nvlink(900, "NVIDIA HGX H20 datasheet"),
    "h100": _nvlink(900, "NVIDIA H100 datasheet, SXM column"),
    "h200": _nvlink(900, "NVIDIA H200 datasheet, SXM column"),
    "b200": _nvlink(1800, "NVIDIA DGX B200 datasheet (14.4 TB/s for 8 GPUs)"),
    "gb200": _nvlink(1800, "NVIDIA GB200 NVL72 datasheet (130 TB/s for 72 GPUs)"),
    "mi300x": Link(
        *("Infinity Fabric", NVLINK, 448 * GIGA, 2.2 * MICRO),
        "AMD Instinct MI300X datasheet: 7 links of 128 GB/s both ways together, one to "
        "each other GPU of a host",
        f"{_RCCL}, NVLINK, LL128",
        tree_latency_seconds=1.4 * MICRO,
    ),
}
BETWEEN_HOSTS = {
    "t4": _ethernet(100, 4, "Compute Engine documentation, N1 with 4 T4"),
    "l4": _ethernet(100, 8, "Compute Engine documentation, G2 with 8 L4"),
    "a10g": _ethernet(100, 8, "Amazon EC2 G5 instances, g5.48xlarge"),
    "rtx4090": _ethernet(25, 8, "assumed: one 25 Gb/s adapter in a host of 8"),
    "l40s": _ethernet(400, 8, "Amazon EC2 G6e instances, g6e.48xlarge with EFA"),
    "v100-16": _ethernet(25, 8, "Amazon EC2 P3 instances, p3.16xlarge"),
    "v100-32": _ethernet(100, 8, "Amazon EC2 P3 instances, p3dn.24xlarge"),
    "a100-40": _ethernet(400, 8, "Amazon EC2 P4d instances, p4d.24xlarge with EFA"),
    "a100-80": _infiniband(200, "NVIDIA DGX A100 datasheet, 8 ConnectX-6 HDR"),
    "h20": _infiniband(400, "assumed as of NVIDIA DGX H100, 8 ConnectX-7 NDR"),
    "h100": _infiniband(400, "NVIDIA DGX H100 datasheet, 8 ConnectX-7 NDR"),
    "h200": _infiniband(400, "NVIDIA DGX H200 datasheet, 8 ConnectX-7 NDR"),
    "b200": _infiniband(400, "NVIDIA DGX B200 datasheet, 8 ConnectX-7 NDR"),
    "gb200": _infiniband(400, "NVIDIA DGX GB200 datasheet, 72 ConnectX-7 NDR"),
    "mi300x": _infiniband(
        400, "Azure documentation, ND MI300X v5: 8 ConnectX-7 adapters a host"
    ),
}
DOMAINS = {"gb200": 72}
"""GPUs that one NVLink fabric joins where it reaches over hosts (NVIDIA GB200 NVL72
datasheet: 18 trays of 4)."""
IN_MEMORY = Link(
    *("host memory", MEMORY, 3.2 * GIGA, 20 * MICRO),
    "assumed: half of a device's share of memory bandwidth (one read, one write)",
    "assumed: threads of simulated devices meet at each step",
)

BETWEEN_PROCESSES = Link(
    *("loopback", NETWORK, 0.5 * GIGA, 100 * MICRO),
    "gloo all-reduce of 16 MiB on one host of 2 cores: 0.58 GB/s between 2 processes, "
    "0.37 among 4",
    "the same of 1 KiB: 61 us a step between 2 processes, 300 among 4",
)
"""Between the processes of simulated devices, whatever host they are on."""


def _ici(gigabytes: float, source: str = _PART_2) -> Link:
    return Link("ICI", TORUS, gigabytes * GIGA, _ICI_LATENCY, source, _HOP)


_PAPER = (
    "Jouppi et al., A Domain-Specific Supercomputer for Training Deep Neural Networks, "
    "CACM 2020, table 2"
)
ICI = {
    "v2": _ici(31, f"{_PAPER}: 496 Gb/s a link, shared by the 2 cores of a chip"),
    "v3": _ici(41, f"{_PAPER}: 656 Gb/s a link, shared by the 2 cores of a chip"),
    "v4": _ici(22.5, f"{_PART_2}: 45 GB/s, shared by the 2 cores of a chip"),
    "v4-megacore": _ici(45),
    "v5e": _ici(50),
    "v5p": _ici(100),
    "v6e": _ici(100),
    "tpu7x": _ici(
        50,
        "Cloud TPU documentation, TPU7x: 1200 GB/s both ways on 6 links a chip, shared "
        "by its 2 cores",
    ),
}


def _dcn(gigabits: float, source: str) -> Link:
    return Link(
        *("DCN", NETWORK, gigabits / 8 * GIGA, 14.0 * MICRO),
        source,
        f"assumed as of GPU hosts: {_NCCL}, NET, Simple",
    )


_V4_DCN = "How to Scale Your Model, part 2: about 25 GB/s a host of 4 chips"
_TPU_PAGE = "Cloud TPU documentation, TPU"
DCN = {
    "v2": _dcn(12.5, "assumed: half of a TPU v4 core's"),
    "v3": _dcn(12.5, "assumed: half of a TPU v4 core's"),
    "v4": _dcn(25, f"{_V4_DCN}; half a chip's share"),
    "v4-megacore": _dcn(50, _V4_DCN),
    "v5e": _dcn(25, f"{_TPU_PAGE} v5e: 6.4 Tb/s for a pod of 256 chips"),
    "v5p": _dcn(50, f"{_TPU_PAGE} v5p: 50 Gb/s a chip"),
    "v6e": _dcn(100, f"{_TPU_PAGE} v6e: 25.6 Tb/s for a pod of 256 chips"),
    "tpu7x": _dcn(50, f"{_TPU_PAGE}7x: 100 Gb/s a chip, shared by its 2 cores"),
}


def _on_chip(gigabytes: float, source: str) -> Link:
    latency = f"assumed as of ICI: {_HOP}"
    return Link("chip", CHIP, gigabytes * GIGA, _ICI_LATENCY, source, latency)


_THROUGH_HBM = (
    "assumed: the cores of a chip exchange through their HBM (Cloud TPU documentation, "
    "TPU {}), one read and one write"
)
ON_CHIP = {
    "v2": _on_chip(175, _THROUGH_HBM.format("v2: 700 GB/s a chip")),
    "v3": _on_chip(225, _THROUGH_HBM.format("v3: 900 GB/s a chip")),
    "v4": _on_chip(300, _THROUGH_HBM.format("v4: 1200 GB/s a chip")),
    "tpu7x": _on_chip(600, f"{_TPU_PAGE}7x: die to die, 6 times a link of ICI"),
}
"""Generations whose chips JAX lists as two devices each."""

TORUS_DIMENSIONS = {
    **{"v2": 2, "v3": 2, "v4": 3, "v4-megacore": 3, "v5e": 2, "v5p": 3, "v6e": 2},
    "tpu7x": 3,
}
"""Cloud TPU documentation, system architecture of each generation."""
POD_CHIPS = {
    **{"v2": 256, "v3": 1024, "v4": 4096, "v4-megacore": 4096, "v5e": 256},
    **{"v5p": 8960, "v6e": 256, "tpu7x": 9216},
}
"""Chips of one slice at most; the same pages."""
_CUBE = 4  # optical switches join whole 4x4x4 cubes
_POD_SIDES = {name: int(POD_CHIPS[name] ** 0.5) for name in ("v2", "v3", "v5e", "v6e")}
"""A 2-D torus closes only around a whole pod."""


def cpu_cluster(count: int, processes: int = 1) -> Cluster:
    """``count`` simulated devices that share a host's memory, in every process."""
    if processes == 1:
        return Cluster(f"cpu:{count}", CATALOGUE["cpu"], ((IN_MEMORY, count),))
    levels = ((BETWEEN_PROCESSES, processes), (IN_MEMORY, count))
    return Cluster(f"cpu:{processes}x{count}", CATALOGUE["cpu"], levels)


def gpu_cluster(name: str, hosts: int, gpus_per_host: int) -> Cluster:
    """Hosts of equal GPUs: ``name`` is the catalogue's.

    Where one fabric reaches over hosts (:data:`DOMAINS`), as many hosts as it has room
    for and as divide ``hosts`` are one domain.

    >>> cluster = gpu_cluster("gb200", 36, 4)
    >>> [(link.name, size) for link, size in cluster.levels]
    [('InfiniBand', 2), ('NVLink', 18), ('NVLink', 4)]
    """
    device = CATALOGUE[name]
    assert device.platform in GPUS, name
    room = max(DOMAINS.get(name, 0) // gpus_per_host, 1)
    joined = max(n for n in range(1, room + 1) if hosts % n == 0)
    levels = [(BETWEEN_HOSTS[name], hosts // joined), (IN_HOST[name], gpus_per_host)]
    if joined > 1:
        levels.insert(1, (IN_HOST[name], joined))
    if joined == hosts > 1:
        levels = levels[1:]
    return Cluster(f"{name}:{hosts}x{gpus_per_host}", device, tuple(levels))


def tpu_cluster(name: str, shape: tuple[int, ...], slices: int = 1) -> Cluster:
    """Slices of a torus of ``shape`` chips, joined by the data centre's network.

    A 3-D slice closes in every dimension where it is made of whole 4x4x4 cubes, a 2-D
    one in the dimensions that are as long as a pod's (How to Scale Your Model, part 2).
    """
    device = CATALOGUE[name]
    assert device.platform == TPU, name
    assert len(shape) == TORUS_DIMENSIONS[name], (name, shape)
    cubes = len(shape) == 3 and all(side % _CUBE == 0 for side in shape)
    levels = [(DCN[name], slices)] if slices > 1 else []
    for dimension, side in zip("xyz", shape, strict=False):
        wraps = cubes or side == _POD_SIDES.get(name)
        link = ICI[name]
        link = replace(link, name=f"{link.name} {dimension}", wraps=wraps)
        levels.append((link, side))
    if name in ON_CHIP:
        levels.append((ON_CHIP[name], 2))
    text = f"{name}:" + "x".join(map(str, shape))
    return Cluster(text + f"x{slices}slices" * (slices > 1), device, tuple(levels))
