"""The catalogue of devices: peaks, memory and memory bandwidth, each with its source.

Peaks are dense (no structured sparsity), of the matrix units at boost clock, and are
what JAX's *default* precision runs on: a float32 product takes TF32 on GPUs that have
it (Ampere and later) and one bfloat16 pass on TPUs. A type that a device has no units
for is priced as the type it is computed in, and its source says so. Memory is what a
program may use: what CUDA reports, or what the TPU compiler (libtpu 0.0.42) offered
when it refused a program that is too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rhino_jax.cluster.kernels import Kernels

CPU, CUDA, ROCM, TPU = "cpu", "cuda", "rocm", "tpu"
GPUS = (CUDA, ROCM)
GIB = 2**30
TERA, GIGA = 1e12, 1e9

COLUMNS = ("bf16", "f16", "f32", "f8", "int8")
"""Types with a peak of their own."""
_COLUMN_OF = {"bfloat16": "bf16", "float16": "f16", "int8": "int8", "uint8": "int8"}


@dataclass(frozen=True)
class Device:
    """One device as JAX lists it: a GPU, a TPU chip (or core), a simulated CPU share.

    ``sources`` names for each figure where it was read.
    """

    name: str
    platform: str
    kind: str
    """``jax.Device.device_kind``."""
    bf16_flops_per_second: float
    f16_flops_per_second: float
    f32_flops_per_second: float
    f8_flops_per_second: float
    int8_flops_per_second: float
    memory_bytes: int
    memory_bytes_per_second: float
    sources: tuple[tuple[str, str], ...]
    """(figure, source), one for "flops_per_second" and one for each other figure."""
    kernels: Kernels | None = None
    """What a profile says of this device's kernels; None: what is known of its kind."""

    @property
    def peak_flops_per_second(self) -> Mapping[str, float]:
        """Peak of the matrix units by column (:data:`COLUMNS`)."""
        return {
            "bf16": self.bf16_flops_per_second,
            "f16": self.f16_flops_per_second,
            "f32": self.f32_flops_per_second,
            "f8": self.f8_flops_per_second,
            "int8": self.int8_flops_per_second,
        }

    def flops_per_second(self, dtype: str) -> float:
        """Peak for products of ``dtype``, a name as the IR writes it.

        Types without a column (float64, complex, wide integers) take float32's: an
        upper bound, as no device here is faster in them.

        >>> h100 = CATALOGUE["h100"]
        >>> h100.flops_per_second("float8_e4m3fn") / h100.flops_per_second("bfloat16")
        2.0
        """
        return self.peak_flops_per_second[column(dtype)]


def column(dtype: str) -> str:
    """The column of :data:`COLUMNS` that a type runs as.

    >>> [column(dtype) for dtype in ("bfloat16", "float8_e5m2", "int32")]
    ['bf16', 'f8', 'f32']
    """
    return "f8" if dtype.startswith("float8") else _COLUMN_OF.get(dtype, "f32")


def _device(
    name: str,
    platform: str,
    kind: str,
    peaks: tuple[float, float, float, float, float],
    peaks_source: str,
    memory: tuple[int, str],
    bandwidth: tuple[float, str],
) -> Device:
    """``peaks`` in the order of :data:`COLUMNS`."""
    sources = (
        ("flops_per_second", peaks_source),
        ("memory_bytes", memory[1]),
        ("memory_bytes_per_second", bandwidth[1]),
    )
    return Device(name, platform, kind, *peaks, memory[0], bandwidth[0], sources)


_CUDA_REPORTS = "total memory as CUDA reports it, as in verify/targets.py"
_LIBTPU = "available HBM in the refusals of the TPU compiler (libtpu 0.0.42)"


def _told(gibibytes: float) -> tuple[int, str]:
    """What PyTorch says of a card when it runs out of memory, to two decimals."""
    return int(gibibytes * GIB), "total memory as CUDA reports it to PyTorch, rounded"


def _xla(card: str) -> str:
    """XLA keeps descriptions of cards, made on the cards (a GpuTargetConfigProto)."""
    return f"as CUDA reports it: XLA's target_config/specs/{card}.txtpb"


def _hopper(name: str, kind: str, memory_bytes: int, bandwidth: float) -> Device:
    sheet = f"NVIDIA {name.upper()} datasheet, SXM column"
    return _device(
        name,
        CUDA,
        kind,
        (989.5 * TERA, 989.5 * TERA, 494.5 * TERA, 1979 * TERA, 1979 * TERA),
        f"{sheet}, halved (listed with sparsity): BF16 and FP16 1979, TF32 989, "
        "FP8 and INT8 3958 TFLOPS; f32 runs as TF32",
        (memory_bytes, _xla({"h100": "h100_sxm"}.get(name, name))),
        (bandwidth, f"{sheet}: {bandwidth / TERA:.2f} TB/s"),
    )


def _ampere(name: str, kind: str, memory_bytes: int, bandwidth: float) -> Device:
    sheet = "NVIDIA A100 datasheet, SXM column"
    return _device(
        name,
        CUDA,
        kind,
        (312 * TERA, 312 * TERA, 156 * TERA, 312 * TERA, 624 * TERA),
        f"{sheet}: BF16 and FP16 312, TF32 156, INT8 624 dense; f32 runs as TF32; "
        "no FP8 units: as FP16",
        (memory_bytes, _xla(name.replace("-", "_sxm_"))),
        (bandwidth, f"{sheet} (bus width x memory clock)"),
    )


def _volta(gigabytes: int, memory_bytes: int, source: str) -> Device:
    sheet = "NVIDIA V100 datasheet, SXM2 column"
    return _device(
        f"v100-{gigabytes}",
        CUDA,
        f"Tesla V100-SXM2-{gigabytes}GB",
        (15.7 * TERA, 125 * TERA, 15.7 * TERA, 125 * TERA, 125 * TERA),
        f"{sheet}: tensor cores 125, FP32 15.7; no TF32; no BF16 units: as f32; no FP8 "
        "and INT8 matrix units: as FP16",
        (memory_bytes, source),
        (898_048_000_000, _xla("v100")),
    )


def _tpu_v4(name: str, cores: int, memory_source: str) -> Device:
    """Half a chip or a whole one: JAX on a TPU VM joins its two cores in one device."""
    peak = 137.5 * TERA * cores
    share = "half of the chip's " if cores == 1 else ""
    return _device(
        name,
        TPU,
        "TPU v4",
        (peak, peak, peak, peak, peak),
        f"Cloud TPU documentation, TPU v4: {share}275 TFLOPS, bf16 or int8; f32 is one "
        "bf16 pass by default; no f16 or f8 units: as bf16",
        (cores * 61 * GIB // 4, memory_source),
        (
            cores * 600 * GIGA,
            f"Cloud TPU documentation, TPU v4: {share}1200 GB/s",
        ),
    )


def _half_tpu(
    name: str,
    page: str,
    bf16_f8_int8: tuple[float, float, float],
    peaks_note: str,
    hbm_gib: float,
    bandwidth: float,
) -> Device:
    """A core of a chip of two, as JAX lists it; figures are the core's."""
    bf16, f8, int8 = (figure * TERA for figure in bf16_f8_int8)
    sheet = f"Cloud TPU documentation, {page}: half of the chip's"
    return _device(
        name,
        TPU,
        page,
        (bf16, bf16, bf16, f8, int8),
        f"{sheet} {peaks_note}; f32 is one bf16 pass by default; no f16 units: as bf16",
        (int(hbm_gib * GIB), _LIBTPU),
        (bandwidth, f"{sheet} {2 * bandwidth / GIGA:g} GB/s"),
    )


def _tpu(
    name: str,
    kind: str,
    bf16_int8_f8: tuple[float, float, float],
    f8_note: str,
    hbm_gib: float,
    bandwidth: float,
) -> Device:
    bf16, int8, f8 = (figure * TERA for figure in bf16_int8_f8)
    page = f"Cloud TPU documentation, TPU {name}"
    return _device(
        name,
        TPU,
        kind,
        (bf16, bf16, bf16, f8, int8),
        f"{page}: {bf16_int8_f8[0]} TFLOPS bf16, {bf16_int8_f8[1]} TOPS int8; "
        f"f32 is one bf16 pass by default; no f16 units: as bf16; {f8_note}",
        (int(hbm_gib * GIB), _LIBTPU),
        (bandwidth, f"{page}: {bandwidth / GIGA:g} GB/s"),
    )


_DEVICES = (
    _device(
        "cpu",
        CPU,
        "cpu",
        (50 * GIGA, 50 * GIGA, 50 * GIGA, 50 * GIGA, 50 * GIGA),
        "assumed: half of one AVX2 core at 3 GHz (2 FMA units x 8 lanes x 2 x 3e9 = 96 "
        "GFLOPS, Intel Optimization Reference Manual), as simulated devices share "
        "cores; narrow types run as f32",
        (4 * GIB, "assumed: a share of a 32 GiB host among 8 simulated devices"),
        (
            6.4 * GIGA,
            "assumed: an eighth of two channels of DDR4-3200 (JEDEC JESD79-4: 51.2 "
            "GB/s)",
        ),
    ),
    _device(
        "t4",
        CUDA,
        "Tesla T4",
        (8.1 * TERA, 65 * TERA, 8.1 * TERA, 65 * TERA, 130 * TERA),
        "NVIDIA T4 datasheet: FP16 65, FP32 8.1, INT8 130; no TF32; no BF16 units: as "
        "f32; no FP8 units: as FP16",
        (15_642_329_088, _CUDA_REPORTS),
        (320_064_000_000, "NVIDIA T4 datasheet (256 bit x 5001 MHz x 2)"),
    ),
    _device(
        "l4",
        CUDA,
        "NVIDIA L4",
        (121 * TERA, 121 * TERA, 60 * TERA, 242.5 * TERA, 242.5 * TERA),
        "NVIDIA L4 datasheet, halved (listed with sparsity): BF16 and FP16 242, TF32 "
        "120, FP8 and INT8 485; f32 runs as TF32",
        (23_609_475_072, _CUDA_REPORTS),
        (300_096_000_000, "NVIDIA L4 datasheet (192 bit x 6252 MHz x 2)"),
    ),
    _device(
        "a10g",
        CUDA,
        "NVIDIA A10G",
        (70 * TERA, 70 * TERA, 35 * TERA, 70 * TERA, 140 * TERA),
        "NVIDIA A10G datasheet: BF16 and FP16 70, TF32 35, INT8 140 dense; f32 runs as "
        "TF32; no FP8 units: as FP16",
        (23_609_475_072, _CUDA_REPORTS),
        (600_096_000_000, "NVIDIA A10G datasheet (384 bit x 6251 MHz x 2)"),
    ),
    _device(
        "rtx4090",
        CUDA,
        "NVIDIA GeForce RTX 4090",
        (165.2 * TERA, 165.2 * TERA, 82.6 * TERA, 330.3 * TERA, 660.6 * TERA),
        "NVIDIA Ada architecture brief, dense with FP32 sums: BF16 and FP16 165.2, "
        "TF32 82.6, FP8 330.3, INT8 660.6; f32 runs as TF32",
        _told(23.64),
        (1_008_096_000_000, "NVIDIA Ada architecture brief (384 bit x 10501 MHz x 2)"),
    ),
    _device(
        "l40s",
        CUDA,
        "NVIDIA L40S",
        (362 * TERA, 362 * TERA, 183 * TERA, 733 * TERA, 733 * TERA),
        "NVIDIA L40S datasheet, dense: BF16 and FP16 362, TF32 183, FP8 and INT8 733; "
        "f32 runs as TF32",
        _told(44.4),
        (864 * GIGA, "NVIDIA L40S datasheet: 864 GB/s"),
    ),
    _volta(16, 16_935_682_048, _xla("v100")),
    _volta(32, 34_079_637_504, _CUDA_REPORTS),
    _ampere("a100-40", "NVIDIA A100-SXM4-40GB", 42_331_013_120, 1_555_200_000_000),
    _ampere("a100-80", "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000),
    _device(
        "h20",
        CUDA,
        "NVIDIA H20",
        (148 * TERA, 148 * TERA, 74 * TERA, 296 * TERA, 296 * TERA),
        "NVIDIA HGX H20 datasheet, dense: BF16 and FP16 148, TF32 74, FP8 and INT8 "
        "296; f32 runs as TF32",
        _told(95.0),
        (4000 * GIGA, "NVIDIA HGX H20 datasheet: 4.0 TB/s"),
    ),
    _hopper("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    _hopper("h200", "NVIDIA H200", 151_397_597_184, 4_800_000_000_000),
    _device(
        "b200",
        CUDA,
        "NVIDIA B200",
        (2250 * TERA, 2250 * TERA, 1100 * TERA, 4500 * TERA, 4500 * TERA),
        "NVIDIA Blackwell architecture brief, HGX B200 per GPU, halved (listed with "
        "sparsity): BF16 and FP16 4500, TF32 2200, FP8 and INT8 9000; f32 runs as TF32",
        (191_514_411_008, _xla("b200")),
        (7_672_320_000_000, f"{_xla('b200')} (NVIDIA's datasheet rounds it to 8 TB/s)"),
    ),
    _device(
        "gb200",
        CUDA,
        "NVIDIA GB200",
        (2500 * TERA, 2500 * TERA, 1250 * TERA, 5000 * TERA, 5000 * TERA),
        "NVIDIA GB200 NVL72 datasheet per GPU, halved (listed with sparsity): BF16 and "
        "FP16 5000, TF32 2500, FP8 and INT8 10000; f32 runs as TF32",
        (197_897_748_480, _xla("gb200")),
        (7_928_064_000_000, f"{_xla('gb200')} (NVIDIA's datasheet: 8 TB/s)"),
    ),
    _device(
        "mi300x",
        ROCM,
        "AMD Instinct MI300X",
        (1307.4 * TERA, 1307.4 * TERA, 653.7 * TERA, 2614.9 * TERA, 2614.9 * TERA),
        "AMD Instinct MI300X datasheet, dense: BF16 and FP16 1307.4, TF32 653.7, FP8 "
        "and INT8 2614.9; f32 runs as TF32",
        (
            int(191.98 * GIB),
            "AMD Instinct MI300X datasheet: 192 GB, less what ROCm keeps",
        ),
        (5300 * GIGA, "AMD Instinct MI300X datasheet: 5.3 TB/s"),
    ),
    _half_tpu(
        *("v2", "TPU v2", (22.5, 22.5, 22.5)),
        *("45 TFLOPS, bf16; no f8 or int8 units: as bf16", 7.48, 350 * GIGA),
    ),
    _half_tpu(
        *("v3", "TPU v3", (61.5, 61.5, 61.5)),
        *("123 TFLOPS, bf16; no f8 or int8 units: as bf16", 15.48, 450 * GIGA),
    ),
    _tpu_v4("v4", 1, _LIBTPU),
    _tpu_v4("v4-megacore", 2, f"assumed twice a core's; {_LIBTPU}"),
    _tpu(
        *("v5e", "TPU v5 lite", (197, 393, 197), "no f8 units: as bf16"),
        *(15.75, 819 * GIGA),
    ),
    _tpu("v5p", "TPU v5", (459, 918, 459), "FP8 459 TFLOPS", 95.74, 2765 * GIGA),
    _tpu(
        *("v6e", "TPU v6 lite", (918, 1836, 918)),
        *("f8 as bf16 (jax.experimental.pallas.tpu, get_tpu_info)", 31.25),
        1638 * GIGA,
    ),
    _half_tpu(
        *("tpu7x", "TPU7x", (1153.5, 2307, 1153.5)),
        *("2307 TFLOPS bf16, 4614 FP8; no int8 units: as bf16", 94.75, 3690 * GIGA),
    ),
)
CATALOGUE: Mapping[str, Device] = {device.name: device for device in _DEVICES}
"""Devices by name, slower generations first within a platform."""

_ALSO = {
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v6e": "v6e",
    "TPU v7x": "tpu7x",
    "NVIDIA H200 141GB HBM3e": "h200",
    # Drivers of before 2021 left the maker out.
    "A100-SXM4-40GB": "a100-40",
    "A100-SXM4-80GB": "a100-80",
}
_KINDS = {
    **{device.kind: device.name for device in _DEVICES if device.name != "v4-megacore"},
    **_ALSO,
}


def catalogue_name(device_kind: str, num_cores: int = 1) -> str | None:
    """The catalogue's name of a ``jax.Device.device_kind``; None if it is not in it.

    ``num_cores`` is the device's attribute of that name: a TPU v4 is listed by core
    when compiling for a described slice, by chip (2 cores in one) on a TPU VM.

    >>> catalogue_name("NVIDIA H100 80GB HBM3"), catalogue_name("NVIDIA H100 PCIe")
    ('h100', None)
    >>> catalogue_name("TPU v4"), catalogue_name("TPU v4", num_cores=2)
    ('v4', 'v4-megacore')
    """
    name = _KINDS.get(device_kind)
    return "v4-megacore" if name == "v4" and num_cores == 2 else name
