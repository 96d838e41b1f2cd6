"""Overlapping windows in blocks with halos: every variant, against the op itself.

Sizes, strides, dilations, paddings, groups and layouts are drawn; ``python -m
tests.lower.local.test_halo 200`` draws as many as asked for.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rhino_jax.ir.factors import WINDOW, Choice, Rule
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.devices import device_mesh as device_mesh_of
from rhino_jax.rules import rule_of
from tests.lower.local.harness import (
    alone_and_in_pairs,
    check_choices,
    every_choice,
    one_op,
    recombine,
)

MESH = Mesh.of(x=2, y=4)
LAYOUTS = (("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"))
FORWARD, LEFT, RIGHT = "forward", 0, 1
Function = Callable[..., Any]


def in_blocks(rule: Rule, rng: random.Random, most: int) -> list[Choice]:
    """Choices that split a window, alone, with anything else, and over two axes."""
    names = [f.name for f in rule.factors if f.kind == WINDOW]
    found = [
        choice
        for choice in (*every_choice(rule, MESH), *alone_and_in_pairs(rule, MESH))
        if any(choice.on(name) for name in names)
    ]
    return rng.sample(found, min(most, len(found)))


def padded(rng: random.Random, read: int, made: int, reach: int, stride: int) -> Any:
    """A padding with which a window makes ``made`` of ``read``; its sides drawn."""
    total = (made - 1) * stride + reach - read
    low = rng.choice((0, total // 2, total - total // 2, total))
    return low, total - low


def drawn_convolution(rng: random.Random) -> tuple[Function, list[Any]]:
    """A convolution whose image is in step with its result, and its operands."""
    sizes, strides, pads, dilations = {"N": 2}, [], [], {"lhs": [], "rhs": []}
    for letter, window in (("H", rng.choice((1, 2, 3, 4, 5))), ("W", 3)):
        read = rng.choice((8, 16))
        stride, apart = rng.choice(((1, 1), (1, 1), (2, 1), (1, 2)))
        dilation = rng.choice((1, 1, 2))
        reach = (window - 1) * dilation + 1
        wide, made = (read - 1) * apart + 1, read * apart // stride
        sizes |= {letter: read, f"k{letter}": window}
        strides.append(stride)
        pads.append(padded(rng, wide, made, reach, stride))
        dilations["lhs"].append(apart)
        dilations["rhs"].append(dilation)
    groups, layout = rng.choice((1, 1, 2, 4)), rng.choice(LAYOUTS)
    sizes |= {"C": 4, "O": 8, "I": 4 // groups}
    shapes = [
        [sizes[letter] for letter in layout[0]],
        [sizes.get(f"k{letter}", sizes[letter]) for letter in layout[1]],
    ]
    dtype = rng.choice((np.float32, np.float32, jnp.bfloat16))

    def convolution(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            pads,
            dilations["lhs"],
            dilations["rhs"],
            layout,
            feature_group_count=groups,
        )

    return convolution, [drawn(shape, dtype) for shape in shapes]


def drawn(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> Any:
    """Small whole numbers: sums of them are exact in any order, in bfloat16 too."""
    rng = np.random.default_rng((seed, *shape))
    return rng.integers(-2, 3, shape).astype(dtype)


def check_convolution(seed: int, side: str | int, jax_mesh: Any, most: int) -> int:
    """How many choices were compared with the op itself."""
    rng = random.Random(seed)
    fun, args = drawn_convolution(rng)
    if side != FORWARD:
        whole = fun
        fun = jax.grad(lambda *a: jnp.sum(whole(*a) ** 2).astype(jnp.float32), side)
    program, op = one_op(fun, *args, kind="conv_general_dilated")
    values = [program.values[v] for v in program.inputs]
    given = [drawn(v.shape, v.dtype, seed=i) for i, v in enumerate(values)]
    choices = in_blocks(rule_of(program, op), rng, most)
    if choices:
        check_choices(program, choices, MESH, jax_mesh, given)
    return len(choices)


@pytest.mark.parametrize("side", [FORWARD, LEFT, RIGHT])
@pytest.mark.parametrize("seed", range(4))
def test_convolution(seed: int, side: str | int, device_mesh: Any) -> None:
    assert check_convolution(seed, side, device_mesh(MESH), most=3) > 0


def pooled(fun: Any, init: float, size: int, stride: int, pad: Any) -> Function:
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lambda x: lax.reduce_window(x, init, fun, window, strides, pad)


def both(x: jax.Array) -> Any:
    """Sum and product of a window: a function that JAX does not know."""
    return lax.reduce_window(
        (x, x + 1),
        (0.0, 1.0),
        lambda a, b: (a[0] + b[0], a[1] * b[1]),
        (1, 3, 3, 1),
        (1, 2, 2, 1),
        "SAME",
    )


def gradient(fun: Function) -> Function:
    return jax.grad(lambda x: jnp.sum(fun(x) ** 2))


LOW = ((0, 0), (1, 0), (1, 0), (0, 0))
MAX = pooled(lax.max, -np.inf, 3, 2, "SAME")
MAX_AHEAD = pooled(lax.max, -np.inf, 3, 2, LOW)
MAX_BY_ONE = pooled(lax.max, -np.inf, 4, 1, "SAME")
MIN = pooled(lax.min, np.inf, 3, 2, "SAME")
SUM = pooled(lax.add, 0.0, 5, 2, "SAME")
SCATTER, GATHER = "select_and_scatter_add", "select_and_gather_add"
POOLS: dict[str, tuple[Function, str]] = {
    "max": (MAX, "reduce_window_max"),
    "max, padded ahead": (MAX_AHEAD, "reduce_window_max"),
    "min": (MIN, "reduce_window_min"),
    "sum": (SUM, "reduce_window_sum"),
    "any function": (both, "reduce_window"),
    "gradient of max": (gradient(MAX), SCATTER),
    "gradient of max, padded ahead": (gradient(MAX_AHEAD), SCATTER),
    "gradient of max by one": (gradient(MAX_BY_ONE), SCATTER),
    "gradient of min": (gradient(MIN), SCATTER),
    "tangent of max": (lambda x: jax.jvp(MAX, (x,), (x,))[1], GATHER),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str, device_mesh: Any) -> None:
    fun, kind = POOLS[name]
    rng = random.Random(len(name))
    # No two elements are equal: which of two maxima counts is nobody's to say.
    image = np.random.default_rng(0).permutation(2 * 16 * 8 * 4).reshape(2, 16, 8, 4)
    program, op = one_op(fun, image.astype(np.float32), kind=kind)
    values = [program.values[v] for v in program.inputs]
    given = [
        image.astype(np.float32) - 500 if v.shape == image.shape else drawn(v.shape)
        for v in values
    ]
    choices = in_blocks(rule_of(program, op), rng, 4)
    assert choices
    check_choices(program, choices, MESH, device_mesh(MESH), given)


def test_float64_and_nothing_past_the_ends(device_mesh: Any, x64: None) -> None:
    """All below 0, so that a 0 past the ends would be the maximum."""
    image = -1 - np.random.default_rng(0).random((1, 16, 8, 2))
    program, op = one_op(MAX, image, kind="reduce_window_max")
    (choice,) = (
        c
        for c in every_choice(rule_of(program, op), MESH)
        if [s.axis for s in c.on("h1")] == ["y"]
    )
    (found,) = recombine(program, choice, MESH, device_mesh(MESH), [image])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, np.asarray(jax.jit(MAX)(image)))


def main() -> None:
    """Draw convolutions and compare; raises at the first that differs."""
    jax.config.update("jax_num_cpu_devices", MESH.num_devices)
    jax_mesh, count = device_mesh_of(MESH), 0
    for seed in range(int(sys.argv[1])):
        for side in (FORWARD, LEFT, RIGHT):
            count += check_convolution(seed, side, jax_mesh, most=4)
    print(f"{count} choices")


if __name__ == "__main__":
    main()
