"""Curves: at their points, between, beyond; whose share stands in."""

from __future__ import annotations

import itertools

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
