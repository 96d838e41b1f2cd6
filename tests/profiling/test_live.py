"""A small live profile of the devices that tests run on."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

import rhino_jax as rhino
from rhino_jax.api.profiles import kept_profile, profile_place, profiled
from rhino_jax.cluster.kernels import CONVOLUTION
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.profile import MEASURED, Profile
from rhino_jax.errors import ProfileError
from rhino_jax.profiling.grid import (
    OF_FILTER,
    Grid,
    Kernel,
    convolution,
    pointwise,
)
from rhino_jax.profiling.live import core_seconds
from rhino_jax.profiling.make import measured_profile

SMALL = Grid(
    dtypes=("float32",),
    sides=(8, 16),
    batches=(2,),
    batched_sides=(8,),
    moved_bytes=(2**12,),
    rows=32,
    width=8,
    wire_bytes=(256, 4096),
    convolutions=((1, 8, 4, 4, 3, 1),),
    pointwise=((16, 64), (16, 64), (8,)),
)

NO_MALLOPT = 3
KEEPING = f"""
import resource, sys
from rhino_jax.profiling.live import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

handed_back = faults()
if not keep_memory():
    sys.exit({NO_MALLOPT})
faults()
print(handed_back, faults())
"""


@pytest.fixture(scope="module")
def found() -> Profile:
    told: list[str] = []
    profile = measured_profile(
        jax.devices()[:2],
        lambda what, done, total: told.append(what),
        SMALL,
        passes=2,
        clock=core_seconds,
    )
    assert told.count("product float32") >= 2 * 2**3, "all sides, twice"
    assert "product float32" in told and "all-reduce among 2" in told
    return profile


def test_it_is_a_profile(found: Profile) -> None:
    assert (found.device, found.made) == ("cpu", MEASURED)
    assert Profile.from_json(found.to_json()) == found
    shares = {one.kind: one.shares for one in found.curves}
    assert len(shares[CONVOLUTION]) == 4, "a share a size"
    kinds = {one.fit.kind for one in found.collectives}
    assert len(kinds) == 5 and {one.fit.count for one in found.collectives} == {2}
    assert dict(found.figures)["f32_flops_per_second"] > 1e5


def test_cores_work_for_this_process_or_for_others() -> None:
    began, waited = core_seconds(), threading.Event().wait(0.2)
    assert not waited and core_seconds() - began < 0.2
    began = core_seconds()
    while core_seconds() == began:
        pass  # its own work moves the clock


def test_memory_that_is_kept_is_there_again() -> None:
    """In a process of its own: it is for good. Pages are asked for once, not again."""
    ran = subprocess.run(
        [sys.executable, "-c", KEEPING], capture_output=True, text=True, check=False
    )
    if ran.returncode == NO_MALLOPT:
        pytest.skip("the C library is not GNU's")
    handed_back, kept = map(int, ran.stdout.split())
    assert kept < handed_back / 10, ran.stderr


@pytest.mark.parametrize(
    ("kernel", "made"),
    [
        (convolution(2, 6, 3, 4, 3, 2, "float32"), (2, 3, 3, 4)),
        (convolution(2, 6, 3, 4, 3, 2, "float32", OF_FILTER), (3, 3, 3, 4)),
        (pointwise(256, 16, 8, "float32"), (4, 8, 8, 8)),
        (pointwise(16, 256, 8, "float32"), (1, 1, 16, 8)),
    ],
)
def test_a_convolution_is_a_product(kernel: Kernel, made: tuple[int, ...]) -> None:
    found = jax.eval_shape(kernel.function, *kernel.avals)
    assert found.shape == made
    m, k, n = map(int, kernel.size)
    assert kernel.flops == 2 * m * k * n and found.size == m * n


def test_plans_are_priced_with_it(found: Profile, tmp_path: Path) -> None:
    place = tmp_path / "p.json"
    found.save(place)
    cluster = profiled(parse_cluster("cpu:2"), str(place))
    assert cluster.levels[0][0].fits and cluster.device.kernels == found.kernels
    x = jax.ShapeDtypeStruct((256, 64), "float32")
    w = jax.ShapeDtypeStruct((64, 64), "float32")

    def seconds(**options: str) -> float:
        planned = rhino.plan(
            lambda w, x: w - x.T @ (x @ w),
            *(w, x),
            cluster="cpu:2",
            cache_dir="",
            **options,
        )
        assert planned.predicted is not None
        return planned.predicted.step_seconds

    assert seconds(profile=str(place)) != seconds()


def test_kept_for_the_attached_devices(found: Profile, tmp_path: Path) -> None:
    devices, cluster = jax.devices()[:2], parse_cluster("cpu:2")
    assert kept_profile(cluster, devices, tmp_path) == cluster
    found.save(profile_place(tmp_path, devices))
    assert kept_profile(cluster, devices, tmp_path) == found.merged(cluster)
    assert kept_profile(cluster, jax.devices(), tmp_path) == cluster
    assert kept_profile(cluster, devices, None) == cluster


def test_none_comes_with_rhino_for_every_device() -> None:
    with pytest.raises(ProfileError, match="rhino profile --compile-only t4"):
        profiled(parse_cluster("t4:1x4"), "compile-only")
