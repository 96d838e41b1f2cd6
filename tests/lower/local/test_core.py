"""Local forms of the first families: elementwise, matrix products, sums, shapes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rhino_jax.ir.mesh import Mesh
from tests.lower.local.harness import check

MESH = Mesh.of(x=2, y=2, z=2)


def rand(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CASES = {
    "add": (jnp.add, (rand(8, 12), rand(8, 12, seed=1))),
    "mul": (jnp.multiply, (rand(8, 12), rand(8, 12, seed=1))),
    "add ragged": (jnp.add, (rand(7, 5), rand(7, 5, seed=1))),
    "select": (lax.select, (rand(8, 6) > 0, rand(8, 6), rand(8, 6, seed=2))),
    "dot": (jnp.dot, (rand(8, 16), rand(16, 12))),
    "dot ragged": (jnp.dot, (rand(7, 9), rand(9, 5))),
    "batched dot": (
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b),
        (rand(4, 8, 6), rand(4, 10, 6)),
    ),
    "reduce_sum": (
        lambda x: lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None),
        (rand(7, 12),),
    ),
    "reduce_max": (
        lambda x: lax.reduce_max_p.bind(x, axes=(1,), out_sharding=None),
        (rand(8, 11),),
    ),
    "transpose": (lambda x: x.transpose(2, 0, 1), (rand(4, 8, 6),)),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (4, 8, 6), (1, 2)), (rand(8, 1),)),
    "reshape": (lambda x: x.reshape(4, 2, 24), (rand(8, 4, 6),)),
    "reshape transposed": (
        lambda x: lax.reshape(x, (6, 8), dimensions=(1, 0)),
        (rand(8, 6),),
    ),
    "barrier": (
        lambda x, y: lax.optimization_barrier((x, y)),
        (
            rand(8, 6),
            rand(
                4,
            ),
        ),
    ),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), (rand(8, 1, 6),)),
    "split": (lambda x: lax.split(x, (8, 8, 8), 1), (rand(4, 24),)),
}


@pytest.mark.parametrize("name", CASES)
def test_shard_run_recombine(name, device_mesh):
    fun, args = CASES[name]
    tried = check(fun, args, MESH, device_mesh(MESH), choices=6)
    assert any(choice.splits for choice in tried)
