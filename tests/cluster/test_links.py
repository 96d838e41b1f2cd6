"""Links: sources, plausible figures, slower outwards; which tori close."""

from __future__ import annotations

import pytest

from rhino_jax.cluster.hardware import CATALOGUE
from rhino_jax.cluster.links import tpu_cluster
from rhino_jax.cluster.parse import example, parse_cluster
from rhino_jax.cluster.sources import address
from rhino_jax.ir.mesh import TORUS

SOURCES = (
    *("brief", "datasheet", "documentation", "How to Scale", "NCCL", "RCCL"),
    *("Amazon EC2", "Jouppi et al."),
)
TEXTS = [*map(example, CATALOGUE), "v5e:16x16x4slices", "v4:4x4x4x2slices"]


@pytest.mark.parametrize("text", TEXTS)
def test_links_have_sources_and_are_plausible(text: str) -> None:
    cluster = parse_cluster(text)
    for link, _ in cluster.levels:
        for source in (link.bandwidth_source, link.latency_source):
            assert source.startswith("assumed") or any(w in source for w in SOURCES)
            assert source.startswith("assumed") or address(source), source
        # Only 25 Gb/s shared by 8 GPUs is less than 1 GB/s.
        slow = link.name == "Ethernet" and "25 Gb/s" in link.bandwidth_source
        assert (3e8 if slow else 1e9) <= link.bytes_per_second <= 1e12
        assert 0.5e-6 <= link.latency_seconds <= 50e-6
        assert link.bytes_per_second < cluster.device.memory_bytes_per_second
    speeds = [link.bytes_per_second for link, _ in cluster.levels]
    assert speeds == sorted(speeds), "links between hosts are the slower ones"


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [
        ("t4:1x4", [3.125, 15.754]),
        ("a100-40:2x8", [6.25, 300]),
        ("a100-80:2x8", [25, 300]),
        ("h100:2x8", [50, 450]),
        ("b200:2x8", [50, 900]),
        ("v5e:4x4", [50, 50]),
        ("v4:2x2x2", [22.5, 22.5, 22.5, 300]),
        ("v3:4x4", [41, 41, 225]),
        ("tpu7x:4x4x4x2slices", [6.25, 50, 50, 50, 600]),
        ("mi300x:2x8", [50, 448]),
    ],
)
def test_bandwidths(text: str, gigabytes: list[float]) -> None:
    found = [link.bytes_per_second / 1e9 for link, _ in parse_cluster(text).levels]
    assert found == pytest.approx(gigabytes, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "closed"),
    [
        ("v5e", (4, 4), (False, False)),
        ("v5e", (8, 16), (False, True)),
        ("v6e", (16, 16), (True, True)),
        ("v5p", (2, 2, 4), (False, False, False)),
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v4", (4, 4, 4), (True, True, True)),
        ("tpu7x", (8, 8, 8), (True, True, True)),
        ("v2", (8, 16), (False, True)),
        ("v3", (16, 32), (False, True)),
    ],
)
def test_which_dimensions_close(
    name: str, shape: tuple[int, ...], closed: tuple[bool, ...]
) -> None:
    torus = [link for link, _ in tpu_cluster(name, shape).levels if link.kind == TORUS]
    assert tuple(link.wraps for link in torus) == closed
    for link in torus:
        assert link.ring_bytes_per_second == link.bytes_per_second * (1 + link.wraps)


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("gb200:1x4", [("InfiniBand", 1), ("NVLink", 4)]),
        ("gb200:18x4", [("NVLink", 18), ("NVLink", 4)]),
        ("gb200:36x4", [("InfiniBand", 2), ("NVLink", 18), ("NVLink", 4)]),
        ("gb200:20x4", [("InfiniBand", 2), ("NVLink", 10), ("NVLink", 4)]),
        ("gb200:2x72", [("InfiniBand", 2), ("NVLink", 72)]),
        ("h100:18x4", [("InfiniBand", 18), ("NVLink", 4)]),
    ],
)
def test_nvlink_domains(text: str, levels: list[tuple[str, int]]) -> None:
    assert [(link.name, size) for link, size in parse_cluster(text).levels] == levels
