"""Iotas, keys and draws on shards: exactly the elements of the whole draw."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.random import threefry2x32_p

from rhino_jax import compat
from rhino_jax.errors import TraceError
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.local.random import _paired_bits, flat_counters
from tests.lower.local.harness import check, evaluate, one_op, recombine

MESH = Mesh.of(x=2, y=2, z=2)


def key(*shape, impl=None):
    one = jax.random.key(7, impl=impl)
    return jax.random.split(one, shape) if shape else one


def iota(dtype, shape, dim):
    return lambda: lax.broadcasted_iota(dtype, shape, dim)


def bits(shape, dtype=jnp.uint32):
    def draw(keys):
        fun = lambda k: jax.random.bits(k, shape, dtype)  # noqa: E731
        for _ in range(keys.ndim):
            fun = jax.vmap(fun)
        return fun(keys)

    return draw


def splits(shape):
    return lambda keys: jax.random.key_data(jax.vmap(
        lambda k: jax.random.split(k, shape))(keys))  # fmt: skip


def data(*shape, dtype=np.uint32):
    return np.random.default_rng(0).integers(0, 2**31, shape).astype(dtype)


def words(k1, k2, low, high):
    return threefry2x32_p.bind(k1, k2, low, high)


# name -> kind, function, arguments, factors that some choice must split
CASES = {
    "iota": ("iota", iota(np.int32, (24, 7), 0), (), {"i0", "i1"}),
    "iota wraps": ("iota", iota(np.int8, (600,), 0), (), {"i0"}),
    "iota rounds": ("iota", iota(jnp.bfloat16, (3, 1000), 1), (), {"i1"}),
    "iota float": ("iota", iota(np.float32, (4, 5, 16), 2), (), {"i0", "i2"}),
    "bits 32": ("random_bits", bits((8, 3, 24)), (key(),), {"i0", "i2"}),
    "bits 16": ("random_bits", bits((12, 4), jnp.uint16), (key(),), {"i0", "i1"}),
    "bits 8": ("random_bits", bits((24,), jnp.uint8), (key(),), {"i0"}),
    "bits of keys": ("random_bits", bits((4, 6)), (key(7, 4),),
                     {"b0", "b1", "i0", "i1"}),
    "rbg bits": ("random_bits", bits((8,)), (key(impl="rbg"),), set()),
    "split": ("random_split", splits((4, 6)), (key(8),), {"b0", "i0", "i1"}),
    "rbg split": ("random_split", splits((4,)), (key(8, impl="rbg"),), {"b0"}),
    "fold in": ("random_fold_in", jax.vmap(jax.random.fold_in), (key(7), data(7)),
                {"i0"}),
    "fold in one key": ("random_fold_in",
                        jax.vmap(jax.random.fold_in, (None, 0)), (key(), data(8)),
                        {"i0"}),
    "rbg fold in": ("random_fold_in", jax.vmap(jax.random.fold_in),
                    (key(8, impl="rbg"), data(8)), {"i0"}),
    "seed": ("random_seed", jax.vmap(jax.random.key), (data(8, dtype=np.int32),),
             {"i0"}),
    "wrap": ("random_wrap", jax.random.wrap_key_data, (data(8, 2),), {"b0"}),
    "unwrap": ("random_unwrap", jax.random.key_data, (key(4, 7),), {"b0", "b1"}),
    "clone": ("random_clone", jax.random.clone, (key(8),), {"i0"}),
    "threefry2x32": ("threefry2x32", words,
                     (*data(2), data(8, 7), data(8, 7)), {"i0", "i1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shard_run_recombine(name, device_mesh):
    kind, fun, args, wanted = CASES[name]
    tried = check(fun, args, MESH, device_mesh(MESH), kind=kind, choices=3, seed=1)
    assert wanted <= {factor for choice in tried for factor, _ in choice.splits}


def test_draws_are_split_strided(device_mesh):
    choice = Choice.of({"i0": [Split("x", 1)], "i1": [Split("y", 4), Split("z", 1)]})
    program, _ = one_op(bits((4, 8)), key())
    got = recombine(program, choice, MESH, device_mesh(MESH), (key(),))
    np.testing.assert_array_equal(got[0], evaluate(program, (key(),))[0])


def test_bits_64(device_mesh, x64):
    fun = bits((8, 12), jnp.uint64)
    tried = check(fun, (key(),), MESH, device_mesh(MESH), "random_bits", 2)
    assert any(choice.splits for choice in tried)


# Odd counts of words too: their last pair is filled up.
PAIRED = {
    "bits 32": ("random_bits", bits((8, 3)), (key(),)),
    "bits 16 odd": ("random_bits", bits((6, 5), jnp.uint16), (key(2),)),
    "bits 8": ("random_bits", bits((2, 5), jnp.uint8), (key(),)),
    "split": ("random_split", splits((4, 3)), (key(8),)),
}


@pytest.mark.parametrize("name", PAIRED)
def test_draws_from_pairs_of_counters(name, device_mesh):
    kind, fun, args = PAIRED[name]
    with jax.threefry_partitionable(False):
        tried = check(fun, args, MESH, device_mesh(MESH), kind=kind, choices=2, seed=1)
    assert any(choice.on(f"i{d}") for choice in tried for d in (0, 1))


def test_64_bits_from_pairs_of_counters(device_mesh, x64):
    with jax.threefry_partitionable(False):
        fun = bits((8, 3), jnp.uint64)
        tried = check(fun, (key(),), MESH, device_mesh(MESH), "random_bits", 2)
    assert any(choice.on("i0") for choice in tried)


def test_a_draw_knows_how_it_was_traced():
    def traced():
        return jax.make_jaxpr(bits((4,)))(key()).jaxpr.eqns[0]

    with jax.threefry_partitionable(False):
        paired = traced()
    with jax.threefry_partitionable(True):
        counted = traced()
    assert not compat.threefry_partitionable(paired)
    assert compat.threefry_partitionable(counted)


def test_a_huge_draw_from_pairs_says_what_to_do():
    index = jnp.zeros(1, jnp.uint32)
    with pytest.raises(TraceError, match="jax_threefry_partitionable is off"):
        _paired_bits(jnp.zeros(2, jnp.uint32), index, 32, 2**33)


@pytest.mark.parametrize("shape", [(2**9, 3, 2**14), (2**20, 2**11, 2**22), (5,)])
def test_counters_have_64_bits(shape):
    rng = np.random.default_rng(0)
    indices = [rng.integers(0, n, 5) for n in shape]
    indices[0][0] = shape[0] - 1
    strides = [int(np.prod(shape[d + 1 :], dtype=object)) for d in range(len(shape))]
    exact = [
        sum(int(i) * s for i, s in zip(at, strides, strict=True))
        for at in itertools.product(*indices)
    ]
    high, low = flat_counters([jnp.asarray(i, jnp.int32) for i in indices], shape)
    found = np.asarray(high, np.uint64) << np.uint64(32) | np.asarray(low, np.uint64)
    assert found.reshape(-1).tolist() == exact
