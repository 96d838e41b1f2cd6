"""The decorated step: what it gives, what it keeps, and what it says when misused."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import rhino_jax as rhino
from rhino_jax import errors

MESH = {"data": 2, "tensor": 4}


def train_step(state: Any, batch: Any) -> Any:
    params, slots = state

    def loss_of(params: Any) -> jax.Array:
        hidden = rhino.name(jnp.tanh(batch["x"] @ params["up"] + params["b"]), "hidden")
        return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    slots = jax.tree.map(lambda m, g: 0.9 * m + g, slots, grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, params, slots)
    return (params, slots), {"loss": loss}


def init(rng: jax.Array) -> Any:
    up, down = jax.random.split(rng)
    params = {
        "up": jax.random.normal(up, (16, 64)),
        "b": jnp.zeros(64),
        "down": jax.random.normal(down, (64, 8)),
    }
    return params, jax.tree.map(jnp.zeros_like, params)


def make_batch(rows: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(rows, 16)).astype(np.float32),
        "y": rng.normal(size=(rows, 8)).astype(np.float32),
    }


def losses(step: Any, state: Any, count: int = 3) -> list[float]:
    found = []
    for _ in range(count):
        state, metrics = step(state, make_batch())
        found.append(float(metrics["loss"]))
    return found


EXPECTED = losses(jax.jit(train_step), init(jax.random.key(0)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipe": "zero3"},
        {"recipe": "zero3 x megatron", "mesh": MESH},
        {"mesh": MESH, "lowering": "auto", "recipe": "megatron"},
        {"mesh": MESH, "pins": {"hidden": P("data", "tensor"), "up": P("data")}},
        {"donate": False, "recipe": "zero1"},
    ],
)
def test_losses_are_those_of_the_undecorated_step(options: dict[str, Any]) -> None:
    step = rhino.auto_parallel(**options)(train_step)
    state = step.init(init, jax.random.key(0), make_batch())
    np.testing.assert_allclose(losses(step, state), EXPECTED, rtol=1e-5)


def test_one_device() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    step = rhino.auto_parallel(mesh=mesh)(train_step)
    np.testing.assert_allclose(
        losses(step, init(jax.random.key(0))), EXPECTED, rtol=1e-5
    )


def test_a_state_with_an_empty_array_is_searched() -> None:
    @rhino.auto_parallel
    def step(state: Any, x: Any) -> Any:
        held = {**state, "w": state["w"] - jnp.mean(x), "none": 2 * state["none"]}
        return held, jnp.sum(held["w"])

    state = {"w": np.ones((16, 8), np.float32), "none": np.ones((0, 3), np.float32)}
    step.planned(state, np.ones((8, 4), np.float32))
    if jax.__version_info__ >= (0, 11):
        pytest.skip("the CPU compiler of jaxlib 0.11.2 crashes on empty arrays")
    state, total = step(state, np.ones((8, 4), np.float32))
    assert state["none"].shape == (0, 3) and float(total) == 0


def test_a_jitted_step_with_static_and_keyword_arguments() -> None:
    def scaled(w: jax.Array, power: int, *, x: jax.Array) -> Any:
        return w - 0.1 * jnp.mean(x) ** power, jnp.sum(w)

    jitted = jax.jit(scaled, static_argnums=1)
    step = rhino.auto_parallel(jitted)
    w, x = jnp.ones((8, 8)), np.ones((8, 4), np.float32)
    expected = scaled(w, 3, x=x)
    found = step(w, 3, x=x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, found
    )


def test_a_new_signature_is_planned_once() -> None:
    step = rhino.auto_parallel(recipe="data_parallel", donate=False)(train_step)
    state = init(jax.random.key(0))
    plans = [step.planned(state, make_batch(rows)) for rows in (32, 16, 32)]
    assert plans[0] is plans[2]
    assert plans[0] is not plans[1]
    for rows in (32, 16, 32):
        found = step(state, make_batch(rows))[1]["loss"]
        expected = train_step(state, make_batch(rows))[1]["loss"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_place_and_follow() -> None:
    step = rhino.auto_parallel(recipe="zero3")(train_step)
    state = step.place(jax.device_get(init(jax.random.key(0))), make_batch())
    assert state[0]["up"].sharding.spec == P("data")

    def evaluate(state: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.tanh(batch["x"] @ state[0]["up"]))

    followed = rhino.follow(step, evaluate)
    found = followed(state, make_batch())
    np.testing.assert_allclose(found, evaluate(state, make_batch()), rtol=1e-5)
    where = followed.planned(state, make_batch()).in_shardings[0][0][0]["up"]
    assert where.spec == P("data")


def test_a_deleted_state_names_the_line_that_gave_it_away() -> None:
    step = rhino.auto_parallel(recipe="data_parallel")(train_step)
    old = step.init(init, jax.random.key(0), make_batch())
    step(old, make_batch())
    with pytest.raises(errors.DonationError, match=r"test_api\.py:\d+"):
        step(old, make_batch())


def test_arrays_that_lie_elsewhere_are_moved_with_one_notice() -> None:
    step = rhino.auto_parallel(recipe="zero3", donate=False)(train_step)
    mesh = jax.make_mesh((8,), ("other",), axis_types=(jax.sharding.AxisType.Auto,))
    where = NamedSharding(mesh, P())
    state = jax.device_put(init(jax.random.key(0)), where)
    with pytest.warns(UserWarning, match="moved"):
        _, first = step(state, make_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, again = step(state, make_batch())
    assert float(first["loss"]) == float(again["loss"])
    np.testing.assert_allclose(float(first["loss"]), EXPECTED[0], rtol=1e-5)


def plan(**options: Any) -> Any:
    state = jax.eval_shape(init, jax.random.key(0))
    return rhino.plan(train_step, state, make_batch(), **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"mesh": {"data": 3}}, errors.MeshError, r"3.*8"),
        ({"mesh": {"data": 0}}, errors.MeshError, r"'data': 0"),
        ({"mesh": 8}, errors.MeshError, r"mapping"),
        ({"pins": {"params/uq": P()}}, errors.PinError, r"params/uq"),
        (
            {"pins": {"0/up": P(None, None, "data")}},
            errors.PinError,
            r"3 entries for 2",
        ),
        (
            {"pins": {"0/down": P(None, ("data", "tensor", "data"))}, "mesh": MESH},
            errors.PinError,
            r"twice",
        ),
        ({"pins": {"x": P("data")}, "mesh": {"data": 8, "more": 1}}, None, ""),
        ({"pins": {"0/up": P("dada")}}, errors.PinError, r"no axis 'dada'"),
        ({"recipe": "zero4"}, errors.OptionsError, r"zero3"),
        ({"recipy": "zero3"}, errors.OptionsError, r"recipe"),
        ({"lowering": "manuel"}, errors.OptionsError, r"manual"),
        ({"cluster": "h10:2x8"}, errors.ClusterError, r"h100"),
        ({"cluster": "h100:2x8", "mesh": {"data": 8}}, errors.MeshError, r"16"),
        (
            {"recipe": "zero3 x megatron", "mesh": {"data": 8}},
            errors.OptionsError,
            r"needs 2 mesh axes",
        ),
    ],
)
def test_what_can_not_be_is_said(
    options: dict[str, Any], kind: Any, message: str
) -> None:
    if kind is None:
        plan(**options)
        return
    with pytest.raises(kind, match=message):
        plan(**options)


def test_a_pin_that_does_not_divide_names_both_numbers() -> None:
    with pytest.raises(errors.PinError, match=r"size 8 .* into 3"):
        rhino.plan(
            train_step,
            jax.eval_shape(init, jax.random.key(0)),
            make_batch(),
            cluster="cpu:3",
            mesh={"data": 3},
            pins={"0/down": P(None, "data")},
        )


@pytest.mark.parametrize("thing", [3, "step", None])
def test_only_functions_are_decorated(thing: Any) -> None:
    if thing is None:
        assert callable(rhino.auto_parallel(thing))
        return
    with pytest.raises(errors.TraceError, match=type(thing).__name__):
        rhino.auto_parallel(thing)


def test_results_must_be_arrays() -> None:
    step = rhino.auto_parallel(lambda w, x: (w, "done"))
    with pytest.raises(errors.TraceError):
        step(jnp.ones(8), jnp.ones((8, 2)))


def test_a_plan_that_runs_out_of_memory_is_made_again_for_less() -> None:
    """The device's refusal is played: simulated devices have all the host's memory."""
    step = rhino.auto_parallel(mesh=MESH, donate=False, cache_dir="")(train_step)
    state, batch = init(jax.random.key(0)), make_batch(4096)
    expected, _ = jax.jit(train_step)(state, batch)
    step(state, batch)
    entry = step._ready[0]
    first = step.plan
    assert first is not None and first.predicted is not None

    def refuse(*args: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    entry.run = refuse
    with pytest.warns(UserWarning, match="planned again for"):
        found, _ = step(state, batch)
    again = step.plan
    assert again is not None and again.predicted is not None
    assert again.predicted.limit_bytes < first.predicted.peak_bytes
    assert again.predicted.peak_bytes <= again.predicted.limit_bytes
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
