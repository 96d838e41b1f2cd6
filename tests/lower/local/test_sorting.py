"""Sorts, searches and running sums, shard by shard."""

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


def ints(*shape, dtype=np.int32, seed=0):
    return np.random.default_rng(seed).integers(0, 9, shape).astype(dtype)


def two_sums(x, y):
    def both(a, b):
        return a[0] + 2 * b[0], jnp.maximum(a[1], b[1])

    return lax.reduce((x, y), (0.5, -3.0), both, (1,))


# name -> function, arguments, factors that some choice must split
CASES = {
    "sort pairs": (lambda x, y: lax.sort((x, y), dimension=1),
                   (ints(8, 9), rand(8, 9)), {"i0"}),
    "sort by two keys": (
        lambda x, y, z: lax.sort((x, y, z), dimension=0, num_keys=2),
        (ints(9, 7), ints(9, 7, seed=1), rand(9, 7)), {"i1"},
    ),
    "sort bool": (lambda x: lax.sort(x, dimension=1), (rand(4, 5, 6) > 0,),
                  {"i0", "i2"}),
    "top_k": (lambda x: lax.top_k(x, 3), (rand(7, 9),), {"i0"}),
    "top_k along the first": (lambda x: lax.top_k(x, 2, axis=0), (ints(6, 8),),
                              {"i1"}),
    "approx_top_k": (lambda x: lax.approx_max_k(x, 2), (rand(4, 8),), {"i0"}),
    "argmax": (lambda x: lax.argmax(x, 1, jnp.int32), (ints(7, 9, 4),), {"i0", "i2"}),
    "argmin bool": (lambda x: lax.argmin(x, 0, jnp.uint8), (rand(9, 8) > 0,), {"i1"}),
    "cumsum": (lambda x: lax.cumsum(x, 1), (rand(8, 9),), {"i0"}),
    "cumsum reverse": (lambda x: lax.cumsum(x, 0, reverse=True), (ints(9, 7),),
                       {"i1"}),
    "cumprod": (lambda x: lax.cumprod(x, 1), (rand(8, 5),), {"i0"}),
    "cummax": (lambda x: lax.cummax(x, 1), (ints(8, 5),), {"i0"}),
    "cummin": (lambda x: lax.cummin(x, 0), (rand(5, 8),), {"i1"}),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), (rand(8, 5),), {"i0"}),
    "reduce": (two_sums, (rand(8, 5), rand(8, 5, seed=1)), {"i0"}),
    "reduce_prod": (lambda x: lax.reduce_prod(x, (1,)), (rand(7, 5),), {"i0"}),
    "reduce_xor": (lambda x: lax.reduce_xor(x, (0,)), (ints(5, 8),), {"i1"}),
    "clamp to scalars": (lambda x: lax.clamp(-0.5, x, 0.5), (rand(8, 7),),
                         {"i0", "i1"}),
    "clamp to arrays": (lax.clamp, (rand(8, 7), rand(8, 7, seed=1),
                                    rand(8, 7, seed=2) + 9), {"i0", "i1"}),
    "clamp to both": (lax.clamp, (np.int32(2), ints(7, 8), ints(7, 8, seed=3)),
                      {"i0", "i1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shard_run_recombine(name, device_mesh):
    fun, args, wanted = CASES[name]
    tried = check(fun, args, MESH, device_mesh(MESH), choices=3)
    assert wanted <= {factor for choice in tried for factor, _ in choice.splits}


@pytest.mark.parametrize("name", ["cumsum", "cumsum reverse", "cummax", "cummin"])
def test_terms_flow(name, device_mesh):
    fun, args, _ = CASES[name]
    tried = check(fun, args, MESH, device_mesh(MESH), choices=2)
    assert any(choice.flows for choice in tried)
