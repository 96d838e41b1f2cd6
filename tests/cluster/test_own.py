"""Clusters from YAML files, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rhino_jax as rhino
from rhino_jax.cluster.own import EXAMPLE
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.errors import ClusterError


def written(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text)
    return str(path)


def test_the_example_is_a_cluster(tmp_path: Path) -> None:
    cluster = parse_cluster(written(tmp_path, EXAMPLE))
    assert cluster.device == parse_cluster("h100:1x8").device
    (network, hosts), (nvlink, gpus) = cluster.levels
    assert (hosts, gpus, network.kind, nvlink.kind) == (4, 8, "network", "nvlink")
    assert network.bytes_per_second == 25e9
    assert network.latency_seconds == pytest.approx(5e-6)


def test_figures_replace_the_catalogues(tmp_path: Path) -> None:
    text = "memory_bytes: 7.0e+10\nbf16_flops_per_second: 5.0e+14\n" + EXAMPLE
    device = parse_cluster(written(tmp_path, text)).device
    assert (device.memory_bytes, device.bf16_flops_per_second) == (7 * 10**10, 5e14)
    assert dict(device.sources)["memory_bytes"] == "my.yaml, by its author"


def test_a_plan_for_it(tmp_path: Path) -> None:
    text = EXAMPLE.replace("size: 8", "size: 2")
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    planned = rhino.plan(
        lambda w, x: w - x.T @ (x @ w),
        *(w, x),
        cluster=written(tmp_path, text),
        cache_dir="",
    )
    assert planned.plan.mesh.num_devices == 8
    assert planned.platform == "cuda"


LINE = "- {size: 8, kind: nvlink, gigabytes_per_second: 450, latency_microseconds: 2}"
BAD = [
    ("levels: [", "is no YAML"),
    ("- 3", "it must be a mapping"),
    (f"levels:\n  {LINE}", "'device' is missing"),
    (f"device: h10\nlevels:\n  {LINE}", "no device is named 'h10': h100"),
    ("device: h100", "'levels' is missing"),
    (f"device: h100\nlevles: 3\nlevels:\n  {LINE}", "did you mean levels"),
    (f"device: h100\nmemory_bytes: -3\nlevels:\n  {LINE}", "no figure above 0"),
    (
        f"device: h100\nlevels:\n  - {{size: 4}}\n  {LINE}",
        r"level 1 of 2 \(of size 4\) lacks a link: kind, gigabytes_per_second, latency",
    ),
    (f"device: h100\nlevels:\n  {LINE.replace('nvlink', 'nvlnk')}", "mean nvlink"),
    (f"device: h100\nlevels:\n  {LINE.replace('450', '0')}", "no figure above 0"),
    (f"device: h100\nlevels:\n  {LINE.replace('size: 8', 'size: x')}", "size 'x'"),
]


@pytest.mark.parametrize(("text", "told"), BAD)
def test_mistakes(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=told):
        parse_cluster(written(tmp_path, text))


def test_all_mistakes_at_once_and_an_example(tmp_path: Path) -> None:
    text = "device: h10\nlevels:\n  - {size: 0}\n  - {size: 2, kind: nvlnk}"
    with pytest.raises(ClusterError) as caught:
        parse_cluster(written(tmp_path, text))
    message = str(caught.value)
    assert message.count("\n  - ") >= 5
    assert EXAMPLE in message


def test_no_such_file() -> None:
    with pytest.raises(ClusterError, match="No such file"):
        parse_cluster("nowhere.yaml")
