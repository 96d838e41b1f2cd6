"""What runs in a product's kernel on a TPU, and what that costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.cluster import kernels
from rhino_jax.cluster.hardware import CATALOGUE
from rhino_jax.cost.buffers import Unfolded, unfold
from rhino_jax.cost.compute import kernel_works, work_of
from rhino_jax.cost.fusion import Fusion, fusion
from rhino_jax.cost.guests import guests, swallowed
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.traffic import traffic
from rhino_jax.rules import rule_of
from tests.cost.plans import ONE, f32, traced_whole

TPU = HABITS["tpu"]
CURVES = tuple(
    kernels.Curve(kind, "", (), (1.0,))
    for kind in (kernels.PRODUCT, kernels.CONVOLUTION, kernels.ELEMENTWISE)
)
X, W = f32(128, 256), f32(256, 512)


def device(flops: float, num_bytes: float) -> Any:
    """A TPU of which kernels reach all."""
    return replace(
        CATALOGUE["v5e"],
        bf16_flops_per_second=flops,
        f32_flops_per_second=flops,
        memory_bytes_per_second=num_bytes,
        kernels=kernels.Kernels(CURVES, 0.0, "made up"),
    )


def fused_of(step: Any, *args: jax.ShapeDtypeStruct) -> tuple[Unfolded, Fusion]:
    unfolded = unfold(*traced_whole(step, *args), ONE, rule_of, (), TPU)
    return unfolded, fusion(unfolded, TPU)


def layer(x: Any, w: Any, residual: Any) -> Any:
    y = x @ w + residual
    return y, y.sum(0)


def products(unfolded: Unfolded) -> list[int]:
    return [
        n for n, one in enumerate(unfolded.instructions) if one.kind == "dot_general"
    ]


def test_what_is_made_of_a_products_result_is_made_in_its_kernel() -> None:
    unfolded, fused = fused_of(layer, X, W, f32(128, 512))
    found = guests(unfolded, fused)
    (product,) = products(unfolded)
    others = set(range(len(unfolded.instructions))) - {product}
    assert found == dict.fromkeys(others, product)
    assert swallowed(unfolded, fused, found) == set(
        unfolded.instructions[product].writes
    )
    moved = traffic(unfolded, fused, TPU)
    assert {one.kernel for one in moved} == {product}
    table = 4 * 128 * 512
    assert moved[product].num_bytes == 4 * (128 * 256 + 256 * 512), "it writes nothing"
    assert sum(one.num_bytes for one in moved) == (
        moved[product].num_bytes + 2 * table + 4 * 512
    )


def test_a_guest_waits_for_nothing() -> None:
    def step(x: Any, w: Any, v: Any) -> Any:
        y = x @ w
        return y * jnp.sum(x @ v)  # the sum is there once the second product is

    unfolded, fused = fused_of(step, X, W, W)
    first, second = products(unfolded)
    found = guests(unfolded, fused)
    assert set(found.values()) == {second}
    assert all(unfolded.instructions[n].kind != "mul" for n in found)
    assert not swallowed(unfolded, fused, found) & set(
        unfolded.instructions[first].writes
    )


@pytest.mark.parametrize("slow", ["arithmetic", "memory"])
def test_a_kernel_takes_its_arithmetic_or_the_bytes_of_all(slow: str) -> None:
    unfolded, fused = fused_of(layer, X, W, f32(128, 512))
    arithmetic = slow == "arithmetic"
    on = device(1.0 if arithmetic else 1e30, 1e30 if arithmetic else 1.0)
    works = kernel_works(unfolded, fused, ONE, on)
    (product,) = products(unfolded)
    assert [n for n, one in enumerate(works) if one.seconds] == [product]
    total = work_of(unfolded, fused, ONE, on)
    assert total.seconds == pytest.approx(
        2 * 128 * 256 * 512 if arithmetic else total.num_bytes
    )


def test_elements_are_as_wide_as_a_lane() -> None:
    narrow = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
    for wide, habits in ((2, TPU), (1, HABITS["cuda"])):
        unfolded = unfold(*traced_whole(jnp.tanh, narrow), ONE, rule_of, (), habits)
        (moved,) = traffic(unfolded, fusion(unfolded, habits), habits)
        assert moved.num_bytes == wide * 2 * 2 * 128 * 256
