"""Products in groups: rows split, groups split, both, in blocks and strided."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from tests.lower.local.harness import alone_and_in_pairs, check_choices, one_op

MESH = Mesh.of(x=2, y=2)
COUNTS = np.array([3, 0, 6, 1], np.int32)  # rows after the last group are in none


def rand(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows(lhs, rhs, counts):
    return lax.ragged_dot(lhs, rhs, counts)


def for_matrices(lhs, out, counts):
    rhs = jnp.zeros((4, lhs.shape[1], out.shape[1]))
    return jax.vjp(lambda r: lax.ragged_dot(lhs, r, counts), rhs)[1](out)


CASES = {
    "rows": (rows, (rand(12, 6), rand(4, 6, 8, seed=1), COUNTS)),
    "rows by batch": (
        jax.vmap(rows),
        (
            rand(2, 12, 6),
            rand(2, 4, 6, 8, seed=1),
            np.stack([COUNTS, COUNTS[::-1]]),
        ),
    ),
    "sums": (for_matrices, (rand(12, 6), rand(12, 8, seed=1), COUNTS)),
}


@pytest.mark.parametrize("name", CASES)
def test_shard_run_recombine(name, device_mesh):
    fun, args = CASES[name]
    program, op = one_op(fun, *args, kind="ragged_dot_general")
    tried = alone_and_in_pairs(rule_of(program, op), MESH)
    groups = {split.stride for choice in tried for split in choice.on("g")}
    assert groups == {1, 2}, "in blocks and strided"
    some = tried[:: len(tried) // 6]
    check_choices(program, some, MESH, device_mesh(MESH), args)
