"""What crosses from worker to worker, here all of one process."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rhino_jax.api.spreading import Spreading
from rhino_jax.runtime.crossing import Crossing, Turns

AXES = ("data", "tensor")
SPECS = {
    "rows": (jnp.arange(32.0).reshape(8, 4), PartitionSpec("data", "tensor")),
    "whole": (jnp.arange(6).reshape(3, 2), PartitionSpec()),
    "number": (jnp.float32(3.5), PartitionSpec()),
    "truths": (jnp.arange(8) % 3 == 0, PartitionSpec(AXES)),
    "half": (jnp.ones((4, 2), jnp.bfloat16), PartitionSpec(None, "data")),
    "key": (jax.random.key(7), PartitionSpec()),
    "keys": (jax.random.split(jax.random.key(1), 4), PartitionSpec("tensor")),
}


def whole_mesh() -> Mesh:
    devices = np.array(jax.devices()[:8], object).reshape(2, 2, 2)
    return Mesh(devices, ("stage", *AXES))


def equal(one: jax.Array, other: jax.Array) -> None:
    if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
        assert one.dtype == other.dtype
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("to_all", [False, True])
def test_parts_arrive_at_the_same_places(to_all: bool) -> None:
    first, second = (Mesh(rows, AXES) for rows in whole_mesh().devices)
    rows = tuple(tuple(mesh.devices.flat) for mesh in (first, second))
    crossing = Crossing(rows, Turns(True), to_all)
    given = [
        jax.device_put(x, NamedSharding(first, spec)) for x, spec in SPECS.values()
    ]
    where = whole_mesh() if to_all else second
    targets = [NamedSharding(where, spec) for _, spec in SPECS.values()]
    kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
    for _ in range(2):
        arrived = crossing.carried(given, kinds, targets)
        for x, target, (expected, _) in zip(
            arrived, targets, SPECS.values(), strict=True
        ):
            assert x.sharding == target
            equal(x, expected)


@pytest.mark.parametrize("name", SPECS)
def test_a_leaf_is_spread_and_comes_back(name: str) -> None:
    x, spec = SPECS[name]
    mesh = whole_mesh()
    home = NamedSharding(Mesh(mesh.devices[1], AXES), spec)
    spreading = Spreading(mesh)
    held = jax.device_put(x, home)
    wide = spreading.spread(held, home)
    assert wide.sharding == spreading.sharding(x.shape, home)
    assert len(wide.sharding.device_set) == 8
    equal(wide, x)
    again = spreading.back(wide, home)
    assert again.sharding == home
    equal(again, x)


def test_a_dimension_that_can_be_divided_is() -> None:
    mesh = whole_mesh()
    home = NamedSharding(Mesh(mesh.devices[0], AXES), PartitionSpec(None, "data"))
    divided = Spreading(mesh).sharding((3, 8), home)
    assert divided.shard_shape((3, 8)) == (3, 2)
    assert Spreading(mesh).sharding((3, 6), home).shard_shape((3, 6)) == (3, 3)
