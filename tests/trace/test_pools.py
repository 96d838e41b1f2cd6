"""The gradient of average pooling is one op, and what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rhino_jax.ir.factors import WINDOW, Halo
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.trace.reader import read_jaxpr
from tests.lower.local.harness import evaluate, every_choice, one_op, recombine_all

MESH = Mesh.of(x=2, y=4)


def average(size: int, stride: int) -> Callable[[Any], jax.Array]:
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lambda x: lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME")


def gradient(size: int, stride: int) -> Callable[[Any], jax.Array]:
    return jax.grad(lambda x: jnp.sum(average(size, stride)(x) ** 2))


IMAGE = np.random.default_rng(0).normal(size=(1, 16, 16, 2)).astype(np.float32)
POOLS = {
    (2, 2): ("parallel", ()),
    (3, 2): (WINDOW, (Halo(0, 1, 0),)),
    (3, 1): (WINDOW, (Halo(0, 1, 1),)),
}


@pytest.mark.parametrize("size, stride", POOLS)
def test_it_is_split_in_blocks(size: int, stride: int, device_mesh: Any) -> None:
    fun = gradient(size, stride)
    program, op = one_op(fun, IMAGE)
    assert op.kind == "reduce_window_sum"
    rule = rule_of(program, op)
    kinds = {(f.kind, f.halos) for f in rule.factors if f.name.startswith("h")}
    assert kinds == {POOLS[size, stride]}
    given = [2 * np.asarray(average(size, stride)(IMAGE))]
    (want,) = evaluate(program, given)
    np.testing.assert_allclose(want, np.asarray(fun(IMAGE)), rtol=1e-6)
    choices = [c for c in every_choice(rule, MESH) if c.on("h1")]
    assert choices
    for (have,) in recombine_all(program, choices, MESH, device_mesh(MESH), given):
        np.testing.assert_allclose(have, want, rtol=1e-6)


def padded(x: jax.Array, number: float = 0.0, both: bool = False) -> Any:
    wide = lax.pad(x, number, ((0, 0, 0), (1, 1, 1), (0, 0, 0), (0, 0, 0)))
    window, ones = (1, 2, 1, 1), (1, 1, 1, 1)
    total = lax.reduce_window(wide, 0.0, lax.add, window, ones, "VALID")
    return (total, wide) if both else total


def test_other_pads_stay_as_they_are() -> None:
    """Numbers that are no 0; an array that others read."""
    kinds = []
    for more in ({}, {"number": 1.0}, {"both": True}):
        jaxpr = jax.make_jaxpr(lambda x, more=more: padded(x, **more))(IMAGE)
        kinds.append([op.kind for op in read_jaxpr(jaxpr)[0].ops])
    assert kinds == [["reduce_window_sum"], *[["pad", "reduce_window_sum"]] * 2]
