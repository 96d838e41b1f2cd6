"""Rematerialized scanned layers: what is saved or left alone, the same results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import rhino_jax as rhino
from benchmarks.models import build
from rhino_jax.api.planned import subject_of
from rhino_jax.ir.analysis.loops import loop_pairs
from rhino_jax.ir.analysis.regions import regions
from rhino_jax.ir.program import Program
from rhino_jax.search.remat import BOUNDARY, NONE, apply_remat
from rhino_jax.search.remat_scans import MARK, REMATERIALIZE, layer_scans
from rhino_jax.trace import trace
from tests.search.steps import MLP, compiled_peaks

LAYERS, WIDTH, HIDDEN, BATCH = 4, 16, 64, 32
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def stepping(reverse: bool = False, wrap: Any = lambda body: body) -> Any:
    """A step of scanned layers with dropout, a mask, two carries and a literal."""

    def loss_of(params: Any, batch: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), LAYERS)
        scale = jnp.linspace(0.5, 1.5, HIDDEN)

        def layer(carry: Any, layer: Any) -> Any:
            (x, total), (weights, key) = carry, layer
            h = jax.nn.gelu(x @ weights["up"]) * scale
            keep = jax.random.bernoulli(key, 0.9, h.shape)
            y = x + jnp.tanh(jnp.where(keep, h, 0.0)) @ weights["down"]
            return (y, total + 0.01 * jnp.mean(y**2) * total), jnp.sum(y)

        start = batch["x"], jnp.ones(())
        stacked = params, keys
        (x, total), sums = lax.scan(wrap(layer), start, stacked, reverse=reverse)
        return jnp.mean((x - batch["y"]) ** 2) + 0.1 * total + 1e-4 * jnp.sum(sums**2)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, opt = OPTIMIZER.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, loss

    return step


def recurrent_step(state: Any, batch: Any) -> Any:
    """A recurrent network: its loop goes over activations, the weights stand."""

    def loss_of(w: jax.Array) -> jax.Array:
        def turn(h: jax.Array, x: jax.Array) -> Any:
            h = jnp.tanh(h @ w + x)
            return h, h

        start = jnp.zeros_like(batch["x"])
        _, hs = lax.scan(turn, start, jnp.stack([batch["x"]] * 3))
        return jnp.mean((hs - batch["y"]) ** 2)

    loss, grad = jax.value_and_grad(loss_of)(state["w"])
    return {"w": state["w"] - 0.1 * grad}, loss


def arrays() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    params = {
        "up": jnp.asarray(rng.normal(size=(LAYERS, WIDTH, HIDDEN)) / 4),
        "down": jnp.asarray(rng.normal(size=(LAYERS, HIDDEN, WIDTH)) / 8),
    }
    batch = {k: rng.normal(size=(BATCH, WIDTH)) for k in ("x", "y")}
    return {"params": params, "opt": OPTIMIZER.init(params)}, batch


def rewritten(step: Any, args: Any) -> tuple[Program, Program, Any]:
    subject = subject_of(trace(step, args))
    program = subject.program
    after = apply_remat(program, subject.pairs, subject.batch_inputs, BOUNDARY)
    return program, after, subject


def saved_bytes(program: Program, subject: Any) -> int:
    found = regions(program, subject.pairs, subject.batch_inputs)
    return sum(pair.saved_bytes for pair in loop_pairs(program, found.batch))


def marked(program: Program) -> list[str]:
    return [op.kind for _, op in program.walk() if MARK in op.where.name_stack]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_loop_saves_what_enters_each_turn(reverse: bool) -> None:
    program, after, subject = rewritten(stepping(reverse), arrays())
    assert saved_bytes(after, subject) < 0.3 * saved_bytes(program, subject)
    found = regions(after, subject.pairs, subject.batch_inputs)
    (pair,) = layer_scans(after, found)
    ahead, behind = after.ops[pair.forward], after.ops[pair.backward]
    assert ahead.kind == behind.kind == "scan"
    again = [op.kind for op in behind.programs[0].ops]
    assert again.count("dot_general") > 4 and REMATERIALIZE in again
    assert marked(after) and "scan" not in marked(after)
    assert rewritten(stepping(reverse), arrays())[1].digest == after.digest


def test_layers_in_a_checkpoint_are_left_alone() -> None:
    program, after, _ = rewritten(stepping(wrap=jax.checkpoint), arrays())
    assert after is program
    program, after, _ = rewritten(MLP[0], MLP[1:])
    assert after is program


def test_a_checkpointed_stack_between_others_is_not_run_again() -> None:
    """The zoo's scanned GPT: a second forward loop would save nothing."""
    model = build("gpt_scanned")
    args = model.state_shapes, model.batch_shapes
    program, after, _ = rewritten(model.train_step, args)
    assert after is program


def test_loops_over_activations_are_no_layers() -> None:
    rng = np.random.default_rng(0)
    batch = {k: rng.normal(size=(BATCH, WIDTH)) for k in ("x", "y")}
    state = {"w": rng.normal(size=(WIDTH, WIDTH)) / 4}
    program, after, _ = rewritten(recurrent_step, (state, batch))
    assert after is program


ONE = {"mesh": jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))}
ZERO3 = {"recipe": "zero3"}


@pytest.mark.parametrize(
    ("reverse", "options"),
    [
        (False, ONE),
        (False, {}),
        (False, {"recipe": "data_parallel"}),
        (False, {"recipe": "megatron"}),
        (False, ZERO3),
        (True, ZERO3),
        (False, {**ZERO3, "lowering": "auto"}),
    ],
    ids=str,
)
def test_the_step_is_the_same(reverse: bool, options: Any, x64: None) -> None:
    state, batch = arrays()
    fun = stepping(reverse)
    defaults = {"mesh": {"data": 2, "tensor": 4}, "remat": BOUNDARY, "cache_dir": ""}
    step = rhino.auto_parallel(donate=False, **{**defaults, **options})(fun)
    assert marked(step.planned(state, batch).traced.program)
    mine, expected = state, state
    for _ in range(3):
        mine, loss = step(mine, batch)
        expected, wanted = jax.jit(fun)(expected, batch)
        np.testing.assert_allclose(loss, wanted, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


def test_with_microbatches(x64: None) -> None:
    def plain(state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> jax.Array:
            def layer(x: jax.Array, weights: Any) -> Any:
                h = jnp.tanh(jax.nn.gelu(x @ weights["up"]))
                return x + h @ weights["down"], None

            x, _ = lax.scan(layer, batch["x"], params)
            return jnp.mean((x - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        params = jax.tree.map(lambda w, g: w - 0.1 * g, state["params"], grads)
        return {**state, "params": params}, loss

    state, batch = arrays()
    options: dict[str, Any] = {"mesh": {"data": 2, "tensor": 4}, "remat": BOUNDARY}
    options |= {"recipe": "zero3", "microbatches": 2, "cache_dir": ""}
    step = rhino.auto_parallel(donate=False, **options)(plain)
    assert marked(step.planned(state, batch).traced.program)
    mine, loss = step(state, batch)
    expected, wanted = jax.jit(plain)(state, batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.compilers
def test_the_gpu_compiler_needs_less_memory() -> None:
    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {"up": f32(LAYERS, 256, HIDDEN), "down": f32(LAYERS, HIDDEN, 256)}
    state = {"params": params, "opt": jax.eval_shape(OPTIMIZER.init, params)}
    rows = f32(65536, 256)
    peak = compiled_peaks(stepping(), state, {"x": rows, "y": rows})
    assert peak[BOUNDARY] < 0.8 * peak[NONE]
