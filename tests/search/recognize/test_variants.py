"""Softmaxes put together at random: what is recognized is equal, else it is left."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from rhino_jax.api.attending import attended
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.program import jit_step
from rhino_jax.options import make_options
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta
from tests.attentions import by_hand, inputs_of, params_of, train_step

Apply = Callable[[Any], Any]


def stopped(x: Any) -> Any:
    return lax.stop_gradient(x)


def over(axis: int, reduce: Any) -> Apply:
    return lambda x: reduce(x, axis, keepdims=True)


BEFORE: Mapping[str, Apply] = {
    "as it is": lambda x: x,
    "scaled": lambda x: 0.5 * x,
    "moved": lambda x: x + 1.0,
    "stopped": stopped,
    "half stopped": lambda x: 0.5 * x + stopped(0.5 * x),
}
SHIFT: Mapping[str, Apply] = {
    "the maximum": lambda x: stopped(over(-1, jnp.max)(x)),
    "nothing": lambda x: jnp.zeros((), x.dtype),
    "a moving maximum": over(-1, jnp.max),
    "half the maximum": lambda x: 0.5 * stopped(over(-1, jnp.max)(x)),
    "the maximum of a column": lambda x: stopped(over(-2, jnp.max)(x)),
    "the mean": lambda x: stopped(over(-1, jnp.mean)(x)),
}
TOTAL: Mapping[str, Apply] = {
    "the sum": over(-1, jnp.sum),
    "a stopped sum": lambda e: stopped(over(-1, jnp.sum)(e)),
    "a sum and a little": lambda e: over(-1, jnp.sum)(e) + 1e-3,
    "the sum of a column": over(-2, jnp.sum),
    "the mean": over(-1, jnp.mean),
}
AFTER: Mapping[str, Apply] = {
    "as it is": lambda p: p,
    "halved twice": lambda p: (0.5 * p) * 2.0,
    "halved": lambda p: 0.5 * p,
    "squared": lambda p: p * p,
    "and a little": lambda p: p + 1e-3,
    "stopped": stopped,
}
SURE = set(
    itertools.product(
        ("as it is", "scaled"),
        ("the maximum", "nothing"),
        ("the sum",),
        ("as it is", "halved twice"),
    )
)
"""These are softmaxes, by one product of numbers more or less."""


@st.composite
def nearly(draw: Any) -> tuple[str, ...]:
    """One that is sure, with at most one part another."""
    how = list(draw(st.sampled_from(sorted(SURE))))
    at, parts = draw(st.integers(0, 3)), (BEFORE, SHIFT, TOTAL, AFTER)
    how[at] = draw(st.sampled_from(list(parts[at])))
    return tuple(how)


def softmax(how: tuple[str, ...], x: Any) -> Any:
    before, shift, total, after = how
    x = BEFORE[before](x)
    e = jnp.exp(x - SHIFT[shift](x))
    return AFTER[after](e / TOTAL[total](e))


@settings(max_examples=30, deadline=None)
@given(nearly())
def test_what_is_recognized_is_equal(how: tuple[str, ...]) -> None:
    with jax.enable_x64(True):
        step = partial(train_step, partial(by_hand, softmax=partial(softmax, how)))
        args = params_of(), inputs_of()
        traced = traced_bare(step, args, {}, make_options(donate=False))
        found = attended(traced, "recognized")
        assert bool(found.name) or how not in SURE
        if not found.name:
            return
        mesh = Mesh.of()
        subject = subject_of(found.traced)
        plan = search(subject, Request(mesh, AlphaBeta())).assignment
        run = jit_step(found.traced.program, plan, mesh, None)
        want = jax.tree.leaves(jax.jit(step)(*args))
        for a, b in zip(run(*jax.tree.leaves(args)), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
