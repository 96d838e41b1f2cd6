"""Rematerialized Programs: what is kept, what is recomputed, and the same results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rhino_jax as rhino
from rhino_jax.api.planned import subject_of
from rhino_jax.ir.analysis.regions import BACKWARD, FORWARD, RESIDUAL, regions
from rhino_jax.ir.program import Program
from rhino_jax.search.remat import BOUNDARY, NONE, apply_remat
from rhino_jax.search.remat_scans import REMATERIALIZE
from rhino_jax.trace import trace
from tests.search.steps import compiled_peaks

LAYERS, WIDTH, HIDDEN, BATCH = 5, 16, 64, 32
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def train_step(state: Any, batch: Any) -> Any:
    """A residual network of unrolled layers with dropout."""

    def loss_of(params: Any) -> jax.Array:
        x = batch["x"]
        for i, layer in enumerate(params):
            h = jax.nn.gelu(x @ layer["up"])
            key = jax.random.fold_in(jax.random.key(0), i)
            h = jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h, 0.0)
            x = x + jnp.tanh(h) @ layer["down"]
        return jnp.mean((x - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt = OPTIMIZER.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def arrays() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    params = [
        {
            "up": rng.normal(size=(WIDTH, HIDDEN)) / 4,
            "down": rng.normal(size=(HIDDEN, WIDTH)) / 8,
        }
        for _ in range(LAYERS)
    ]
    batch = {k: rng.normal(size=(BATCH, WIDTH)) for k in ("x", "y")}
    params = jax.tree.map(jnp.asarray, params)
    return {"params": params, "opt": OPTIMIZER.init(params)}, batch


def rewritten(step: Any, args: Any, policy: str) -> tuple[Program, Program, Any]:
    subject = subject_of(trace(step, args))
    program = subject.program
    pairs, batch = subject.pairs, subject.batch_inputs
    return program, apply_remat(program, pairs, batch, policy), subject


def saved_bytes(program: Program, subject: Any) -> int:
    """Bytes of forward values that the backward pass reads."""
    found = regions(program, subject.pairs, subject.batch_inputs)
    return sum(
        program.values[v].num_bytes
        for i, op in enumerate(program.ops)
        if found.of[i] in (FORWARD, RESIDUAL)
        for v in op.results
        if any(found.of[j] == BACKWARD for j in program.uses.get(v, ()))
    )


def test_none_changes_nothing() -> None:
    program, same, _ = rewritten(train_step, arrays(), NONE)
    assert same is program


def test_the_backward_pass_keeps_what_enters_each_layer() -> None:
    program, after, subject = rewritten(train_step, arrays(), BOUNDARY)
    marks = [op for op in after.ops if op.kind == REMATERIALIZE]
    assert len(marks) == LAYERS - 2  # the first has no entry, the last gains nothing
    assert saved_bytes(after, subject) < 0.55 * saved_bytes(program, subject)
    copies = sum(op.kind == "dot_general" for op in after.ops)
    assert copies > sum(op.kind == "dot_general" for op in program.ops)
    assert after.digest != program.digest
    again = rewritten(train_step, arrays(), BOUNDARY)[1]
    assert again.digest == after.digest


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "data_parallel"},
        {"recipe": "zero3"},
        {"recipe": "megatron"},
        {},
        {"recipe": "zero1", "microbatches": 2},
    ],
    ids=str,
)
def test_the_step_is_the_same(options: Any, x64: None) -> None:
    state, batch = arrays()
    step = rhino.auto_parallel(
        remat="boundary",
        mesh={"data": 2, "tensor": 4},
        donate=False,
        cache_dir="",
        **options,
    )(train_step)
    mine, expected = state, state
    for _ in range(3):
        mine, loss = step(mine, batch)
        expected, wanted = jax.jit(train_step)(expected, batch)
    assert step.plan is not None and step.plan.remat == (("*", "boundary"),)
    np.testing.assert_allclose(loss, wanted, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


def test_a_saved_plan_is_bound_to_the_same_rewrite(tmp_path: Any) -> None:
    state, batch = arrays()
    options = {"cluster": "h100:1x8", "recipe": "zero3"}
    planned = rhino.plan(train_step, state, batch, remat="boundary", **options)
    planned.save(tmp_path / "plan.json")
    again = rhino.plan(train_step, state, batch, plan=tmp_path / "plan.json")
    assert again.traced.program.digest == planned.traced.program.digest


@pytest.mark.compilers
def test_the_gpu_compiler_needs_less_memory() -> None:
    """It merges no copy with its original, and computes gradients layer by layer."""
    shapes = [
        {
            "up": jax.ShapeDtypeStruct((256, 1024), jnp.float32),
            "down": jax.ShapeDtypeStruct((1024, 256), jnp.float32),
        }
        for _ in range(6)
    ]
    state = {"params": shapes, "opt": jax.eval_shape(OPTIMIZER.init, shapes)}
    rows = jax.ShapeDtypeStruct((65536, 256), jnp.float32)
    peak = compiled_peaks(train_step, state, {"x": rows, "y": rows})
    assert peak[BOUNDARY] < 0.6 * peak[NONE]


def biased_step(params: Any, batch: Any) -> Any:
    """Layers that add one bias to their scores, as T5's do: its gradient is summed."""

    def loss_of(params: Any) -> jax.Array:
        x = batch["x"]
        for layer in params["layers"]:
            q, k, v = (jnp.einsum("bsd,dnh->bnsh", x, layer[name]) for name in "qkv")
            scores = jnp.einsum("bnqh,bnkh->bnqk", q, k) + params["bias"]
            y = jnp.einsum("bnqk,bnkh->bqnh", jax.nn.softmax(scores), v)
            x = x + jnp.einsum("bqnh,dnh->bqd", y, layer["o"])
        return jnp.mean((x - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def biased_shapes(layers: int, rows: int, length: int, width: int) -> Any:
    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {name: f32(width, 4, width // 4) for name in "qkvo"}
    params = {"layers": [layer] * layers, "bias": f32(4, length, length)}
    return params, {k: f32(rows, length, width) for k in ("x", "y")}


def test_a_layer_waits_for_terms_of_gradients_that_layers_share() -> None:
    """Else what they are made of stands until the last of them is added."""
    _, program, _ = rewritten(biased_step, biased_shapes(4, 8, 32, 16), BOUNDARY)
    marks = [op for op in program.ops if op.kind == REMATERIALIZE]
    assert len(marks) > 2
    for mark in marks[1:]:  # nothing was added to the bias's gradient before the first
        waits = {program.values[v].shape for v in mark.param["waits"]}
        assert (4, 32, 32) in waits, mark
        assert (8, 4, 32, 32) not in waits, mark  # which the term is made of


@pytest.mark.compilers
def test_the_gpu_compiler_adds_terms_of_a_shared_bias_layer_by_layer() -> None:
    shapes = biased_shapes(6, 64, 512, 64)
    peak = compiled_peaks(biased_step, *shapes)
    assert peak[BOUNDARY] < 0.5 * peak[NONE]
