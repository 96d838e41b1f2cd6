"""The catalogue: every figure has a source and lies where such figures can lie."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from rhino_jax.cluster.hardware import (
    CATALOGUE,
    COLUMNS,
    CPU,
    GPUS,
    TPU,
    Device,
    catalogue_name,
)
from rhino_jax.cluster.sources import address
from rhino_jax.verify.targets import GPUS as TARGETS

WANTED = (
    "cpu t4 l4 a10g rtx4090 l40s v100-16 v100-32 a100-40 a100-80 h20 h100 h200 b200 "
    "gb200 mi300x v2 v3 v4 v5e v5p v6e tpu7x v4-megacore".split()
)
_GPU_FLOPS, _GPU_MEMORY, _GPU_BANDWIDTH = (8e12, 3e15), (15e9, 210e9), (300e9, 8e12)
FLOPS = dict.fromkeys(GPUS, _GPU_FLOPS) | {CPU: (1e9, 1e12), TPU: (20e12, 1.2e15)}
MEMORY = dict.fromkeys(GPUS, _GPU_MEMORY) | {CPU: (1e9, 1e11), TPU: (8e9, 110e9)}
BANDWIDTH = dict.fromkeys(GPUS, _GPU_BANDWIDTH) | {CPU: (1e9, 1e11), TPU: (3e11, 4e12)}
each_device = pytest.mark.parametrize("device", CATALOGUE.values(), ids=CATALOGUE)


def test_the_catalogue_is_complete() -> None:
    assert sorted(CATALOGUE) == sorted(WANTED)
    assert all(name == device.name for name, device in CATALOGUE.items())


@each_device
def test_every_figure_has_a_source(device: Device) -> None:
    figures = {
        "flops_per_second" if field.name.endswith("flops_per_second") else field.name
        for field in dataclasses.fields(device)
        if field.type in ("float", "int")
    }
    assert {figure for figure, _ in device.sources} == figures
    for _, source in device.sources:
        named = ("datasheet", "documentation", "brief", "CUDA", "TPU compiler")
        assert source.startswith("assumed") or any(word in source for word in named)
        seen = ("assumed", "available HBM in the refusals", "total memory as CUDA")
        assert source.startswith(seen) or address(source), source


@each_device
def test_figures_are_plausible(device: Device) -> None:
    def within(figure: float, limits: dict[str, tuple[float, float]]) -> bool:
        low, high = limits[device.platform]
        return low <= figure <= high

    assert tuple(device.peak_flops_per_second) == COLUMNS
    assert within(device.f16_flops_per_second, FLOPS)
    assert within(device.memory_bytes, MEMORY)
    assert within(device.memory_bytes_per_second, BANDWIDTH)
    peaks = device.peak_flops_per_second
    assert peaks["f32"] <= peaks["bf16"] <= peaks["f16"] <= peaks["f8"]
    assert peaks["f16"] <= peaks["int8"] or device.name == "tpu7x"
    assert peaks["int8"] <= 20 * peaks["f32"]


@pytest.mark.parametrize("name", [n for n in WANTED if n in TARGETS])
def test_gpus_are_those_the_compiler_is_told_of(name: str) -> None:
    device, target = CATALOGUE[name], TARGETS[name]
    assert device.memory_bytes == target.memory_bytes
    assert device.memory_bytes_per_second == target.memory_bytes_per_second
    assert device.kind == target.description


def test_a_faster_generation_is_faster() -> None:
    for slow, fast in (("a100-40", "a100-80"), ("a100-80", "h100"), ("h100", "h200")):
        old, new = CATALOGUE[slow], CATALOGUE[fast]
        assert new.bf16_flops_per_second >= old.bf16_flops_per_second
        assert new.memory_bytes > 0.99 * old.memory_bytes  # ECC and tables differ
        assert new.memory_bytes_per_second > old.memory_bytes_per_second


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA GB200", "gb200"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v2", "v2"),
        ("TPU v3", "v3"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H20", "h20"),
        ("AMD Instinct MI300X", "mi300x"),
        ("cpu", "cpu"),
        ("NVIDIA H100 PCIe", None),
        ("TPU v4 lite", None),
        ("", None),
    ],
)
def test_device_kinds(kind: str, name: str | None) -> None:
    assert catalogue_name(kind) == name


def test_a_whole_tpu_v4_chip_is_two_cores() -> None:
    core, chip = CATALOGUE["v4"], CATALOGUE["v4-megacore"]
    assert catalogue_name("TPU v4", num_cores=2) == "v4-megacore"
    assert catalogue_name("TPU v5", num_cores=2) == "v5p"
    assert chip.memory_bytes == 2 * core.memory_bytes == 30.5 * 2**30
    assert chip.bf16_flops_per_second == 2 * core.bf16_flops_per_second == 275e12


def test_peaks_by_dtype() -> None:
    h100, t4 = CATALOGUE["h100"], CATALOGUE["t4"]
    assert h100.flops_per_second("bfloat16") == 989.5e12
    assert h100.flops_per_second("float32") == 494.5e12
    assert h100.flops_per_second("float8_e5m2") == 1979e12
    assert (
        h100.flops_per_second("int32") == h100.flops_per_second("float64") == 494.5e12
    )
    assert t4.flops_per_second("uint8") == 130e12
    assert t4.flops_per_second("bfloat16") == t4.flops_per_second("float32") == 8.1e12


def test_devices_are_values() -> None:
    device = CATALOGUE["h100"]
    assert pickle.loads(pickle.dumps(device)) == device
    assert len(set(CATALOGUE.values())) == len(CATALOGUE)
