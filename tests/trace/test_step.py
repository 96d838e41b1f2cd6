"""Arguments of every kind, their names, and what a call may take."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rhino_jax.errors import TraceError
from rhino_jax.trace import trace
from tests.trace.harness import assert_same, check_step, evaluate, paired

X = np.linspace(0.0, 1.0, 6, dtype=np.float32).reshape(2, 3)
STATE = {"w": np.ones((3, 2), np.float32), "n": np.int32(0)}


class Pair(NamedTuple):
    first: Any
    second: Any


@functools.partial(jax.tree_util.register_dataclass)
@dataclass
class Batch:
    x: Any
    mask: Any


def update(state: Any, x: Any) -> Any:
    return {"w": state["w"] - 0.1 * (x.T @ (x @ state["w"])), "n": state["n"] + 1}


def test_trees_variadic_arguments_and_keywords() -> None:
    def step(state: Any, *rest: Any, batch: Any, **more: Any) -> Any:
        x = batch.x * rest[1]["a"] + rest[0] + more["shift"].second
        return Pair(update(state, x), {"sum": x.sum()})

    args = (STATE, 2.0, {"a": X}, None)
    kwargs = {"batch": Batch(X, None), "shift": Pair(1, X)}
    traced = check_step(step, args, kwargs)
    assert traced.input_paths == (
        "state/n",
        "state/w",
        "rest/0",
        "rest/1/a",
        "batch/x",
        "shift/first",
        "shift/second",
    )
    assert traced.output_paths == ("first/n", "first/w", "second/sum")
    assert traced.static == ()
    assert [str(a.dtype) for a in traced.avals[:3]] == ["int32", "float32", "float32"]


def test_functions_of_every_kind() -> None:
    class Step:
        def __call__(self, state: Any, x: Any) -> Any:
            return update(state, x)

        def method(self, state: Any, x: Any) -> Any:
            return update(state, x)

    bound = functools.partial(lambda k, state, x: update(state, k * x), 2.0)
    for fun, name in [
        (Step(), "Step"),
        (Step().method, "method"),
        (bound, "<lambda>"),
        (jax.jit(update), "update"),
        (jnp.add, "add"),
    ]:
        args = (X, X) if fun is jnp.add else (STATE, X)
        traced = check_step(fun, args)
        assert traced.program.name == name
    assert traced.input_paths == ("args/0", "args/1")
    assert traced.output_paths == ("result",)


def test_shapes_stand_for_arrays_and_need_no_memory() -> None:
    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    state = {"w": shape(10**6, 10**6), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    traced = trace(update, (state, shape(8, 10**6)))
    assert traced.avals[1].shape == (10**6, 10**6)


def test_where_arrays_lie_does_not_matter() -> None:
    devices = np.array(jax.devices()[:2])
    mesh = jax.sharding.Mesh(devices, "d", axis_types=(jax.sharding.AxisType.Explicit,))
    where = jax.NamedSharding(mesh, jax.P("d"))
    near, far = jnp.ones((4, 3)), jax.device_put(jnp.ones((4, 3)), where)
    digests = {trace(update, (STATE, x)).program.digest for x in (near, far)}
    assert len(digests) == 1


def scaled(state: Any, mode: str, x: Any, power: int = 1) -> Any:
    factor = {"double": 2.0, "half": 0.5}[mode] ** power
    return update(state, factor * x)


def test_static_arguments() -> None:
    traced = trace(scaled, (STATE, "half", X), {"power": 2}, static_argnums=(1, -1))
    assert traced.static == (1, "power")
    assert traced.input_paths == ("state/n", "state/w", "x")
    assert_same(evaluate(traced, STATE, X), scaled(STATE, "half", X, 2))
    assert traced.donated == (0, 1)


def test_static_arguments_of_a_jitted_function() -> None:
    jitted = jax.jit(scaled, static_argnames=("mode", "power"))
    traced = trace(jitted, (STATE, "double", X, 3))
    assert traced.static == (1, 3)
    assert_same(evaluate(traced, STATE, X), scaled(STATE, "double", X, 3))
    with pytest.raises(TraceError, match="Give static_argnums to its"):
        trace(jitted, (STATE, "double", X), static_argnums=(1,))


def test_donation() -> None:
    def step(state: Any, batch: Any) -> Any:
        return {"loss": batch["x"].sum()}, update(state, batch["x"])

    args = (STATE, {"x": X, "y": X})
    assert trace(step, args).donated == (0, 1)
    assert trace(step, args, donate=False).donated == ()
    # What the user's own jit says stands, and nothing is added to it.
    named = jax.jit(step, donate_argnames="batch")
    assert trace(named, args).donated == (2, 3)
    assert trace(named, args, donate=False).donated == ()
    assert trace(jax.jit(step), args).donated == (0, 1)
    traced = trace(named, args)
    assert paired(traced) == {"state/n": "1/n", "state/w": "1/w"}
    assert traced.state_inputs == {0, 1}
    assert traced.batch_inputs == (2, 3)
    assert traced.num_inputs == 4
