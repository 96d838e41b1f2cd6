"""Draws under random layouts are those of the undecorated step, bit for bit."""

from __future__ import annotations

from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from benchmarks.fuzz import random_plan
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.program import jit_step
from rhino_jax.trace import trace

MESH = Mesh.of(x=2, y=4)
X = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)


def dropout(key: Any, x: Any) -> Any:
    kept = jax.random.bernoulli(key, 0.7, x.shape)
    return jnp.where(kept, x, 0)


def draws(key: Any, x: Any) -> dict[str, Any]:
    keys = jax.random.split(key, 12)
    return {
        "bits": jax.random.bits(keys[0], (8, 12)),
        "wide": jax.random.bits(keys[1], (4, 6), jnp.uint8),
        "dropout": dropout(keys[2], x),
        "randint": jax.random.randint(keys[3], (8, 6), 0, 100),
        "permutation": jax.random.permutation(keys[4], 16),
        "shuffled rows": jax.random.permutation(keys[5], x),
        "choice": jax.random.choice(keys[6], 9, (8,)),
        "without replacement": jax.random.choice(keys[7], x, (4,), replace=False),
        "categorical": jax.random.categorical(keys[8], x),
        "uniform": jax.random.uniform(keys[9], (8, 4)),
        "by row": jax.vmap(lambda k: jax.random.bits(k, (4,)))(
            jax.random.split(keys[10], 8)
        ),
        "folded": jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i)))(
            jnp.arange(8)
        ),
        "scanned": jax.lax.scan(
            lambda k, _: (jax.random.split(k)[0], jax.random.bits(k, (8,))),
            keys[11],
            length=3,
        )[1],
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_bits(seed: int, device_mesh: Any) -> None:
    key = jax.random.key(seed)
    wanted = jax.jit(draws)(key, X)
    traced = trace(draws, (key, X))
    plan = random_plan(traced, MESH, Random(seed))
    split = [
        op.kind
        for op, one in zip(traced.program.ops, plan.assignment.ops, strict=True)
        if one.choice.splits
    ]
    assert "random_bits" in split and "random_split" in split
    jitted = jit_step(traced.program, plan.assignment, MESH, device_mesh(MESH))
    found = jitted(key, X, *traced.constants)
    names = sorted(wanted)
    for name, have in zip(names, found, strict=True):
        np.testing.assert_array_equal(have, wanted[name], err_msg=name)


def test_draws_of_rbg_are_whole_and_listed() -> None:
    def step(key: Any, x: Any) -> Any:
        return dropout(key, x)

    key = jax.random.key(0, impl="rbg")
    run = rhino.auto_parallel(step, cache_dir="", mesh={"x": 2, "y": 4})
    np.testing.assert_array_equal(run(key, X), jax.jit(step)(key, X))
    notes = run.planned(key, X).plan.notes
    assert any("random_bits" in note and "drawn whole" in note for note in notes)
