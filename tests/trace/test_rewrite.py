"""Primitives that are read as what they do, and do it."""

from __future__ import annotations

from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.fuzz import random_plan
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.program import jit_step
from rhino_jax.trace import Traced, trace
from rhino_jax.trace.rewrite import high_half

MESH = Mesh.of(x=2, y=4)
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def equal(fun: Any, args: Any, device_mesh: Any) -> Traced:
    """``fun`` traced, run under a random plan, and found to be what it was."""
    traced = trace(fun, args)
    plan = random_plan(traced, MESH, Random(1))
    run = jit_step(traced.program, plan.assignment, MESH, device_mesh(MESH))
    found = run(*jax.tree.leaves(args), *traced.constants)
    wanted = jax.tree.leaves(jax.jit(fun)(*args))
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
    return traced


def kinds(traced: Traced) -> set[str]:
    return {op.kind for _, op in traced.program.walk()}


def test_every_row_of_a_while_stops_by_itself(device_mesh: Any) -> None:
    def row(v: Any) -> Any:
        return lax.while_loop(
            lambda held: held[0] < 2 + 3 * jnp.abs(v[0]),
            lambda held: (held[0] + 1, held[1] * 1.5 + v),
            (0.0, v),
        )

    traced = equal(jax.vmap(row), (X,), device_mesh)
    (loop,) = (op for op in traced.program.ops if op.kind == "while")
    test, _ = loop.programs
    assert test.values[test.outputs[0]].shape == ()
    assert loop.where.file == __file__


def test_solves_and_references(device_mesh: Any) -> None:
    def step(x: Any) -> Any:
        held = jax.new_ref(jnp.zeros(4))

        def turn(i: Any, _: Any) -> None:
            held[...] += x[i] * jnp.sum(held[...])
            held[0] = 1.0 + x[i, 0]

        lax.fori_loop(0, 8, turn, None)
        square = x.T @ x + jnp.eye(4)
        return jnp.linalg.solve(square, x.T), jax.freeze(held)

    found = kinds(equal(step, (X,), device_mesh))
    assert "triangular_solve" in found and "custom_linear_solve" not in found
    assert not {"new_ref", "get", "swap", "addupdate"} & found


def test_gamma_draws_are_taken_apart() -> None:
    traced = trace(lambda k, a: jax.random.gamma(k, a), (jax.random.key(0), X + 4))
    assert "while" in kinds(traced) and "random_gamma" not in kinds(traced)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int8, np.uint16])
def test_the_upper_half_of_a_product(dtype: Any) -> None:
    info, rng = np.iinfo(dtype), np.random.default_rng(0)
    x, y = rng.integers(info.min, info.max, (2, 64), dtype, endpoint=True)
    x[:4], y[:4] = (info.min, info.max, info.min, 0), (info.min, info.max, 1, info.max)
    wanted = [(int(a) * int(b)) >> info.bits for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(high_half(jnp.asarray(x), jnp.asarray(y)), wanted)
    assert "mulhi" not in kinds(trace(lambda x, y: lax.mulhi(x, y), (x, y)))
