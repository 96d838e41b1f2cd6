"""Calls of every shape: what the undecorated step gives, planned once a signature."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino

ROOT = Path(__file__).parents[2]
X = np.arange(64, dtype=np.float32).reshape(16, 4) / 64
W = np.ones((4, 8), np.float32)


def agree(expected: Any, found: Any) -> None:
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert jnp.asarray(a).dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Counted:
    """A step that counts how often it is traced."""

    def __init__(self, fun: Callable[..., Any]) -> None:
        self.fun, self.traces = fun, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        return self.fun(*args, **kwargs)


def sgd(w: Any, x: Any, rate: Any = 0.1, *, steps: int = 1, mode: str = "mean") -> Any:
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[mode]
    for _ in range(steps):
        loss, grad = jax.value_and_grad(lambda w: reduce((x @ w) ** 2))(w)
        w = w - rate * grad
    return w, loss


def modal(w: Any, x: Any, mode: Any = "mean", steps: Any = 1) -> Any:
    return sgd(w, x, mode=mode or "mean", steps=steps)


CALLS: list[
    tuple[Any, dict[str, Any], list[tuple[tuple[Any, ...], dict[str, Any]]]]
] = [
    (sgd, {}, [((W, X), {}), ((W,), {"x": X}), ((), {"w": W, "x": X, "rate": 0.5})]),
    (sgd, {}, [((W, X, 0.1), {}), ((W, X, np.float32(0.2)), {}), ((W, X, 1), {})]),
    (
        modal,
        {"static_argnums": (2, 3)},
        [((W, X, "sum", 2), {}), ((W, X), {"mode": "sum"}), ((W, X), {})],
    ),
    (modal, {"static_argnums": -1}, [((W, X, None, 3), {}), ((W, X, None), {})]),
    (
        jax.jit(sgd, static_argnames=("steps", "mode")),
        {},
        [((W, X), {"steps": 2}), ((W, X), {"mode": "sum"}), ((W, X, 0.3), {})],
    ),
    (
        jax.jit(modal, static_argnums=(2, 3)),
        {},
        [((W, X, "sum", 2), {}), ((W, X, None, 2), {}), ((W, X, "mean"), {})],
    ),
    (partial(sgd, mode="sum"), {}, [((W, X), {})]),
    (lambda w, *rest: (w + sum(map(jnp.sum, rest)),), {}, [((W, X, X[:8]), {})]),
]


@pytest.mark.parametrize(
    ("fun", "options", "calls"), CALLS, ids=[str(k) for k in range(len(CALLS))]
)
def test_every_call_gives_what_the_step_gives(
    fun: Any, options: dict[str, Any], calls: Any
) -> None:
    step = rhino.auto_parallel(donate=False, **options)(fun)
    for args, kwargs in [*calls, *reversed(calls)]:
        agree(fun(*args, **kwargs), step(*args, **kwargs))


def test_a_signature_is_planned_once() -> None:
    """Whatever the state, the batch and the static arguments alternate between."""
    fun = Counted(lambda w, x, rate, steps: sgd(w, x, rate, steps=steps))
    step = rhino.auto_parallel(static_argnums=3)(fun)
    wide, tall = np.ones((4, 16), np.float32), np.ones((32, 4), np.float32)
    calls = [
        (W, X, 0.1, 1),
        (wide, X, 0.1, 1),
        (W, tall, 0.1, 1),
        (W, X, 1, 1),
        (W, X, np.float32(0.1), 1),
        (W, X, 0.1, 2),
    ]
    for count in (len(calls), 0, 0):
        before = fun.traces
        for call in calls:
            agree(sgd(*call[:3], steps=call[3])[0], step(*call)[0])
        assert fun.traces - before == count


def test_arrays_of_numpy_and_of_jax_are_one_signature() -> None:
    fun = Counted(sgd)
    step = rhino.auto_parallel(donate=False)(fun)
    for w in (W, W.astype(np.float64), jnp.asarray(W), step.place(W, X)):
        step(w, X)
        step(w, jnp.asarray(X))
        step(w, step.shard_batch(X))
    assert fun.traces == 1


def test_true_is_not_one() -> None:
    step = rhino.auto_parallel(lambda x, y: x + str(y).count("e"), static_argnums=1)
    assert [float(step(X, y)[0, 0]) for y in (1, True, 1.0, True)] == [0, 1, 0, 1]


def test_64_bits_on_and_off() -> None:
    step = rhino.auto_parallel(donate=False)(lambda w, x: (w - x.sum(), x * w.sum()))
    w, x = np.ones(8), np.ones((8, 2))
    for on in (True, False, True):
        with jax.enable_x64(on):
            found = step(w, x)
            assert {y.dtype for y in found} == {np.dtype("f8" if on else "f4")}


def test_the_state_lies_alike_in_every_signature() -> None:
    """A smaller last batch does not make the state move."""
    step = rhino.auto_parallel(sgd)
    w = step.place(np.ones((4, 4096), np.float32), X)
    for rows in (16, 4096, 8, 16):
        w, _ = step(w, np.ones((rows, 4), np.float32))
    assert len({step.planned(w, np.ones((n, 4), "f")).plan.mesh for n in (8, 16)}) == 1


def test_many_leaves_that_are_no_state() -> None:
    """More than are looked at one by one: their shapes are noticed all the same."""
    fun = Counted(lambda params, x: sum(jnp.sum(p) for p in params) + x.sum())
    step = rhino.auto_parallel(fun)
    few, more = [np.ones((8, n), np.float32) for n in (1, 2)]
    for _ in range(2):
        assert float(step([few] * 40, X)) == pytest.approx(320 + X.sum())
        assert float(step([more] * 40, X)) == pytest.approx(640 + X.sum())
    assert fun.traces == 2


class Trainer:
    rate = 0.5

    @partial(rhino.auto_parallel, static_argnums=0)
    def step(self, w: Any, x: Any) -> Any:
        return sgd(w, x, self.rate)


def test_a_method() -> None:
    trainer = Trainer()
    agree(sgd(W, X, 0.5), trainer.step(W, X))


def test_decorated_twice_is_decorated_once() -> None:
    inner = rhino.auto_parallel(recipe="zero3")(sgd)
    outer = rhino.auto_parallel(donate=False)(inner)
    assert (outer.fun, outer.options.recipe, outer.options.donate) == (
        sgd,
        "zero3",
        False,
    )
    agree(sgd(W, X), outer(W, X))
    assert rhino.plan(inner, W, X).plan.recipe == "zero3"


def test_inside_another_jit() -> None:
    step = rhino.auto_parallel(sgd)
    agree(sgd(W, 2 * X), jax.jit(lambda w, x: step(w, 2 * x))(W, X))


def test_constants_are_kept_on_every_device() -> None:
    table = jnp.arange(8.0)
    step = rhino.auto_parallel(lambda w, x: (w - table, (x @ w + table).sum()))
    agree((W - table, (X @ W + table).sum()), step(W, X))


def test_what_is_lowered_and_compiled() -> None:
    step = rhino.auto_parallel(recipe="data_parallel")(sgd)
    assert "all_reduce" in step.lower(W, X).as_text()
    compiled = step.compile(W, X)
    agree(sgd(W, X), (compiled(W, X)[0], compiled(W, X)[1]))


ONE_DEVICE = """
import jax, numpy as np, rhino_jax as rhino
from tests.api.test_calls import X, W, agree, sgd
assert jax.device_count() == 1
step = rhino.auto_parallel(sgd)
old = step.place(W, X)
new, loss = step(old, step.shard_batch(X))
agree(sgd(W, X), (new, loss))
assert old.is_deleted() and step.plan.collectives == ()
try:
    step(old, X)
except rhino.RhinoError as error:
    assert "<string>:6" in str(error), error
agree(sgd(sgd(W, X)[0], X), step(new, X))
print(step.planned(W, X))
print(step.init(lambda: W).shape, rhino.follow(step, lambda w, x: x @ w)(W, X).shape)
"""


def test_one_device_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_DEVICE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "1 device · no mesh" in done.stdout and "no collectives" in done.stdout
