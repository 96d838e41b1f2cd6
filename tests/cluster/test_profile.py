"""Profiles: JSON there and back, merged over the catalogue, refused where wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rhino_jax.cluster.hardware import CATALOGUE
from rhino_jax.cluster.kernels import CONVOLUTION, ELEMENTWISE, PRODUCT, Curve
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.profile import (
    COMPILE_ONLY,
    MEASURED,
    SHIPPED,
    LinkFit,
    Profile,
    kernels_of,
    shipped,
)
from rhino_jax.cluster.topology import Fit
from rhino_jax.cost.collectives import collective_seconds
from rhino_jax.errors import ProfileError

PROFILE = Profile(
    "h100",
    MEASURED,
    "a test",
    "2026-11-26",
    (("jax", "0.10.2"),),
    1e-6,
    (
        Curve(PRODUCT, "bf16", ((1.0, 8.0),) * 3, tuple([0.5] * 8), 0.1),
        Curve(CONVOLUTION, "", (), (0.3,)),
        Curve(ELEMENTWISE, "", ((1024.0, 4096.0),), (0.1, 0.9)),
    ),
    (LinkFit("nvlink", Fit("all-reduce", 8, ((10.0, 1.0), (20.0, 2.0))), 0.2),),
    (("memory_bytes_per_second", 2e12),),
)


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE
    assert Profile.load(path).to_json() == PROFILE.to_json()


def test_merged_over_the_catalogue() -> None:
    plain = parse_cluster("h100:2x8")
    cluster = PROFILE.merged(plain)
    assert cluster.device.kernels == PROFILE.kernels
    assert cluster.device.memory_bytes_per_second == 2e12
    assert cluster.device.bf16_flops_per_second == plain.device.bf16_flops_per_second
    (network, _), (nvlink, _) = cluster.levels
    assert network == plain.levels[0][0] and len(nvlink.fits) == 1
    assert collective_seconds("all-reduce", 15, ((nvlink, 8),)) == 1.5
    assert repr(cluster) != repr(plain), "plans are kept by this text"


def test_other_hardware_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"is of h100, v5e:4x4 has v5e"):
        PROFILE.merged(parse_cluster("v5e:4x4"))


def broken(change: Callable[[Any], object]) -> str:
    data = json.loads(PROFILE.to_json())
    change(data)
    return json.dumps(data)


BAD: list[tuple[Callable[[Any], object], str]] = [
    (lambda d: d.update(format="x"), "no format 'rhino-profile'"),
    (lambda d: d.update(version=2), "version 2, this Rhino reads 1"),
    (lambda d: d.pop("curves"), "missing: curves"),
    (lambda d: d.update(made="mesured"), "did you mean 'measured'"),
    (lambda d: d.update(launch_seconds=-1), "launch_seconds -1"),
    (lambda d: d["curves"][0]["shares"].__setitem__(0, 1.5), r"not \[1.5\]"),
    (lambda d: d["curves"][0]["shares"].pop(), "7 shares on a grid of 8"),
    (lambda d: d["curves"][0]["axes"].pop(), "2 axes, a product has 3"),
    (lambda d: d["curves"][2]["axes"][0].reverse(), "ascending"),
    (lambda d: d["curves"][2].update(kind="elementwize"), "no curve of elementwise"),
    (lambda d: d["curves"].pop(0), "no curve of product"),
    (lambda d: d["collectives"][0].update(count=1), "at least 2 devices"),
    (lambda d: d["collectives"][0].update(points=[[9, 2], [10, 1]]), "must not fall"),
    (lambda d: d["collectives"][0].update(kind="all-sum"), "kind 'all-sum'"),
    (lambda d: d["figures"].update(bf16_flops_per_second=-1), "figures: 'bf16"),
    (lambda d: d.update(traffic=2), "traffic 2"),
    (lambda d: d["curves"].__setitem__(0, 3), r"curves\[0\]: no mapping"),
]


@pytest.mark.parametrize(("change", "told"), BAD)
def test_what_can_not_be_is_refused(change: Callable[[Any], object], told: str) -> None:
    with pytest.raises(ProfileError, match=told):
        Profile.from_json(broken(change))


def test_all_faults_at_once() -> None:
    def change(data: Any) -> None:
        data.update(version=7, launch_seconds="fast")
        data["curves"][1]["shares"] = [0.0]

    with pytest.raises(ProfileError) as caught:
        Profile.from_json(broken(change), "mine.json")
    message = str(caught.value)
    assert message.startswith("mine.json") and message.count("\n  - ") == 3


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "rhino-plan"}'])
def test_no_profile_at_all(text: str) -> None:
    with pytest.raises(ProfileError):
        Profile.from_json(text)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="next: rhino profile"):
        Profile.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", SHIPPED)
def test_those_that_come_with_rhino(name: str) -> None:
    found = shipped(name, COMPILE_ONLY)
    assert found is not None and found.device == name and found.made == COMPILE_ONLY
    assert Profile.from_json(found.to_json()) == found
    assert found.merged(parse_cluster(_one(name))).device.kernels == found.kernels


def _one(name: str) -> str:
    return f"{name}:2x2x1" if name == "v5p" else f"{name}:1x1"


def test_whose_kernels_a_device_has() -> None:
    h100, t4, v5e = (kernels_of(CATALOGUE[name]) for name in ("h100", "t4", "v5e"))
    assert h100.source.startswith("measured") and h100.launch_seconds == 2e-6
    assert t4.source.startswith("assumed as of h100") and t4.curves == h100.curves
    assert v5e.source.startswith("compile-only")
    cpu = kernels_of(CATALOGUE["cpu"])
    assert (cpu.curves, cpu.launch_seconds) == (h100.curves, 0.0)
    assert kernels_of(replace(CATALOGUE["t4"], kernels=v5e)) == v5e
