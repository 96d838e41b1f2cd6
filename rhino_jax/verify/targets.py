"""What to compile for: "h100:2x8", "v5e:4x4", "cpu:8".

A GPU is described to the compiler in a text form (XLA's GpuTargetConfigProto). Sources
of the figures: NVIDIA's datasheets and architecture whitepapers of each card (cores,
memory, bandwidth, clock, L2 cache) and the table of compute capabilities in the CUDA
C++ programming guide (threads, registers and shared memory per multiprocessor); memory
as CUDA reports it, a little below the datasheet's. The compiler uses them to
choose tiles and schedules; it does not refuse what does not fit the memory. CUDA 13
compiles for capability 7.5 and later: for a V100 it needs the CUDA 12 plugin.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rhino_jax.errors import ClusterError, nearest

KIB, MIB = 1024, 1024**2


@dataclass(frozen=True)
class Target:
    """What a compiler is asked to compile for.

    ``topology`` is what the compiler's plugin takes: "slices x hosts x GPUs a host",
    a TPU topology name, or a number of CPU devices.
    """

    text: str
    platform: str
    """"cuda", "tpu" or "cpu", as in ``lower(lowering_platforms=(platform,))``."""
    topology: str
    config: str
    """The GPU in XLA's text form; "" for the other platforms."""
    device_count: int
    memory_bytes: int
    """Memory of one GPU; 0 where the compiler knows (TPU) or it does not matter."""
    host_bounds: tuple[int, ...] = ()
    """Chips of one TPU host, where they are not the usual 2x2."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as its compiler sees it (a core is a streaming multiprocessor)."""

    description: str
    capability: tuple[int, int]
    cores: int
    lanes_per_core: int
    threads_per_core: int
    shared_per_core_bytes: int
    shared_per_block_bytes: int
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_second: int
    clock_ghz: float

    def config(self) -> str:
        """XLA's text form."""
        major, minor = self.capability
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * KIB,
            "shared_memory_per_core": self.shared_per_core_bytes,
            "threads_per_core_limit": self.threads_per_core,
            "core_count": self.cores,
            "fpus_per_core": self.lanes_per_core,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": self.memory_bytes_per_second,
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            "shared_memory_per_block_optin": self.shared_per_block_bytes,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        fields = " ".join(f"{key}: {value}" for key, value in info.items())
        return (
            f"gpu_device_info {{ {fields} "
            f"cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
            'platform_name: "CUDA"\n'
            "dnn_version_info { major: 9 minor: 12 patch: 0 }\n"
            f'device_description_str: "{self.description}"\n'
        )


def _ampere(name: str, memory_bytes: int, bandwidth: int) -> Gpu:
    shared = (164 * KIB, 163 * KIB)
    l2 = 40 * MIB
    return Gpu(name, (8, 0), 108, 64, 2048, *shared, l2, memory_bytes, bandwidth, 1.41)


def _hopper(name: str, memory_bytes: int, bandwidth: int) -> Gpu:
    shared = (228 * KIB, 227 * KIB)
    l2 = 50 * MIB
    return Gpu(name, (9, 0), 132, 128, 2048, *shared, l2, memory_bytes, bandwidth, 1.98)


def _volta(name: str, memory_bytes: int) -> Gpu:
    shared = (96 * KIB, 96 * KIB)
    bandwidth = 898_048_000_000
    return Gpu(
        name, (7, 0), 80, 64, 2048, *shared, 6 * MIB, memory_bytes, bandwidth, 1.53
    )


GPUS = {
    "v100": _volta("Tesla V100-SXM2-16GB", 16_935_682_048),
    "v100-32": _volta("Tesla V100-SXM2-32GB", 34_079_637_504),
    "t4": Gpu(
        *("Tesla T4", (7, 5), 40, 64, 1024, 64 * KIB, 64 * KIB, 4 * MIB),
        *(15_642_329_088, 320_064_000_000, 1.59),
    ),
    "a100-40": _ampere("NVIDIA A100-SXM4-40GB", 42_331_013_120, 1_555_200_000_000),
    "a100-80": _ampere("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000),
    "a10g": Gpu(
        *("NVIDIA A10G", (8, 6), 80, 128, 1536, 100 * KIB, 99 * KIB, 6 * MIB),
        *(23_609_475_072, 600_096_000_000, 1.71),
    ),
    "l4": Gpu(
        *("NVIDIA L4", (8, 9), 58, 128, 1536, 100 * KIB, 99 * KIB, 48 * MIB),
        *(23_609_475_072, 300_096_000_000, 2.04),
    ),
    "l40s": Gpu(
        *("NVIDIA L40S", (8, 9), 142, 128, 1536, 100 * KIB, 99 * KIB, 96 * MIB),
        *(47_674_136_985, 864_000_000_000, 2.52),
    ),
    "rtx4090": Gpu(
        *("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100 * KIB, 99 * KIB),
        *(72 * MIB, 25_383_256_719, 1_008_096_000_000, 2.52),
    ),
    "h20": Gpu(
        *("NVIDIA H20", (9, 0), 78, 128, 2048, 228 * KIB, 227 * KIB, 60 * MIB),
        *(102_005_473_280, 4_000_000_000_000, 1.98),
    ),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": _hopper("NVIDIA H200", 151_397_597_184, 4_800_000_000_000),
    "b200": Gpu(
        *("NVIDIA B200", (10, 0), 148, 128, 2048, 228 * KIB, 227 * KIB),
        *(132_644_864, 191_514_411_008, 7_672_320_000_000, 1.965),
    ),
    "gb200": Gpu(
        *("NVIDIA GB200", (10, 0), 152, 128, 2048, 228 * KIB, 227 * KIB),
        *(135_528_448, 197_897_748_480, 7_928_064_000_000, 2.062),
    ),
}
ALIASES = {
    **{"a100": "a100-80", "v100-16": "v100", "v5litepod": "v5e"},
    **{"v7": "tpu7x", "ironwood": "tpu7x"},
}

TPU_CORES = {"v2": 2, "v3": 2, "v4": 2, "v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2}
"""TPU generations the compiler knows, with the devices (cores) that one chip shows."""
_TPU_DIMENSIONS = {"v4": 3, "v5p": 3, "tpu7x": 3}


def parse_target(text: str) -> Target:
    """Read a target.

    "h100:2x8" is two hosts of eight GPUs ("h100:8" one host), "v5e:4x4" a TPU slice of
    4 by 4 chips, "cpu:8" eight simulated CPU devices.

    >>> one = parse_target("h100:2x8")
    >>> one.platform, one.topology, one.device_count
    ('cuda', '1x2x8', 16)
    >>> parse_target("v4:2x2x4").device_count
    32

    Raises:
        ClusterError: an unknown device (with the nearest names), a size that is no
            size, or a shape that this device does not come in.
    """
    found = re.fullmatch(r"\s*([\w\-]+)\s*:\s*(\d+(?:x\d+)*)\s*", text.lower())
    known = [*GPUS, *TPU_CORES, "cpu", *ALIASES]
    if not found:
        raise ClusterError(
            f"{text!r} is no target. Write device:size, such as h100:2x8 (hosts x GPUs "
            f"a host), v5e:4x4 (chips) or cpu:8; devices: {', '.join(known)}."
        )
    name = ALIASES.get(found.group(1), found.group(1))
    shape = tuple(int(n) for n in found.group(2).split("x"))
    if name not in known:
        close = nearest(name, known)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ClusterError(
            f"{text!r}: no device is named {name!r}; {hint}Known: {', '.join(known)}."
        )
    if 0 in shape:
        raise ClusterError(f"{text!r}: a size of 0 leaves no device; write at least 1.")
    if name in GPUS:
        return _gpu(text, name, shape)
    if name in TPU_CORES:
        return _tpu(text, name, shape)
    if len(shape) > 2:
        raise ClusterError(
            f"{text!r} has {len(shape)} numbers, CPU devices have two: cpu:processes x "
            "devices a process, such as cpu:2x4 (cpu:8 is one process)."
        )
    count = math.prod(shape)  # the compiler does not see processes
    return Target(f"cpu:{count}", "cpu", str(count), "", count, 0)


def _gpu(text: str, name: str, shape: tuple[int, ...]) -> Target:
    if len(shape) > 2:
        raise ClusterError(
            f"{text!r} has {len(shape)} numbers, GPUs have two: {name}:hosts x GPUs a "
            f"host, such as {name}:2x8."
        )
    hosts, per_host = shape if len(shape) == 2 else (1, shape[0])
    gpu = GPUS[name]
    return Target(
        f"{name}:{hosts}x{per_host}",
        "cuda",
        f"1x{hosts}x{per_host}",
        gpu.config(),
        hosts * per_host,
        gpu.memory_bytes,
    )


def _tpu(text: str, name: str, shape: tuple[int, ...]) -> Target:
    dimensions = _TPU_DIMENSIONS.get(name, 2)
    if len(shape) != dimensions:
        example = f"{name}:" + "x".join("4" * dimensions)
        raise ClusterError(
            f"{text!r} has {len(shape)} numbers, a {name} torus has {dimensions}: "
            f"write its chips as {example}."
        )
    whole = all(size % 2 == 0 for size in shape[:2])
    single_host = math.prod(shape) < 4
    if not whole and not single_host:
        raise ClusterError(
            f"{text!r}: hosts of {name} have 2x2 chips, so the first two numbers must "
            "be even (or the whole slice below 4 chips)."
        )
    topology = f"{name}:" + "x".join(map(str, shape))
    return Target(
        topology,
        "tpu",
        topology,
        "",
        math.prod(shape) * TPU_CORES[name],
        0,
        () if whole else (*shape, 1)[:3],
    )
