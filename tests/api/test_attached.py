"""The attached devices as a cluster, from what devices tell of themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rhino_jax.api import attached
from rhino_jax.api.attached import attached_cluster, more_memory
from rhino_jax.cluster.hardware import CATALOGUE, GIB
from rhino_jax.cluster.topology import MEMORY, NETWORK, crossing
from rhino_jax.errors import ClusterError
from rhino_jax.ir.mesh import Mesh

H100 = "NVIDIA H100 80GB HBM3"


def gpu(host: int = 0, limit_bytes: int | None = None) -> Any:
    stats = None if limit_bytes is None else {"bytes_limit": limit_bytes}
    return SimpleNamespace(
        platform="gpu",
        device_kind=H100,
        process_index=host,
        memory_stats=lambda: stats,
    )


def test_memory_is_what_the_allocator_may_take() -> None:
    # JAX takes three quarters of a GPU unless told otherwise: 59.4 GiB of an H100.
    found = attached_cluster([gpu(limit_bytes=int(59.4 * GIB)) for _ in range(8)])
    assert (found.name, found.device.memory_bytes) == ("h100:1x8", 59 * GIB)


def test_what_would_give_it_more_is_said() -> None:
    said = more_memory(attached_cluster([gpu(limit_bytes=int(59.4 * GIB))]))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in said and "59 of 79 GiB" in said
    assert not more_memory(attached_cluster([gpu(limit_bytes=75 * GIB)]))
    assert not more_memory(attached_cluster([gpu()]))


def test_devices_of_one_process_may_differ() -> None:
    found = attached_cluster([gpu(limit_bytes=60 * GIB), gpu(limit_bytes=50 * GIB)])
    assert found.device.memory_bytes == 50 * GIB


def test_the_catalogue_where_nothing_is_told_or_more() -> None:
    known = CATALOGUE["h100"].memory_bytes
    assert attached_cluster([gpu()]).device.memory_bytes == known
    assert attached_cluster([gpu(limit_bytes=2**40)]).device.memory_bytes == known


def test_devices_of_other_processes_are_not_asked() -> None:
    def never() -> Any:
        raise AssertionError("asked a device of another process")

    there = gpu(host=1)
    there.memory_stats = never
    found = attached_cluster([gpu(limit_bytes=70 * GIB), there])
    assert (found.name, found.device.memory_bytes) == ("h100:2x1", 70 * GIB)


def cpu(process: int) -> Any:
    return SimpleNamespace(platform="cpu", process_index=process)


def test_processes_of_simulated_devices_are_linked_by_a_network() -> None:
    assert attached_cluster([cpu(0)] * 8).name == "cpu:8"
    cluster = attached_cluster([cpu(n // 4) for n in range(8)])
    mesh = Mesh.of(data=2, tensor=4)
    assert cluster.name == "cpu:2x4"
    between, within = (crossing(cluster, mesh, (name,)) for name in mesh.names)
    assert [link.kind for link, _ in (*between, *within)] == [NETWORK, MEMORY]
    assert between[0][0].bytes_per_second < within[0][0].bytes_per_second
    with pytest.raises(ClusterError, match=r"different numbers of devices: \[1, 2\]"):
        attached_cluster([cpu(0), cpu(0), cpu(1)])


@pytest.mark.parametrize(
    ("machines", "name"),
    [("aabb", "h100:2x4"), ("aaaa", "h100:1x8"), ("abab", "h100:4x2")],
)
def test_processes_of_one_machine_share_its_links(
    machines: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs a process; machines that take turns are as good as so many more."""
    monkeypatch.setattr(
        attached, "hosts", lambda ranks: {r: machines[r] for r in ranks}
    )
    assert attached_cluster([gpu(n // 2) for n in range(8)]).name == name
