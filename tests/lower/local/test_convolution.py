"""Convolutions and pooling, shard by shard: layouts, groups, blocks, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.lax.windowed_reductions import _select_and_scatter

from rhino_jax.ir.factors import Choice
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import Mesh
from tests.lower.local.harness import check, evaluate, one_op, recombine

MESH = Mesh.of(x=2, y=2, z=2)


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conv(
    stride: Any = 1,
    pad: Any = "VALID",
    groups: int = 1,
    layout: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC"),
    **params: Any,
) -> Callable[..., jax.Array]:
    rank = len(layout[0]) - 2
    strides = (stride,) * rank if isinstance(stride, int) else stride
    return lambda x, w: lax.conv_general_dilated(
        x,
        w,
        strides,
        pad,
        dimension_numbers=layout,
        feature_group_count=groups,
        **params,
    )


def gradient(fun: Callable[..., jax.Array], number: int) -> Callable[..., jax.Array]:
    return jax.grad(lambda *args: jnp.sum(fun(*args) ** 2), number)


Case = tuple[Callable[..., Any], tuple[Any, ...], str, tuple[Any, ...]]
"""A function, its arguments, the op that is meant, and operands of that op."""

# name -> (convolution, shape of what is read, shape of the kernel)
CONVOLUTIONS: dict[str, tuple[Callable[..., jax.Array], Any, Any]] = {
    "3x3": (conv(pad="SAME"), (4, 6, 6, 8), (3, 3, 8, 4)),
    "3x3 channels first": (
        conv(2, "SAME", layout=("NCHW", "OIHW", "NCHW")),
        (4, 8, 6, 6),
        (4, 8, 3, 3),
    ),
    "1x1": (conv(), (4, 6, 8, 8), (1, 1, 8, 4)),
    "1x1 by stride 2": (conv(2), (4, 8, 8, 8), (1, 1, 8, 4)),
    "patches": (conv(4), (4, 8, 16, 4), (4, 4, 4, 8)),
    "patches of odd count": (conv((4, 2)), (3, 12, 12, 3), (4, 2, 3, 8)),
    "smaller than the stride": (conv(4, [(0, 0)] * 2), (2, 8, 8, 4), (2, 3, 4, 4)),
    "whole image": (conv(), (4, 6, 7, 4), (6, 7, 4, 8)),
    "groups": (conv(pad="SAME", groups=4), (4, 6, 6, 8), (3, 3, 2, 16)),
    "depthwise": (conv(pad="SAME", groups=8), (2, 6, 6, 8), (3, 3, 1, 16)),
    "uneven groups": (conv(groups=3), (2, 4, 4, 6), (1, 1, 2, 12)),
    "one dimension": (conv(2, layout=("NWC", "WIO", "NWC")), (4, 8, 6), (2, 6, 4)),
    "spread": (
        conv(pad=[(3, 3), (1, 1)], lhs_dilation=(4, 2)),
        (2, 4, 4, 4),
        (4, 2, 4, 4),
    ),
    "uneven": (conv(), (3, 5, 7, 9), (1, 1, 9, 5)),
}


GRADIENTS = (
    "3x3",
    "1x1 by stride 2",
    "patches",
    "patches of odd count",
    "uneven",
    "smaller than the stride",
    "whole image",
    "groups",
    "depthwise",
)
"""Whose gradients differ from one another in their rules."""

SIDES = [
    *((name, "forward") for name in CONVOLUTIONS),
    *((name, side) for name in GRADIENTS for side in ("left", "right")),
]


def convolution(name: str, side: str) -> Case:
    """A convolution, or the last one in its gradient, and operands for it."""
    fun, left, right = CONVOLUTIONS[name]
    args = (rand(*left), rand(*right, seed=1))
    if side != "forward":
        fun = gradient(fun, ("left", "right").index(side))
    program, _ = one_op(fun, *args, kind="conv_general_dilated")
    shapes = [program.values[v].shape for v in program.inputs]
    given = tuple(rand(*shape, seed=i) for i, shape in enumerate(shapes))
    return fun, args, "conv_general_dilated", given


@pytest.mark.parametrize("name, side", SIDES)
def test_convolution(name, side, device_mesh):
    fun, args, kind, given = convolution(name, side)
    seed = SIDES.index((name, side))
    tried = check(fun, args, MESH, device_mesh(MESH), kind, 3, seed, args_of_op=given)
    assert any(choice.splits for choice in tried)


def pool(kind: str, window: Any, strides: Any, pad: Any = "VALID") -> Any:
    init, fun = {
        "max": (-np.inf, lax.max),
        "min": (np.inf, lax.min),
        "sum": (0.0, lax.add),
    }[kind]
    return lambda x: lax.reduce_window(x, init, fun, window, strides, pad)


def any_pool(x: jax.Array) -> jax.Array:
    """Sum and product of a window at once: a function that JAX does not know."""
    return lax.reduce_window(
        (x, x),
        (0.0, 1.0),
        lambda a, b: (a[0] + b[0], a[1] * b[1]),
        (1, 2, 2, 1),
        (1, 2, 2, 1),
        "VALID",
    )


def scatter_any(x: jax.Array, source: jax.Array) -> jax.Array:

    return _select_and_scatter(
        x,
        lax.ge,
        (1, 2, 2, 1),
        (1, 2, 2, 1),
        ((0, 0),) * 4,
        source,
        jnp.float32(0),
        lax.add,
    )


TWO = ((1, 2, 2, 1), (1, 2, 2, 1))
IMAGE = rand(4, 8, 6, 4)
SMALL = rand(4, 4, 3, 4, seed=1)

# name -> (function, its arguments, the op, the op's operands)
POOLS: dict[str, Case] = {
    "max": (pool("max", *TWO), (IMAGE,), "reduce_window_max", (IMAGE,)),
    "min": (pool("min", *TWO), (IMAGE,), "reduce_window_min", (IMAGE,)),
    "sum": (pool("sum", *TWO), (IMAGE,), "reduce_window_sum", (IMAGE,)),
    "gaps": (
        pool("sum", (1, 2, 1, 1), (1, 4, 2, 1)),
        (IMAGE,),
        "reduce_window_sum",
        (IMAGE,),
    ),
    "overlap": (
        pool("max", (1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
        (IMAGE,),
        "reduce_window_max",
        (IMAGE,),
    ),
    "whole": (
        pool("max", (1, 8, 6, 1), (1, 1, 1, 1)),
        (IMAGE,),
        "reduce_window_max",
        (IMAGE,),
    ),
    "any function": (any_pool, (IMAGE,), "reduce_window", (IMAGE,)),
    "gradient of max": (
        gradient(pool("max", *TWO), 0),
        (IMAGE,),
        "select_and_scatter_add",
        (SMALL, IMAGE),
    ),
    "tangent of max": (
        lambda x, t: jax.jvp(pool("max", *TWO), (x,), (t,))[1],
        (IMAGE, IMAGE),
        "select_and_gather_add",
        (rand(4, 8, 6, 4, seed=3), IMAGE),
    ),
    "scatter by any function": (
        scatter_any,
        (IMAGE, SMALL),
        "select_and_scatter",
        (IMAGE, SMALL),
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_pool(name, device_mesh):
    fun, args, kind, given = POOLS[name]
    tried = check(
        fun, args, MESH, device_mesh(MESH), kind, 3, len(name), args_of_op=given
    )
    assert any(choice.splits for choice in tried)


def test_partial_maxima_flow_through_pooling(device_mesh):
    fun, args, kind, given = POOLS["max"]
    program, _ = one_op(fun, *args, kind=kind)
    choice = Choice.of({"p1": [Split("x", 2)]}, {"y": 0})
    (want,) = evaluate(program, given)
    (have,) = recombine(program, choice, MESH, device_mesh(MESH), given)
    np.testing.assert_array_equal(have, want)
