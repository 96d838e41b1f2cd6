"""Cluster strings: what they are read as, and what a typing error is told."""

from __future__ import annotations

import re

import pytest

from rhino_jax.cluster.hardware import CATALOGUE
from rhino_jax.cluster.parse import ALIASES, example, parse_cluster
from rhino_jax.errors import ClusterError
from rhino_jax.verify.targets import GPUS, TPU_CORES, parse_target

GOOD = [
    ("h100:2x8", "h100:2x8", (2, 8), (16,)),
    (" H100:8 ", "h100:1x8", (1, 8), (8,)),
    ("a100-80:4x8", "a100-80:4x8", (4, 8), (32,)),
    ("a100:4", "a100-80:1x4", (1, 4), (4,)),
    ("t4:1x4", "t4:1x4", (1, 4), (4,)),
    ("v5e:4x4", "v5e:4x4", (4, 4), (4, 4)),
    ("v5e:1x1", "v5e:1x1", (1, 1), (1,)),
    ("v5p:4x4x4", "v5p:4x4x4", (4, 4, 4), (4, 4, 4)),
    ("v5p:2x2x1", "v5p:2x2x1", (2, 2, 1), (2, 2)),
    ("v4:2x2x4", "v4:2x2x4", (2, 2, 4, 2), (2, 2, 8)),
    ("v4-megacore:2x2x4", "v4-megacore:2x2x4", (2, 2, 4), (2, 2, 4)),
    ("v5e:16x16x4slices", "v5e:16x16x4slices", (4, 16, 16), (64, 16)),
    ("v5e:4x4x1slice", "v5e:4x4", (4, 4), (4, 4)),
    ("cpu:8", "cpu:8", (8,), (8,)),
    ("cpu:2x4", "cpu:2x4", (2, 4), (8,)),
]


@pytest.mark.parametrize(("text", "name", "sizes", "grid"), GOOD)
def test_parse(
    text: str, name: str, sizes: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    cluster = parse_cluster(text)
    assert cluster.name == name
    assert tuple(size for _, size in cluster.levels) == sizes
    assert cluster.grid == grid
    assert parse_cluster(cluster.name) == cluster


@pytest.mark.parametrize("name", [*CATALOGUE, *ALIASES])
def test_examples_parse_and_agree_with_the_compilers(name: str) -> None:
    cluster = parse_cluster(example(name))
    assert parse_cluster(cluster.name) == cluster
    if ALIASES.get(name, name) in (*GPUS, *TPU_CORES, "cpu"):
        target = parse_target(example(name))
        assert (cluster.name, cluster.num_devices) == (target.text, target.device_count)
        assert cluster.device.platform == target.platform


BAD = [
    ("h10:2x8", "did you mean h100"),
    ("h1000:2x8", "did you mean h100"),
    ("v5ee:4x4", "did you mean v5e"),
    ("a100-81:8", "did you mean a100-80"),
    ("quantum:3", "no device is named 'quantum'"),
    ("h100", "such as h100:2x8"),
    ("v5e", "such as v5e:4x4"),
    ("", "such as h100:2x8"),
    ("h100:2*8", "such as h100:2x8"),
    ("h100:-8", "such as h100:2x8"),
    ("h100:2x8x4", "3 numbers, GPUs have two"),
    ("h100:2x8x2slices", "only TPUs come in slices"),
    ("v5e:4x4x4", "3 numbers, a v5e torus has 2"),
    ("v5p:4x4", "2 numbers, a v5p torus has 3"),
    ("v5e:3x4", "must be even"),
    ("v5e:32x16", "512 chips in one slice, a pod of v5e has 256"),
    ("gb200:2x80", "72 GPUs, not 80"),
    ("h2O:2x8", "did you mean h20"),
    ("v5e:4x4x0slices", "size of 0"),
    ("cpu:2x4x2", "CPU devices have two"),
    ("h100:0x8", "size of 0"),
]


@pytest.mark.parametrize(("text", "told"), BAD)
def test_mistakes(text: str, told: str) -> None:
    with pytest.raises(ClusterError, match=told) as caught:
        parse_cluster(text)
    message = str(caught.value).replace(repr(text), "")
    shown = re.findall(r"[\w-]+:\d[\dx]*(?:slices)?", message)
    assert shown, "a valid example is shown"
    assert all(parse_cluster(one) for one in shown)
