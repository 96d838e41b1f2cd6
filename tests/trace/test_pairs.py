"""Which results succeed which arguments: what is paired, and what must not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from rhino_jax.trace import trace
from tests.trace.harness import paired

X = np.ones((8, 4), np.float32)
Y = np.ones((8, 2), np.float32)
P = {"w": np.ones((4, 2), np.float32), "b": np.zeros(2, np.float32)}
TX = optax.adam(1e-2)
OPT = TX.init(P)


def loss_fn(p: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ p["w"] + p["b"] - y) ** 2)


def fit(p: Any, opt: Any, x: Any, y: Any) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(p, x, y)
    updates, opt = TX.update(grads, opt, p)
    return optax.apply_updates(p, updates), opt, loss


def pairs_of(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str]:
    return paired(trace(fun, args, kwargs))


ADAM = ("0/count", "0/mu/b", "0/mu/w", "0/nu/b", "0/nu/w")


def both(p: str, opt: str) -> dict[str, str]:
    """Parameters and optimizer state of ``fit``, with where they come out."""
    return {
        **{f"p/{leaf}": f"{p}/{leaf}" for leaf in "bw"},
        **{f"opt/{leaf}": f"{opt}/{leaf}" for leaf in ADAM},
    }


@jax.tree_util.register_dataclass
@dataclass
class Out:
    loss: Any
    new: Any


def test_flat_results() -> None:
    assert pairs_of(fit, P, OPT, X, Y) == both("0", "1")


def test_nested_results() -> None:
    def nested(p: Any, opt: Any, x: Any, y: Any) -> Any:
        new, held, loss = fit(p, opt, x, y)
        return (held, new), {"loss": loss}

    def named(p: Any, opt: Any, x: Any, y: Any) -> Any:
        new, held, loss = fit(p, opt, x, y)
        return Out(loss, {"opt": [held], "params": new})

    assert pairs_of(nested, P, OPT, X, Y) == both("0/1", "0/0")
    assert pairs_of(named, P, OPT, X, Y) == both("new/params", "new/opt/0")


def test_one_argument_of_several_parts() -> None:
    """A part of an argument pairs where the whole does not."""

    def step(carry: Any) -> Any:
        p, opt, loss = fit(carry["p"], carry["opt"], *carry["batch"])
        return {"p": p, "opt": opt}, loss

    found = pairs_of(step, {"p": P, "opt": OPT, "batch": (X, Y)})
    assert found == {f"carry/{k}": f"0/{k}" for k in both("p", "opt")}


def test_keywords_and_the_whole_result() -> None:
    def step(*, batch: Any, state: Any) -> Any:
        return fit(*state, *batch)[:2]

    found = pairs_of(step, batch=(X, Y), state=(P, OPT))
    assert found["state/0/w"] == "0/w"
    assert len(found) == 7


def test_an_average_of_parameters_is_told_from_parameters() -> None:
    """Both have the parameters' shapes, and both are made from the parameters."""

    def step(p: Any, ema: Any, x: Any, y: Any) -> Any:
        p = jax.tree.map(lambda a, g: a - g, p, jax.grad(loss_fn)(p, x, y))
        return jax.tree.map(lambda e, a: 0.9 * e + 0.1 * a, ema, p), p

    found = pairs_of(step, P, P, X, Y)
    assert found == {"p/b": "1/b", "p/w": "1/w", "ema/b": "0/b", "ema/w": "0/w"}


def test_state_carried_through_loops_and_branches() -> None:
    def step(p: Any, opt: Any, x: Any, y: Any) -> Any:
        def micro(held: Any, batch: Any) -> Any:
            new, opt, loss = fit(*held, *batch)
            good = jnp.isfinite(loss)
            new = lax.cond(good, lambda: new, lambda: held[0])
            return (
                new,
                jax.tree.map(lambda a, b: lax.select(good, a, b), opt, held[1]),
            )

        batches = x.reshape(2, 4, 4), y.reshape(2, 4, 2)
        held, _ = lax.scan(lambda c, b: (micro(c, b), None), (p, opt), batches)
        return lax.fori_loop(0, 2, lambda _, c: micro(c, (x, y)), held)

    assert pairs_of(step, P, OPT, X, Y) == both("0", "1")


def test_parameters_flattened_and_back() -> None:
    def step(p: Any, x: Any, y: Any) -> Any:
        flat, back = ravel_pytree(p)
        grads, _ = ravel_pytree(jax.grad(loss_fn)(p, x, y))
        return back(flat - 0.1 * grads)

    assert pairs_of(step, P, X, Y) == {"p/b": "b", "p/w": "w"}


def test_what_an_optimizer_only_writes_is_state() -> None:
    """A line search's record of the last step is not read, and comes back in place."""
    tx = optax.lbfgs(memory_size=2)

    def step(state: Any, x: Any, y: Any) -> Any:
        p, opt = state

        def value_fn(p: Any) -> Any:
            return loss_fn(p, x, y)

        loss, grad = jax.value_and_grad(value_fn)(p)
        updates, opt = tx.update(grad, opt, p, value=loss, grad=grad, value_fn=value_fn)
        return (optax.apply_updates(p, updates), opt), loss

    found = pairs_of(step, (P, tx.init(P)), X, Y)
    assert found == {path: path.replace("state", "0", 1) for path in found}
    assert "state/1/2/grad/w" in found
    assert len(found) == len(jax.tree.leaves((P, tx.init(P))))


def test_what_is_mostly_new_is_no_state() -> None:
    def step(p: Any, batch: Any) -> Any:
        new = jax.tree.map(lambda a: a - batch["x"].sum(), p)
        turned = {"x": batch["y"] * 2, "y": batch["z"] * 2, "z": batch["x"] * 2}
        return new, {"w": batch["w"] + 1, **turned}

    batch = {"w": X, "x": Y, "y": Y, "z": Y}
    assert set(pairs_of(step, P, batch)) == {"p/b", "p/w"}


def test_weak_types_pair() -> None:
    def step(state: Any, x: Any) -> Any:
        return {"n": state["n"] + 1, "w": state["w"] - x.sum()}

    assert len(pairs_of(step, {"n": 0, "w": P["w"]}, X)) == 2


def test_what_has_the_shape_of_the_batch_is_no_state() -> None:
    batch = {"x": X, "z": X}

    def autoencode(p: Any, batch: Any) -> Any:
        out = {k: jnp.tanh(v @ p["w"]) @ p["w"].T for k, v in batch.items()}
        return out, sum(jnp.mean((out[k] - batch[k]) ** 2) for k in out)

    assert pairs_of(autoencode, P, batch) == {}


def test_what_is_handed_through_is_no_state() -> None:
    def evaluate(p: Any, batch: Any) -> Any:
        return {"labels": batch["y"], "loss": loss_fn(p, batch["x"], batch["y"])}

    def pair(p: Any, x: Any, y: Any) -> Any:
        return x @ p["w"], y

    assert pairs_of(evaluate, P, {"x": X, "y": Y}) == {}
    assert pairs_of(pair, P, X, Y) == {}


def test_a_result_without_the_argument_in_it_is_no_successor() -> None:
    def reset(p: Any, x: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, p), x.sum()

    def gradients(p: Any, x: Any, y: Any) -> Any:
        return jax.grad(loss_fn)(p, x, y)

    assert pairs_of(reset, P, X) == {}
    assert pairs_of(gradients, P, X, Y) == {}


def bare(w: Any, b: Any, x: Any, y: Any) -> Any:
    grads = jax.grad(lambda w, b: loss_fn({"w": w, "b": b}, x, y), (0, 1))(w, b)
    return w - grads[0], b - grads[1], y - x @ w


def residual(p: Any, y: Any, x: Any) -> Any:
    p = jax.tree.map(lambda a, g: a - g, p, jax.grad(loss_fn)(p, x, y))
    return p, y - x @ p["w"]


def weighted(beta: Any, w: Any, x: Any) -> Any:
    return beta * jnp.mean(x @ w), w - jnp.mean(x)


def rowwise(x: Any, w: Any) -> Any:
    return jax.nn.softmax(x @ w), w * 0.9


SINGLE: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]] = [
    # Leading arrays, as in a step over bare weights; not the target of a residual.
    (bare, (P["w"], P["b"], X, Y), {"w": "0", "b": "1"}),
    (residual, (P, Y, X), {"p/b": "0/b", "p/w": "0/w"}),
    # A scalar is no state, nor is what follows something that is none.
    (weighted, (np.float32(1), P["w"], X), {}),
    (rowwise, (X, P["w"]), {}),
    (lambda x: {"sum": x.sum(), "x": x + 1}, (X,), {}),
    (lambda x: x + 1, (X,), {"x": "result"}),
]


@pytest.mark.parametrize(("fun", "args", "expected"), SINGLE)
def test_arguments_that_are_one_array(
    fun: Callable[..., Any], args: tuple[Any, ...], expected: dict[str, str]
) -> None:
    assert pairs_of(fun, *args) == expected
