"""Scans that differentiation made a pair of, and what they save."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.ir.analysis.steps import analyzed, batch_shapes, f32, zoo


def test_a_rematerialized_stack_saves_its_carry() -> None:
    found = zoo("gpt_scanned")
    (pair,) = found.structure.loops
    (saved,) = pair.saved
    program = found.program
    assert pair.length == 4
    assert program.values[saved.value].shape == (4, 16, 16, 64)
    assert pair.saved_bytes == saved.num_bytes == 4 * 16 * 16 * 64 * 4
    assert saved.of_batch
    forward, backward = program.ops[pair.forward], program.ops[pair.backward]
    assert forward.results[saved.result] == saved.value
    assert [backward.operands[i] for i in saved.operands] == [saved.value]
    assert (forward.param["reverse"], backward.param["reverse"]) == (False, True)


def train(cast: Any) -> Any:
    def loss_fn(w: Any, batch: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return x + jnp.tanh(x @ cast(w)), None

        x, _ = jax.lax.scan(layer, batch["x"], w)
        return jnp.mean(jnp.square(x - batch["y"]))

    def step(w: Any, batch: Any) -> Any:
        loss, grad = jax.value_and_grad(loss_fn)(w, batch)
        return w - 0.1 * grad, loss

    return step


def test_what_is_made_of_weights_alone_is_told_from_activations() -> None:
    """exp(w) is saved for its own derivative; it depends on no batch."""
    found = analyzed(train(jnp.exp), f32(3, 8, 8), batch_shapes())
    (pair,) = found.structure.loops
    kinds = {(found.program.values[s.value].shape, s.of_batch) for s in pair.saved}
    assert ((3, 8, 8), False) in kinds
    assert ((3, 16, 8), True) in kinds
    assert ((3, 8, 8), True) not in kinds


def test_scans_that_nobody_differentiates_are_no_pair() -> None:
    def step(w: Any, batch: Any) -> Any:
        x, ys = jax.lax.scan(lambda x, w: (x @ w, x), batch["x"], w)
        again, _ = jax.lax.scan(lambda c, y: (c + y, None), x, ys)
        return w, jnp.sum(again)

    assert analyzed(step, f32(3, 8, 8), batch_shapes()).structure.loops == ()


def test_unrolled_layers_have_no_loops() -> None:
    assert zoo("gpt_unrolled").structure.loops == ()
