"""Targets: what they parse to, and what a typing error is told."""

from __future__ import annotations

import pytest

from rhino_jax.errors import ClusterError
from rhino_jax.verify.targets import ALIASES, GPUS, TPU_CORES, parse_target


@pytest.mark.parametrize(
    ("text", "platform", "topology", "devices"),
    [
        ("h100:2x8", "cuda", "1x2x8", 16),
        ("H100:8", "cuda", "1x1x8", 8),
        ("a100:4x4", "cuda", "1x4x4", 16),
        ("v5e:4x4", "tpu", "v5e:4x4", 16),
        ("v4:2x2x4", "tpu", "v4:2x2x4", 32),
        ("tpu7x:2x2x1", "tpu", "tpu7x:2x2x1", 8),
        ("cpu:8", "cpu", "8", 8),
    ],
)
def test_parse(text: str, platform: str, topology: str, devices: int) -> None:
    found = parse_target(text)
    assert (found.platform, found.topology) == (platform, topology)
    assert found.device_count == devices
    assert parse_target(found.text) == found


def test_small_tpu_slices_name_their_host() -> None:
    assert parse_target("v5e:1x1").host_bounds == (1, 1, 1)
    assert parse_target("v5e:2x2").host_bounds == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("h10:2x8", "did you mean h100"),
        ("v5ee:4x4", "did you mean v5e"),
        ("h100", "Write device:size"),
        ("h100:2x8x4", "3 numbers, GPUs have two"),
        ("v5e:4x4x4", "3 numbers, a v5e torus has 2"),
        ("v5p:4x4", "2 numbers, a v5p torus has 3"),
        ("v5e:3x4", "must be even"),
        ("cpu:2x4x2", "CPU devices have two"),
        ("h100:0x8", "size of 0"),
    ],
)
def test_mistakes(text: str, told: str) -> None:
    with pytest.raises(ClusterError, match=told):
        parse_target(text)


def test_gpu_descriptions_are_complete_and_plausible() -> None:
    for gpu in GPUS.values():
        text = gpu.config()
        assert text.count("{") == text.count("}") == 3
        assert gpu.shared_per_block_bytes <= gpu.shared_per_core_bytes
        assert 10e9 < gpu.memory_bytes < 300e9
        assert 0.3e12 <= gpu.memory_bytes_per_second < 10e12
    assert {*ALIASES.values()} <= {*GPUS, *TPU_CORES}
