"""What is known of a step before it is planned: kin, stacks, the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rhino_jax.search.subject import Subject
from tests.search.steps import (
    ATTENTION,
    BATCH,
    MLP,
    MLP_PARAMS,
    f32,
    mlp_loss,
    subject_of,
)


def adam_step(state: Any, batch: Any) -> Any:
    """Adam and an average of the parameters, written out."""
    loss, grads = jax.value_and_grad(mlp_loss)(state["params"], batch)
    count = state["count"] + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["first"], grads)
    second = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, state["second"], grads)
    params = jax.tree.map(
        lambda p, m, v: p - 0.1 * m / (jnp.sqrt(v) + count),
        state["params"],
        first,
        second,
    )
    mean = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, state["mean"], params)
    new = {
        "params": params,
        "first": first,
        "second": second,
        "mean": mean,
        "count": count,
    }
    return new, loss


def adam() -> Subject:
    trees = dict.fromkeys(("params", "first", "second", "mean"), MLP_PARAMS)
    return subject_of(adam_step, {**trees, "count": f32()}, MLP[2])


def named(subject: Subject, position: int) -> str:
    return subject.input_paths[position]


def test_parameters_are_what_the_loss_depends_on() -> None:
    subject = adam()
    found = {named(subject, i) for i in subject.parameters}
    assert found == {
        "state/params/head",
        "state/params/layers/up",
        "state/params/layers/down",
    }


def test_moments_and_averages_are_kin_of_their_parameter() -> None:
    subject = adam()
    for i in subject.pairs:
        path = named(subject, i)
        leader = named(subject, subject.kin[i])
        if path == "state/count":
            assert leader == path
        else:
            tail = path.split("/", 2)[2]
            assert leader == f"state/params/{tail}", path


def test_parameters_of_one_shape_are_not_kin() -> None:
    """Residual sums join activations of one shape, never two weights."""

    def step(state: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            h = x + x @ params["a"]
            return jnp.mean((h + h @ params["b"]) ** 2)

        value, grads = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    subject = subject_of(step, {"a": f32(8, 8), "b": f32(8, 8)}, f32(8, 8))
    assert [subject.kin[i] for i in (0, 1)] == [0, 1]


def test_a_clipped_norm_joins_nothing() -> None:
    """Global sums of squares are scalars: they make no kin of what they sum."""

    def step(state: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((x @ params["a"] @ params["b"]) ** 2)

        value, grads = jax.value_and_grad(loss)(state)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, 1.0 / norm)
        return jax.tree.map(lambda p, g: p - scale * g, state, grads), value

    subject = subject_of(step, {"a": f32(8, 8), "b": f32(8, 8)}, f32(4, 8))
    assert [subject.kin[i] for i in (0, 1)] == [0, 1]


def test_scanned_parameters_are_stacked() -> None:
    subject = adam()
    found = {named(subject, i): s for i, s in subject.stacked.items()}
    assert found == {
        "state/params/head": False,
        "state/params/layers/up": True,
        "state/params/layers/down": True,
    }


def test_parameters_cast_before_the_scan_are_stacked() -> None:
    def step(state: Any, batch: Any) -> Any:
        def loss(params: Any, batch: Any) -> jax.Array:
            half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
            return mlp_loss(half, batch).astype(jnp.float32)

        value, grads = jax.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    subject = subject_of(step, MLP_PARAMS, MLP[2])
    assert sum(subject.stacked.values()) == 2


def test_the_batch_is_what_is_no_state() -> None:
    subject = subject_of(*MLP)
    assert {named(subject, i) for i in subject.batch_inputs} == {"batch/x", "batch/y"}
    assert subject.batch_size == BATCH


def test_the_batch_size_is_the_commonest_leading_dimension() -> None:
    fun, state, batch = ATTENTION

    def step(state: Any, batch: Any) -> Any:
        state, out = fun(state, batch)
        return state, (out, batch["rate"] * batch["table"].sum())

    more = {**batch, "table": f32(5, 6), "rate": f32()}
    assert subject_of(step, state, more).batch_size == BATCH


def test_without_a_batch_its_size_is_one() -> None:
    def step(w: jax.Array, rate: jax.Array) -> Any:
        return w - rate * w, jnp.sum(w)

    subject = subject_of(step, f32(4, 4), f32())
    assert subject.batch_size == 1
    assert [named(subject, i) for i in subject.parameters] == ["w"]
