"""flax nnx: an update that does not come back is named, not lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rhino_jax.errors import TraceError
from rhino_jax.trace import trace
from tests.trace.harness import check_step, paired

BATCH = {"x": np.ones((8, 4), np.float32), "y": np.ones((8, 2), np.float32)}


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.drop(jnp.tanh(self.norm(self.up(x)))))


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.last = self.first

    def __call__(self, x: Any) -> Any:
        return self.last(jnp.tanh(self.first(x)))


MODEL = Net(nnx.Rngs(0))
OPTIMIZER = nnx.Optimizer(MODEL, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)


def loss_fn(model: Any, batch: Any) -> Any:
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def fit(model: Any, optimizer: Any, batch: Any) -> Any:
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


def message(fun: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(TraceError) as caught:
        trace(fun, args)
    return str(caught.value)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_lost_updates_are_named(wrap: Callable[..., Any]) -> None:
    text = message(wrap(fit), MODEL, OPTIMIZER, BATCH)
    title, *rest = text.splitlines()
    assert title == "fit updates 16 nnx variables that it does not return:"
    assert "  - model/down/bias (Param)" in rest
    assert "  - model/norm/mean (BatchStat)" in rest
    assert "  - and 4 more" in rest
    assert "return model, optimizer, loss" in text


def test_half_returned_is_half_lost() -> None:
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss = fit(model, optimizer, batch)
        return nnx.state(model, nnx.Param), optimizer, loss

    text = message(step, MODEL, OPTIMIZER, BATCH)
    assert text.splitlines()[1:4] == [
        "  - model/drop/rngs/count (RngCount)",
        "  - model/norm/mean (BatchStat)",
        "  - model/norm/var (BatchStat)",
    ]


def test_returned_in_any_tree_is_no_loss() -> None:
    def step(held: Any, batch: Any) -> Any:
        loss = fit(held["model"], held["optimizer"], batch)
        return {"loss": loss, "state": nnx.state((held["model"], held["optimizer"]))}

    trace(step, ({"model": MODEL, "optimizer": OPTIMIZER}, BATCH))


def test_evaluation_changes_nothing() -> None:
    def evaluate(model: Any, batch: Any) -> Any:
        model.eval()
        return loss_fn(model, batch), nnx.grad(loss_fn)(model, batch)

    traced = check_step(evaluate, (MODEL, BATCH))
    assert paired(traced) == {}


def test_tied_variables() -> None:
    """As pytrees, tied weights come apart: harmless to read, wrong to update."""
    model = Tied(nnx.Rngs(0))
    batch = {"x": BATCH["x"], "y": BATCH["x"]}
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss = fit(model, optimizer, batch)
        return model, optimizer, loss

    text = message(step, model, optimizer, batch)
    assert "model/first/kernel, also model/last/kernel" in text
    assert "nnx.split" in text
    trace(loss_fn, (model, batch))

    graph, state = nnx.split((model, optimizer))

    def merged(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss = fit(model, optimizer, batch)
        return nnx.state((model, optimizer)), loss

    traced = check_step(merged, (state, batch))
    assert len(traced.state_pairs) == len(jax.tree.leaves(state))


def test_an_average_may_begin_as_the_parameters_themselves() -> None:
    graph, state = nnx.split((MODEL, OPTIMIZER))
    average = nnx.state(MODEL, nnx.Param)  # the same variables, not yet copies

    def step(state: Any, average: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss = fit(model, optimizer, batch)
        new = nnx.state(model, nnx.Param)
        average = optax.incremental_update(new, average, 0.1)
        return nnx.state((model, optimizer)), average, loss

    traced = check_step(step, (state, average, BATCH))
    assert paired(traced)["average/up/kernel/value"] == "1/up/kernel/value"


def test_nnx_jit_and_closed_over_modules() -> None:
    text = message(nnx.jit(fit), MODEL, OPTIMIZER, BATCH)
    assert text.startswith("fit is compiled by nnx.jit already.")
    assert "return model, optimizer, loss" in text

    text = message(lambda batch: loss_fn(MODEL, batch), BATCH)
    assert "an nnx module that the step closes over is changed" in text
    assert __file__ in text
    assert "Pass the module as an argument and return it." in text
