"""Local forms of what cuts and joins dimensions, against the ops themselves."""

from __future__ import annotations

import jax
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
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def pad(*config):
    return lambda x: lax.pad(x, x.dtype.type(0), config)


def join(*xs):
    return lax.concatenate(xs, 1)


# name -> function, arguments, factors that some choice must split
CASES = {
    "slice third": (lambda x: lax.slice_in_dim(x, 8, 16, axis=1),
                    (rand(6, 24),), {"i0", "i1"}),
    "slice by period": (lambda x: lax.slice(x, (0, 8), (5, 24)),
                        (ints(5, 32),), {"i0", "i1"}),
    "slice every third": (lambda x: lax.slice(x, (0, 2), (6, 24), (1, 3)),
                          (rand(6, 24),), {"i1"}),
    "slice every third of ragged": (lambda x: lax.slice(x, (2,), (21,), (3,)),
                                    (rand(21),), {"i0"}),
    "slice steps of a half": (lambda x: lax.slice(x, (13, 0), (24, 5), (2, 1)),
                              (rand(24, 5) > 0,), {"i0", "i1"}),
    "slice off period": (lambda x: x[:, 1:], (rand(8, 9),), {"i0"}),
    "pad by itself": (pad((0, 0, 0), (8, 16, 0)), (rand(5, 8),), {"i0", "i1"}),
    "pad by period": (pad((4, 8, 0), (1, 0, 0)), (ints(12, 8),), {"i0"}),
    "pad away": (pad((-4, 4, 0),), (rand(8),), {"i0"}),
    "pad between": (pad((2, 0, 2), (0, 0, 0)), (rand(8, 3),), {"i0", "i1"}),
    "pad between ragged": (pad((1, 1, 2),), (rand(7),), {"i0"}),
    "pad between and outside": (pad((13, -11, 2),), (rand(8),), {"i0"}),
    "pad of a traced value": (lambda x, v: lax.pad(x, v, ((4, 0, 0), (0, 0, 0))),
                              (rand(4, 6), np.float32(3)), {"i0"}),
    "pad bool": (lambda x: lax.pad(x, True, ((8, 8, 0),)), (rand(8) > 0,), {"i0"}),
    "join thirds": (join, (rand(5, 8), rand(5, 8, seed=1), rand(5, 8, seed=2)),
                    {"i0", "i1"}),
    "join by period": (join, (ints(6, 8), ints(6, 12, seed=1)), {"i0", "i1"}),
    "join primes": (join, (rand(7, 2), rand(7, 3, seed=1)), {"i0"}),
    "join with nothing": (join, (rand(4, 8), rand(4, 0)), {"i0"}),
    "stack": (lambda x, y: jnp.stack([x, y], 1),
              (rand(7, 8), rand(7, 8, seed=1)), {"i0", "i1"}),
    "unstack": (lambda x: jnp.unstack(x, axis=1), (ints(8, 3, 5),), {"i0", "i1"}),
    "rev": (lambda x: lax.rev(x, (1,)), (rand(7, 6),), {"i0"}),
    "tile": (lambda x: lax.tile(x, (1, 6, 3)), (rand(5, 4, 8),),
             {"i1", "r1", "i2", "r2"}),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, jnp.int32),
                (rand(8, 7),), {"i0", "i1"}),
    "bitcast narrower": (lambda x: lax.bitcast_convert_type(x, jnp.uint8),
                         (rand(8),), {"i0"}),
    "bitcast wider": (lambda x: lax.bitcast_convert_type(x, jnp.float32),
                      (ints(8, 4, dtype=np.uint8),), {"i0"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shard_run_recombine(name, device_mesh):
    if name == "join with nothing" and not jax.__version__.startswith("0.10."):
        pytest.skip("the CPU compiler of jaxlib 0.11.2 crashes on this program")
    fun, args, wanted = CASES[name]
    tried = check(fun, args, MESH, device_mesh(MESH), choices=3)
    assert wanted <= {factor for choice in tried for factor, _ in choice.splits}


LINEAR = ("slice third", "pad by itself", "pad of a traced value", "join thirds",
          "stack", "unstack", "rev", "tile")  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_terms_of_sums_flow(name, device_mesh):
    fun, args, _ = CASES[name]
    tried = check(fun, args, MESH, device_mesh(MESH), choices=2, seed=2)
    assert any(choice.flows for choice in tried)


def test_keys_are_cut_and_joined_like_numbers(device_mesh):
    keys = jax.random.split(jax.random.key(0), (8, 3))
    tried = check(lambda k: lax.slice_in_dim(k, 4, 8), (keys,), MESH, device_mesh(MESH))
    assert any(choice.on("i0") for choice in tried)
