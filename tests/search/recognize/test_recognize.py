"""What is attention, and what only looks like it."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.models import build
from rhino_jax.api.attending import constants_of
from rhino_jax.ir.program import Program
from rhino_jax.rules.attention import BACKWARD, FORWARD, Attention
from rhino_jax.search.recognize import Bytes, Recognized, recognize
from rhino_jax.trace import trace
from tests import attentions
from tests.attentions import (
    IN_GROUPS,
    NEAR_MISSES,
    WRITTEN,
    inputs_of,
    params_of,
    scanned_step,
    train_step,
)


def recognized(step: Any, *args: Any) -> Recognized:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    traced = trace(step, shapes)
    return recognize(traced.program, constants_of(traced))


def kinds(program: Program) -> list[str]:
    return sorted(op.kind for _, op in program.walk() if op.kind in (FORWARD, BACKWARD))


def squares(program: Program, length: int) -> list[str]:
    """Ops that make an array as large as scores."""
    return [
        op.kind
        for inner, op in program.walk()
        for v in op.results
        if inner.values[v].shape[-2:] == (length, length)
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WRITTEN)
def test_attention_is_recognized(name: str, dtype: Any) -> None:
    """Both halves, and nothing of the scores' size is left."""
    args = params_of(dtype=dtype), inputs_of(dtype=dtype)
    found = recognized(partial(train_step, WRITTEN[name]), *args)
    assert (found.count, found.softmaxes) == (1, 1)
    assert kinds(found.program) == [BACKWARD, FORWARD]
    assert squares(found.program, 16) == []
    op = next(op for op in found.program.ops if op.kind == FORWARD)
    about = Attention.of(op)
    assert about.causal == (name not in ("all seen", "heads merged"))
    assert about.window == (5 if "window" in name else None)
    assert about.scale == pytest.approx(
        1.0 if name in ("mask added", "heads merged", "linen") else 8**-0.5, rel=1e-3
    )


@pytest.mark.parametrize("name", IN_GROUPS)
def test_heads_that_share_keys(name: str) -> None:
    step = partial(train_step, IN_GROUPS[name])
    found = recognized(step, params_of(8, 2), inputs_of())
    assert (found.count, squares(found.program, 16)) == (1, [])
    op = next(op for op in found.program.ops if op.kind == FORWARD)
    shapes = [found.program.values[v].shape[2] for v in op.operands[:3]]
    assert shapes == [8, 2, 2]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_what_they_are(name: str) -> None:
    step = partial(train_step, NEAR_MISSES[name])
    found = recognized(step, params_of(), inputs_of())
    assert (found.count, kinds(found.program)) == (0, [])


def test_probabilities_that_are_returned() -> None:
    def step(params: Any, x: Any) -> Any:
        def loss_of(params: Any) -> Any:
            q, k, v = attentions.projected(x, params)
            p = jax.nn.softmax(jnp.einsum("bthd,buhd->bhtu", q, k))
            return jnp.sum(jnp.einsum("bhtu,buhe->bthe", p, v) ** 2), p

        (_, p), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return grads, p

    found = recognized(step, params_of(), inputs_of())
    assert (found.count, found.softmaxes) == (0, 1)


def test_one_of_two() -> None:
    """What hinders one attention leaves the other alone."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        first = attentions.by_hand(q, k, v)
        return attentions.entropy(first, k, v)

    found = recognized(partial(train_step, attend), params_of(), inputs_of())
    assert (found.count, found.softmaxes) == (1, 2)
    assert kinds(found.program) == [BACKWARD, FORWARD]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", ["by hand", "linen", "jax", "mask added"])
def test_layers_in_a_scan(name: str, remat: bool) -> None:
    """Without remat the forward loop hands its result to the reverse one, no scores."""
    step = partial(scanned_step, WRITTEN[name], remat)
    found = recognized(step, params_of(layers=3), inputs_of())
    again = 1 if remat else 0
    assert (found.count, found.softmaxes) == (1 + again, 1 + again)
    assert kinds(found.program) == [BACKWARD, *[FORWARD] * (1 + again)]
    assert squares(found.program, 16) == []
    each = 2 * 4 * 16 * 16 * 4
    assert found.scores == Bytes(3 * (1 + again) * each, each)


@pytest.mark.parametrize("changed", [False, True])
def test_a_mask_that_comes_with_the_trace(changed: bool) -> None:
    """Made by numpy outside the step; one element other, it is no causal mask."""
    mask = np.tril(np.ones((16, 16), bool))
    mask[9, 4] ^= changed
    attend = partial(attentions.by_hand, mask=lambda scores: jnp.asarray(mask))
    found = recognized(partial(train_step, attend), params_of(), inputs_of())
    assert found.count == (not changed)


def test_a_forward_pass_alone() -> None:
    found = recognized(attentions.by_hand, *[jnp.zeros((2, 16, 4, 8))] * 3)
    assert (found.count, kinds(found.program)) == (1, [FORWARD])


@pytest.mark.parametrize(
    ("model", "count"),
    [("gpt_unrolled", 2), ("gpt_scanned", 1), ("vit", 2), ("t5", 0)],
)
def test_models_of_the_zoo(model: str, count: int) -> None:
    """T5 adds a learnt bias to its scores, which is left as it is."""
    made = build(model, size="tiny")
    found = recognized(made.train_step, made.state_shapes, made.batch_shapes)
    assert found.count == count


def test_multi_head_attention_of_linen() -> None:
    """With dropout on probabilities it is none."""

    def step(rate: float, params: Any, x: Any) -> Any:
        module = nn.MultiHeadDotProductAttention(
            4, dropout_rate=rate, deterministic=not rate
        )
        mask = nn.make_causal_mask(x[..., 0])
        keys = {"dropout": jax.random.key(0)}

        def loss_of(params: Any) -> Any:
            return jnp.sum(module.apply(params, x, mask=mask, rngs=keys) ** 2)

        return jax.grad(loss_of)(params)

    x = jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)
    shapes = jax.eval_shape(
        nn.MultiHeadDotProductAttention(4).init, jax.random.key(0), x
    )
    assert recognized(partial(step, 0.0), shapes, x).count == 1
    assert recognized(partial(step, 0.1), shapes, x).count == 0


# ---- masks, at random --------------------------------------------------------------

LENGTH = 12


@st.composite
def masks(draw: Any) -> tuple[bool, Any]:
    """A mask by iotas, mostly none that is known, and whether it goes by distance."""
    shift, step = draw(st.integers(-2, 2)), draw(st.sampled_from([1, 1, 1, 2]))
    width = draw(st.integers(1, LENGTH))
    join = draw(st.sampled_from(["and", "or", "alone", "not"]))

    def mask() -> Any:
        i = jax.lax.broadcasted_iota(jnp.int32, (LENGTH, LENGTH), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (LENGTH, LENGTH), 1)
        ahead, near = i + shift >= step * j, i - j < width
        return {
            "and": ahead & near,
            "or": ahead | near,
            "alone": ahead,
            "not": ~(ahead & near),
        }[join]

    return step == 1, mask


@settings(max_examples=40, deadline=None)
@given(masks())
def test_a_mask_is_known_or_left(drawn: tuple[bool, Any]) -> None:
    """Evaluated in full, a recognized mask is the one that the op stands for."""
    by_distance, mask = drawn

    def forward(q: Any, k: Any, v: Any) -> Any:
        return attentions.by_hand(q, k, v, mask=lambda scores: mask())

    found = recognized(forward, *[jnp.zeros((2, LENGTH, 4, 8))] * 3)
    seen = mask()
    i, j = jnp.indices((LENGTH, LENGTH))
    windows = [(j <= i) & (i - j < w) for w in range(1, LENGTH + 1)]
    known = any(bool(jnp.array_equal(seen, one)) for one in [*windows, seen | True])
    assert found.count == known or not (found.count or by_distance)
    if found.count:
        about = Attention.of(next(o for o in found.program.ops if o.kind == FORWARD))
        means = (j <= i) | (not about.causal)
        means &= (i - j < about.window) if about.window else True
        assert bool(jnp.array_equal(means, seen))
