"""Curves and fits give back what was put in."""

from __future__ import annotations

import itertools

import pytest

from rhino_jax.cluster.hardware import CATALOGUE
from rhino_jax.cluster.kernels import ELEMENTWISE, PRODUCT, Kernels
from rhino_jax.profiling.fit import Sample, curves, link_fits
from rhino_jax.profiling.grid import (
    Exchange,
    elementwise,
    product,
)

DEVICE = CATALOGUE["h100"]


def took(m: int, k: int, n: int) -> float:
    """A made-up law: a share that grows with the least side."""
    return 2 * m * k * n / (DEVICE.bf16_flops_per_second * min(m, k, n) / 4096)


def samples(sides: tuple[int, ...]) -> list[Sample]:
    return [
        (product(m, k, n, "bfloat16"), took(m, k, n))
        for m, k, n in itertools.product(sides, repeat=3)
    ]


def test_a_law_is_found_on_its_grid_and_judged_beside_it() -> None:
    (curve,) = curves(samples((64, 256, 1024)), samples((128, 512)), DEVICE)
    assert (curve.kind, curve.dtype, len(curve.shares)) == (PRODUCT, "bf16", 27)
    assert curve.share(64, 256, 1024) == pytest.approx(64 / 4096, rel=1e-3)
    assert curve.share(128, 256, 1024) == pytest.approx(128 / 4096, rel=1e-3)
    assert 0 < curve.error < 0.5


def test_bytes_and_holes() -> None:
    few = samples((64, 256))[1:]  # one point of the grid is missing
    moved = [(elementwise("copy", abs, (n,), "float32"), 1e-6) for n in (64, 4096)]
    found = Kernels(curves([*few, *moved], (), DEVICE), 0.0, "")
    at_64 = 8 * 64 / 1e-6 / DEVICE.memory_bytes_per_second
    assert found.share(ELEMENTWISE, "", (8 * 64.0,)) == pytest.approx(at_64, rel=1e-3)
    assert found.share(PRODUCT, "bf16", (64.0, 64.0, 64.0)) > 0


def test_more_bytes_never_take_less() -> None:
    exchanges = [Exchange("all-reduce", 4, 4**n) for n in range(4, 8)]
    measured = zip(exchanges, (2e-5, 1e-5, 3e-5, 9e-5), strict=True)
    (fit,) = link_fits("nvlink", list(measured))
    assert [seconds for _, seconds in fit.fit.points] == [1e-5, 1e-5, 3e-5, 9e-5]
    assert fit.fit.count == 4 and fit.link == "nvlink"


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    "kind", ["all-gather", "all-reduce", "all-to-all", "reduce-scatter"]
)
def test_exchanges_send_about_what_is_asked(kind: str, count: int) -> None:
    one = Exchange(kind, count, 2**20)
    assert one.sent_bytes == pytest.approx(2**20, rel=1e-4)
    assert one.elements % count == 0
