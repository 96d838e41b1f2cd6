"""What runs in the loop, what before and after it, and what can not be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.models import build
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import TIME
from rhino_jax.ir.program import Program
from rhino_jax.search.subject import Subject
from rhino_jax.search.timing import Refusal, Timing, timing
from tests.search.steps import (
    BATCH,
    MLP_BATCH,
    WIDTH,
    f32,
    state_of,
    subject_of,
    updated,
    with_momentum,
)


def kinds(program: Program, indices: tuple[int, ...]) -> set[str]:
    return {program.ops[i].kind for i in indices}


def refused(loss: Callable[..., Any], batch: Any = None) -> str:
    """Why momentum on ``loss`` can not be cut."""
    params = {"w": f32(WIDTH, WIDTH), "scale": f32(WIDTH)}
    step = with_momentum(loss), state_of(params), batch or MLP_BATCH
    found = timing(subject_of(*step), BATCH, 2)
    assert isinstance(found, Refusal)
    return str(found)


def timed_loss(loss: Callable[..., Any], batch: Any = None) -> tuple[Subject, Timing]:
    params = {"w": f32(WIDTH, WIDTH), "scale": f32(WIDTH)}
    subject = subject_of(with_momentum(loss), state_of(params), batch or MLP_BATCH)
    found = timing(subject, BATCH, 2)
    assert not isinstance(found, Refusal), str(found)
    return subject, found


# ---- what is refused, and in which words --------------------------------------------


def normalized(params: Any, batch: Any) -> jax.Array:
    h = batch["x"] @ params["w"]
    h = (h - jnp.mean(h, axis=0)) * params["scale"]
    return jnp.mean(jnp.tanh(h) ** 2)


def contrastive(params: Any, batch: Any) -> jax.Array:
    h = batch["x"] @ params["w"]
    scores = h @ (batch["y"] @ params["w"]).T
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(scores)))


def ranked(params: Any, batch: Any) -> jax.Array:
    h = jnp.sort(batch["x"] @ params["w"], axis=0)
    return jnp.mean(h * params["scale"])


def rooted(params: Any, batch: Any) -> jax.Array:
    return jnp.sqrt(jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2))


def test_batch_norm_is_refused_by_name_and_line() -> None:
    text = refused(normalized)
    assert "reduce_sum at test_timing.py:" in text, text
    assert "sub at test_timing.py:" in text and "beside single examples" in text


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (contrastive, "dot_general at test_timing.py:"),
        (ranked, "sort at test_timing.py:"),
        (rooted, "combines the examples of all microbatches"),
    ],
)
def test_what_mixes_examples_is_refused(loss: Callable[..., Any], words: str) -> None:
    assert words in refused(loss)


def test_a_mixing_op_inside_a_body_is_named() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        def block(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.cumsum(x @ params["w"], axis=0), None

        x, _ = jax.lax.scan(block, batch["x"], None, length=3)
        return jnp.mean(x * params["scale"])

    text = refused(loss)
    assert "cumsum at test_timing.py:" in text and "in scan at" in text, text


def test_every_reason_is_named() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        return ranked(params, batch) + normalized(params, batch)

    assert refused(loss).count("\n  - ") == 2


def test_a_step_without_a_batch_is_refused() -> None:
    def step(state: Any, rate: Any) -> Any:
        return state * rate, {"norm": jnp.sum(state)}

    found = timing(subject_of(step, f32(4), f32()), 4, 2)
    assert isinstance(found, Refusal) and "leading dimension" in str(found)


def test_the_zoo() -> None:
    answers = {}
    for name in ("gpt_scanned", "t5", "resnet"):
        model = build(name)
        subject = subject_of(model.train_step, model.state_shapes, model.batch_shapes)
        answers[name] = timing(subject, subject.batch_size, 4)
    assert isinstance(answers["gpt_scanned"], Timing)
    assert isinstance(answers["t5"], Timing)
    assert "reduce_sum at resnet.py" in str(answers["resnet"])


# ---- before, in and after the loop --------------------------------------------------


def test_a_count_over_the_batch_is_known_before_the_loop() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        errors = jnp.sum((batch["x"] @ params["w"] - batch["y"]) ** 2, axis=-1)
        kept = batch["mask"] > 0
        return jnp.sum(jnp.where(kept, errors, 0.0)) / jnp.sum(kept)

    batch = {**MLP_BATCH, "mask": f32(BATCH)}
    subject, found = timed_loss(loss, batch)
    program = subject.program
    assert {"gt", "reduce_sum"} <= kinds(program, found.before)
    assert "dot_general" not in kinds(program, found.before)
    assert "dot_general" not in kinds(program, found.after)


def test_a_count_that_parameters_have_a_part_in_is_refused() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        h = batch["x"] @ params["w"]
        return jnp.sum(h**2) / jnp.sum(h > 0)

    assert "combines the examples" in refused(loss)


def test_products_with_examples_are_in_the_loop_and_updates_after_it() -> None:
    subject, found = timed_loss(
        lambda p, b: jnp.mean((jnp.tanh(b["x"] @ p["w"]) * p["scale"] - b["y"]) ** 2)
    )
    program = subject.program
    products = {i for i, op in enumerate(program.ops) if op.kind == "dot_general"}
    assert products <= set(found.loop)
    assert {*found.before, *found.loop, *found.after} == set(range(len(program.ops)))
    updates = {program.producer[program.outputs[o]] for _, o in subject.state_pairs}
    assert updates <= set(found.after)


def test_what_only_rows_are_read_of_is_made_row_by_row() -> None:
    """Dropout bits and a bias spread over the examples, also inside a scan."""

    def loss(params: Any, batch: Any) -> jax.Array:
        def block(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            h = x @ params["w"] + params["scale"]
            kept = jax.random.bernoulli(key, 0.5, h.shape)
            return x + jnp.where(kept, h, 0.0), None

        keys = jax.random.split(batch["key"], 3)
        x, _ = jax.lax.scan(block, batch["x"], keys[1:])
        kept = jax.random.bernoulli(keys[0], 0.5, x.shape)
        return jnp.mean(jnp.where(kept, x, 0.0) ** 2)

    key = jax.eval_shape(lambda: jax.random.key(0))
    subject, found = timed_loss(loss, {**MLP_BATCH, "key": key})
    plans: list[Any] = []

    def walk(program: Program, assignment: Assignment) -> None:
        for op, plan in zip(program.ops, assignment.ops, strict=True):
            if op.kind == "random_bits":
                plans.append(plan.choice)
            for body, inner in zip(op.programs, plan.inner, strict=True):
                walk(body, inner)

    walk(subject.program, found.assignment)
    assert len(plans) == 2 and all(choice.axes == (TIME,) for choice in plans)


def test_a_regularizer_is_added_after_the_loop() -> None:
    """A whole term is not counted once for every microbatch: it does not turn."""

    def loss(params: Any, batch: Any) -> jax.Array:
        errors = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        return errors + 0.1 * jnp.sum(params["w"] ** 2)

    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state["params"], batch)
        return updated(state, grads), {"loss": value}

    subject = subject_of(step, state_of({"w": f32(WIDTH, WIDTH)}), MLP_BATCH)
    found = timing(subject, BATCH, 2)
    assert isinstance(found, Timing)
    program = subject.program
    (loss_at,) = {*range(len(program.outputs))} - {*subject.pairs.values()}
    assert program.producer[program.outputs[loss_at]] in found.after
