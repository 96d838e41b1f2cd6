"""ZeRO plans on the real compilers: true reduce-scatters, once, after accumulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from rhino_jax.verify.compile_only import installed

TARGETS = {"cpu": "cpu:8", "cuda": "h100:1x8", "tpu": "v5e:2x4"}
MESH = {"data": 2, "more": 4}
LAYERS, MICROBATCHES, WIDTH = 2, 4, 512


def interleaved(batch: Any) -> Any:
    """Every device keeps its own rows: microbatch m takes the rows m, m + M, ..."""
    return batch.reshape(-1, MICROBATCHES, WIDTH).swapaxes(0, 1)


def blocks(batch: Any) -> Any:
    """Microbatch m takes the m-th block of rows: the way most people write it."""
    return batch.reshape(MICROBATCHES, -1, WIDTH)


def train_step(
    state: Any, batch: Any, cut: Callable[[Any], Any] = interleaved
) -> tuple[Any, jax.Array]:
    """Momentum; gradients are summed over microbatches by the user's own scan."""
    params, slots = state

    def loss_of(params: Any, x: jax.Array) -> jax.Array:
        if isinstance(params, list):
            for w in params:
                x = jnp.tanh(x @ w)
        else:
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)
        return jnp.mean(x * x)

    def microbatch(total: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, x)
        return jax.tree.map(jnp.add, total, grads), loss

    parts = cut(batch)
    start = jax.tree.map(jnp.zeros_like, params)
    grads, losses = jax.lax.scan(microbatch, start, parts)
    slots = jax.tree.map(lambda m, g: 0.9 * m + g, slots, grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, params, slots)
    return (params, slots), jnp.mean(losses)


def planned(recipe: str, target: str) -> rhino.Planned:
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
    batch = jax.ShapeDtypeStruct((512, WIDTH), jnp.float32)
    state = (weights, weights)
    return rhino.plan(
        train_step, state, batch, cluster=target, mesh=MESH, recipe=recipe
    )


@pytest.mark.compilers
@pytest.mark.parametrize("platform", list(TARGETS))
@pytest.mark.parametrize("recipe", ["zero1", "zero3"])
def test_one_reduce_scatter_a_matrix_after_the_loop(recipe: str, platform: str) -> None:
    if not installed(platform):
        pytest.skip(f"the compiler for {platform} is not installed")
    plan = planned(recipe, TARGETS[platform])
    facts = plan.compile_only(cache_dir=None)
    assert facts.ok, facts.message
    scatters = [one for one in facts.collectives if one.kind == "reduce-scatter"]
    assert {one.trip_count for one in scatters} == {1}
    scattered_bytes = sum(
        sum(part.size_bytes for part in one.parts) for one in scatters
    )
    # On a torus one axis after the other: the second scatters half of what is left.
    whole = LAYERS * WIDTH * WIDTH * 4
    assert scattered_bytes == (whole * 3 // 2 if platform == "tpu" else whole)
    reduced = [one for one in facts.collectives if one.kind == "all-reduce"]
    assert all(one.operand_bytes < 1024 for one in reduced), "a gradient, all-reduced"


CUTS = {"interleaved": interleaved, "blocks": blocks}


def stacked(recipe: str, target: str, cut: str) -> rhino.Planned:
    """The same, the layers scanned: gradients come stacked out of a loop in a loop."""
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    batch = jax.ShapeDtypeStruct((32768, WIDTH), jnp.float32)
    return rhino.plan(
        partial(train_step, cut=CUTS[cut]),
        (weights, weights),
        batch,
        cluster=target,
        mesh=MESH,
        recipe=recipe,
    )


@pytest.mark.compilers
@pytest.mark.parametrize("platform", list(TARGETS))
@pytest.mark.parametrize("recipe", ["zero1", "zero3"])
@pytest.mark.parametrize("cut", list(CUTS))
def test_stacked_gradients_are_scattered_once_after_the_loops(
    cut: str, recipe: str, platform: str
) -> None:
    """Neither in every microbatch nor layer by layer, in the plan and as compiled."""
    if not installed(platform):
        pytest.skip(f"the compiler for {platform} is not installed")
    plan = stacked(recipe, TARGETS[platform], cut)
    planned = [c for c in plan.plan.collectives if c.kind == "reduce-scatter"]
    assert planned and {c.count for c in planned} == {1}
    whole = LAYERS * WIDTH * WIDTH * 4
    assert sum(c.wire_bytes for c in planned) == whole * 7 // 8
    facts = plan.compile_only(cache_dir=None)
    assert facts.ok, facts.message
    scatters = [one for one in facts.collectives if one.kind == "reduce-scatter"]
    assert {one.trip_count for one in scatters} == {1}
    assert len(scatters) == len(planned)
    reduced = [one for one in facts.collectives if one.kind == "all-reduce"]
    assert all(one.operand_bytes < 1024 for one in reduced), "a gradient, all-reduced"


@pytest.mark.parametrize("recipe", ["zero1", "zero3"])
@pytest.mark.parametrize("cut", list(CUTS))
def test_scanned_layers_under_accumulation_step_as_undecorated(
    x64: None, cut: str, recipe: str
) -> None:
    step = partial(train_step, cut=CUTS[cut])
    keys = jax.random.split(jax.random.key(0), 3)
    weights, slots = (
        jax.random.normal(key, (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5 for key in keys[:2]
    )
    batch = jax.random.normal(keys[2], (32, WIDTH))
    state = expected = (weights, slots)
    parallel = rhino.auto_parallel(recipe=recipe, mesh=MESH, donate=False)(step)
    for _ in range(2):
        expected, loss = step(expected, batch)
        state, found = parallel(state, batch)
        np.testing.assert_allclose(found, loss, rtol=1e-12)
    for one, other in zip(state, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)
