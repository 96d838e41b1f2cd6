"""Plans drawn for a small step: they can be run, and those taken lie evenly."""

from __future__ import annotations

import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from benchmarks.drawing import Drawn, draws, found_plan, spread
from benchmarks.prediction_time import plan_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.steps import Move
from rhino_jax.options import make_options
from rhino_jax.trace import Traced

TRIES = 8


def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, grad = jax.value_and_grad(lambda w: jnp.square(jnp.tanh(x @ w)).sum())(w)
    return w - 0.01 * grad, loss


W, X = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32), np.ones((16, 64))


@pytest.fixture(scope="module")
def traced() -> Traced:
    args = W, X.astype(np.float32)
    return traced_bare(step, args, {}, make_options(donate=False))


@pytest.fixture(scope="module")
def found(traced: Traced) -> list[Drawn]:
    cluster = parse_cluster("cpu:8")
    others = draws(traced, cluster, TRIES, random.Random(3))
    return [found_plan(traced, cluster), *others]


def test_drawn_plans_differ_and_are_no_faster_than_the_found_one(
    found: list[Drawn],
) -> None:
    assert len(found) > TRIES / 2
    assert len({repr(one.assignment) for one in found}) > 2
    assert min(one.seconds for one in found) >= 0.99 * found[0].seconds
    assert max(one.seconds for one in found) > 1.5 * found[0].seconds


def test_the_slowest_drawn_plan_is_the_same_step(
    found: list[Drawn], traced: Traced
) -> None:
    slowest = max(found, key=lambda one: one.seconds)
    run = rhino.auto_parallel(
        plan=plan_of(traced, slowest), donate=False, cache_dir=""
    )(step)
    got, wanted = run(W, X.astype(np.float32)), step(jnp.array(W), jnp.array(X))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_taken_lies_evenly_and_within(found: list[Drawn]) -> None:
    first = found[0]

    def as_long(seconds: float) -> Drawn:
        told = replace(first.prediction, step_seconds=seconds)
        nowhere = Layout.replicated(0)
        apart = Move(round(1000 * seconds), nowhere, nowhere, ())
        spelled = replace(first.assignment, final=(apart,))
        return replace(first, prediction=told, assignment=spelled)

    many = [as_long(1.0), *(as_long(1.0 + 0.001 * n) for n in range(1, 4000))]
    taken = spread(many, 11, 3.0, random.Random(5))
    seconds = [one.seconds for one in taken]
    assert seconds[0] == 1.0 and max(seconds) < 3.0 and len(set(seconds)) == 11
    steps = np.floor(np.log(seconds[1:]) / np.log(3.0) * 10)
    assert sorted(steps) == list(range(10)), "one in every tenth of the logarithm"
    again = spread(many, 11, 3.0, random.Random(5))
    assert [one.seconds for one in again] == seconds
    assert len(spread(many[:4], 11, 3.0, random.Random(5))) == 4, "all that there are"
