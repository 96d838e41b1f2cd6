"""Rules of ``custom_partitioning``: in our letters, and the op run by them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

import rhino_jax as rhino
from rhino_jax.errors import RuleError
from rhino_jax.rules.stated import stated_in
from rhino_jax.trace.reader import read_jaxpr

X = np.random.default_rng(0).normal(size=(8, 4, 16)).astype(np.float32)
W = np.linspace(1, 2, 16, dtype=np.float32)
MESH = {"x": 4, "y": 2}


def as_asked(fun: Any) -> Any:
    return lambda mesh, args, result: (
        mesh,
        fun,
        jax.tree.map(lambda x: x.sharding, result),
        tuple(x.sharding for x in args),
    )


def opaque(x: Any, w: Any) -> Any:
    """``x`` normalized: by code that JAX does not see into."""

    def run(x: Any, w: Any) -> Any:
        return x / np.linalg.norm(x, axis=-1, keepdims=True) * w

    return jax.pure_callback(run, jax.ShapeDtypeStruct(x.shape, x.dtype), x, w)


def with_rule(fun: Any, rule: str, partition: Any = None, **more: Any) -> Any:
    found = custom_partitioning(fun)
    found.def_partition(partition or as_asked(fun), sharding_rule=rule, **more)
    return found


def text_of(fun: Any, *args: Any) -> str:
    program, _ = read_jaxpr(jax.make_jaxpr(fun)(*args))
    stated = stated_in(program.ops[0])
    return stated.text if stated else ""


def test_rules_are_read() -> None:
    a, b, c = (np.ones(shape, np.float32) for shape in ((4, 6), (6, 8), (4, 8)))
    product = with_rule(lambda a, b: a @ b, "i j, j k -> i k", reduction_factors=("j",))
    assert text_of(product, a, b) == (
        "ab,bc->ac {a:tiled, b:blocked, c:tiled}"  # the sum is the function's own
    )
    held = with_rule(
        lambda a, b: a + b, "i j, i j -> i j", need_replication_factors=("j",)
    )
    assert text_of(held, c, c) == "ab,ab->ab {a:tiled, b:blocked}"
    folded = with_rule(lambda x: x.reshape(4, 2, 3), "i (j k) -> i j k")
    assert text_of(folded, a) == "a(bc)->abc {a:tiled, b:tiled, c:tiled}"
    rows = with_rule(opaque, "... i, i -> ... i", need_replication_factors=("i",))
    assert text_of(rows, X, W) == "abc,c->abc {a:tiled, b:tiled, c:blocked}"
    total = with_rule(lambda x: jnp.sum(x), "i j ->")
    assert text_of(total, a) == ""  # nothing to split: it is read as a sum
    other = with_rule(opaque, "i j, j -> i j")
    with pytest.raises(RuleError, match=r"test_partitioning.py:\d+: the sharding_rule"):
        rhino.plan(lambda x, w: other(2 * x, w), X, W, cache_dir="", mesh=MESH)


def test_one_device_runs_what_partition_gives() -> None:
    """Whole it would be called once a device; by its rule, on a part of the rows."""
    asked = []

    def partition(mesh: Any, args: Any, result: Any) -> Any:
        asked.append([x.sharding.spec for x in (*args, result)])
        return as_asked(opaque)(mesh, args, result)

    norm = with_rule(
        opaque, "... i, i -> ... i", partition, need_replication_factors=("i",)
    )

    def step(x: Any, w: Any) -> Any:
        return jnp.tanh(norm(2 * x, w))

    pins = {"x": PartitionSpec("x", "y")}
    run = rhino.auto_parallel(step, cache_dir="", mesh=MESH, pins=pins)
    np.testing.assert_allclose(run(X, W), jax.jit(step)(X, W), rtol=1e-6)
    rows = PartitionSpec("x", "y", None)
    assert asked[0] == [rows, PartitionSpec(None), rows]
    (note,) = run.planned(X, W).plan.notes
    assert note.startswith("custom_partitioning: planned by custom_partitioning: abc,c")


def test_a_partition_that_its_rule_contradicts_is_refused() -> None:
    def elsewhere(mesh: Any, args: Any, result: Any) -> Any:
        whole = NamedSharding(mesh, PartitionSpec())
        return mesh, opaque, whole, (whole, whole)

    norm = with_rule(
        opaque, "... i, i -> ... i", elsewhere, need_replication_factors=("i",)
    )
    run = rhino.auto_parallel(
        lambda x, w: norm(2 * x, w),
        cache_dir="",
        mesh=MESH,
        pins={"x": PartitionSpec("x")},
    )
    with pytest.raises(RuleError, match=r"instead of .*\n.*need_replication_factors"):
        run(X, W)
