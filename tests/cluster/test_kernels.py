"""Curves: at their points, between, beyond; whose share stands in."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.cluster.kernels import (
    BATCHED,
    CONVOLUTION,
    ELEMENTWISE,
    OPERANDS,
    PRODUCT,
    REDUCTION,
    Curve,
    Kernels,
)
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.profile import kernels_of

AXIS = (16.0, 64.0, 256.0)
CUBE = Curve(
    PRODUCT,
    "bf16",
    (AXIS, AXIS, AXIS),
    tuple((i + j + k + 1) / 10 for i, j, k in itertools.product(range(3), repeat=3)),
)


def test_at_the_points() -> None:
    for i, j, k in itertools.product(range(3), repeat=3):
        found = CUBE.share(AXIS[i], AXIS[j], AXIS[k])
        assert found == pytest.approx((i + j + k + 1) / 10)


@given(*[st.floats(1, 1e6)] * 3)
def test_a_share_is_one(m: float, k: float, n: float) -> None:
    assert 0 < CUBE.share(m, k, n) <= 1


@given(st.floats(16, 256), st.floats(16, 256))
def test_between_points_it_lies_between(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    assert CUBE.share(low, 64, 64) <= CUBE.share(high, 64, 64) * (1 + 1e-9)


def test_what_stands_in_for_what_is_not_known() -> None:
    shares = {PRODUCT: 0.7, CONVOLUTION: 0.4, ELEMENTWISE: 0.9}
    known = Kernels(
        tuple(Curve(kind, "", (), (x,)) for kind, x in shares.items()), 0.0, ""
    )
    assert known.share(BATCHED, "f32", (8, 64, 64, 64)) == 0.7
    assert known.share(CONVOLUTION, "bf16", (1e9,)) == 0.4
    assert (
        known.share(OPERANDS, "", (1e6,)) == known.share(REDUCTION, "", (1e6,)) == 0.9
    )
    typed = Kernels((CUBE,), 0.0, "")
    product = (1.0, 64.0, 64.0, 64.0)
    assert typed.share(CONVOLUTION, "f32", product) == typed.share(
        PRODUCT, "f32", product
    )
    assert typed.share(PRODUCT, "f32", (1.0, 64.0, 64.0, 64.0)) == pytest.approx(0.4)


def test_a_smaller_product_takes_no_longer_than_the_smallest_of_the_grid() -> None:
    device = parse_cluster("v5p:4x4x4").device
    kernels = kernels_of(device)
    for kind, least in ((PRODUCT, 1), (BATCHED, 4)):
        curve = next(c for c in kernels.curves if c.kind == kind)
        edge = [axis[0] for axis in curve.axes]
        for small in ((1, 512, 1), (1, 2, 512), (16384, 2, 512)):
            size = (least, *small)[-len(edge) :]
            held = [max(a, b) for a, b in zip(size, edge, strict=True)]
            seconds, most = (math.prod(s) / curve.share(*s) for s in (size, held))
            assert seconds <= most * (1 + 1e-9)
