"""A vocabulary split over devices: the plan that is written for it by hand.

The cross-entropy sends what one number a token takes, never logits; the embedding is a
masked lookup whose terms are summed once; the gradients of both stay where the
parameters are (Shoeybi et al., "Megatron-LM", 2019, section 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rhino_jax as rhino
from rhino_jax.ir.mesh import Mesh
from rhino_jax.plan import make_plan
from rhino_jax.search.planner import Found, Request, search
from rhino_jax.search.prices import AlphaBeta
from rhino_jax.search.specs import Spec
from rhino_jax.search.subject import Subject
from rhino_jax.sent import collectives
from tests.search.steps import f32, made, subject_of

BATCH, LENGTH, WIDTH, VOCAB = 8, 16, 32, 4096
TOKENS, FLOAT = BATCH * LENGTH, 4
SPLIT: dict[str, Spec] = {"embed": (("tensor",),), "head": ((), ("tensor",))}

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def log_softmax(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logs, targets[..., None], -1))


def log_sum(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def one_hot(logits: jax.Array, targets: jax.Array) -> jax.Array:
    marks = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(marks * jax.nn.log_softmax(logits), -1))


def from_optax(logits: jax.Array, targets: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses)


def product(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"])


def block(params: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def step_of(
    loss: Loss, tied: bool = False, looked_up: bool = True, inside: Any = product
) -> Any:
    """Embedding, what is ``inside``, head and cross-entropy, by plain descent."""

    def loss_of(params: Any, batch: Any) -> jax.Array:
        table = params["embed"]
        marks = jax.nn.one_hot(batch["x"], len(table), dtype=table.dtype)
        x = table[batch["x"]] if looked_up else marks @ table
        x = inside(params, x)
        return loss(x @ (table.T if tied else params["head"]), batch["t"])

    def step(params: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        return jax.tree.map(lambda p, g: p - g, params, grads), value

    return step


def args_of(tied: bool = False) -> tuple[Any, Any]:
    params = {"embed": f32(VOCAB, WIDTH), "w": f32(WIDTH, WIDTH)}
    if not tied:
        params["head"] = f32(WIDTH, VOCAB)
    words = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return params, {"x": words, "t": words}


def found(step: Any, args: Any, pins: Any, **mesh: int) -> tuple[Subject, Found]:
    """What is cheapest where collectives cost their bytes and nothing is done twice."""
    subject = subject_of(step, *args)
    request = Request(Mesh.of(**mesh), AlphaBeta(), replicate_heavy=False, pins=pins)
    return subject, search(subject, request)


def sent(subject: Subject, assignment: Any, mesh: Mesh) -> Counter[tuple[Any, ...]]:
    """Bytes a device sends in a step, by kind, axes and elements of the whole value.

    Scalars are left out.
    """
    bytes_of: Counter[tuple[Any, ...]] = Counter()
    for one in collectives(subject.program, assignment, mesh):
        if one.shape:
            what = one.kind, *one.axes, int(np.prod(one.shape))
            bytes_of[what] += one.count * one.wire_bytes
    return bytes_of


@pytest.mark.parametrize("loss", [log_softmax, log_sum, one_hot, from_optax])
@pytest.mark.parametrize("form", ["plain", "tied", "marks"])
def test_only_what_a_token_has_one_of_is_reduced(loss: Loss, form: str) -> None:
    """Maximum and sum of exponentials, [tokens] each; of the picked logit only the mean
    is, a scalar. The lookup's terms are summed once, to columns of the width."""
    tied = form == "tied"
    step, n = step_of(loss, tied, form != "marks"), 8
    pins = {name: spec for name, spec in SPLIT.items() if name != "head" or not tied}
    subject, answer = found(step, args_of(tied), pins, tensor=n)
    rows, square = FLOAT * TOKENS * WIDTH * (n - 1) // n, WIDTH * WIDTH
    number = 2 * FLOAT * TOKENS * (n - 1) // n
    assert sent(subject, answer.assignment, Mesh.of(tensor=n)) == {
        ("all-reduce", "tensor", TOKENS): 2 * number,
        # The lookup, and the head's cotangent: each a sum of terms.
        ("reduce-scatter", "tensor", TOKENS * WIDTH): 2 * rows,
        # What the head reads; and the lookup's cotangent, for rows of the table.
        ("all-gather", "tensor", TOKENS * WIDTH): 2 * rows,
        ("all-reduce", "tensor", square): 2 * FLOAT * square * (n - 1) // n,
    }
    place = subject.output_paths.index("0/embed")
    assert str(answer.assignment.outputs[place]) == f"[tensor/{VOCAB // n},-]"


def test_the_recipe_writes_the_same() -> None:
    """By Megatron's recipe, the batch split too: nothing as wide as the vocabulary is
    sent over ``tensor``, and its gradients are summed over ``data`` where they lie."""
    data, tensor = 2, 4
    params, batch = args_of()
    params |= {"up": f32(WIDTH, 4 * WIDTH), "down": f32(4 * WIDTH, WIDTH)}
    step = step_of(log_softmax, inside=block), params, batch
    plan = made(step, "megatron", data=data, tensor=tensor)
    assert plan.input("params/embed") == f"[tensor/{VOCAB // tensor},-]"
    assert plan.input("params/head") == f"[-,tensor/{VOCAB // tensor}]"
    each = sent(plan.subject, plan.assignment, plan.mesh)
    over_tensor = {what: n for what, n in each.items() if "tensor" in what}
    number = 2 * FLOAT * TOKENS // data * (tensor - 1) // tensor
    assert over_tensor["all-reduce", "tensor", TOKENS] == 2 * number
    assert max(elements for *_, elements in over_tensor) == TOKENS * WIDTH
    gradient = 2 * FLOAT * VOCAB // tensor * WIDTH * (data - 1) // data
    assert each["all-reduce", "data", VOCAB * WIDTH] == 2 * gradient


@pytest.mark.parametrize("loss", [log_sum, from_optax])
@pytest.mark.parametrize("tied", [False, True])
def test_zeros_to_scatter_into_are_made_in_parts(loss: Loss, tied: bool) -> None:
    """Those of the picked logits, and of the table, where they are one term of a sum:
    made whole and sliced they would be the largest array of the program."""
    params, batch = args_of(tied)
    params |= {"up": f32(WIDTH, 4 * WIDTH), "down": f32(4 * WIDTH, WIDTH)}
    step = step_of(loss, tied, inside=block), params, batch
    plan = made(step, "megatron", data=2, tensor=4)
    program, assignment = plan.subject.program, plan.assignment
    zeros = {
        op.results[0]: op_plan
        for op, op_plan in zip(program.ops, assignment.ops, strict=True)
        if op.kind == "broadcast_in_dim"
        and VOCAB in program.values[op.results[0]].shape
    }
    scattered = [op for op in program.ops if op.kind == "scatter-add"]
    assert sum(op.operands[0] in zeros for op in scattered) >= 2
    for op in scattered:
        if op.operands[0] in zeros:
            assert "tensor" in zeros[op.operands[0]].choice.axes
    whole = [m for m in assignment.moves() if m.steps and m.steps[0].kind == "slice"]
    assert not {m.value for m in whole} & set(zeros)


def test_a_table_converted_at_each_look_up_is_gathered_once() -> None:
    """By ZeRO's recipe: compilers see that the two are equal, so the plan must."""

    def loss_of(params: Any, batch: Any) -> jax.Array:
        half = jnp.bfloat16
        x = params["embed"].astype(half)[batch["x"]]
        y = params["embed"].astype(half)[batch["t"]]
        return jnp.mean(jnp.tanh(x @ params["w"].astype(half)) * y)

    def step(params: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        return jax.tree.map(lambda p, g: p - g, params, grads), value

    plan = made((step, *args_of(tied=True)), "zero3", data=4)
    gathered = [c for c in plan.sent if c.kind == "all-gather"]
    assert sum(c.count for c in gathered if c.shape == (VOCAB, WIDTH)) == 1


def test_it_is_the_undecorated_step(x64: None) -> None:
    mesh = {"data": 2, "tensor": 4}
    rng = np.random.default_rng(0)
    vocab, step = 64, step_of(log_softmax)
    params = {
        "embed": rng.normal(size=(vocab, WIDTH)),
        "w": rng.normal(size=(WIDTH, WIDTH)) / 4,
        "head": rng.normal(size=(WIDTH, vocab)) / 4,
    }
    words = rng.integers(0, vocab, (2, BATCH, LENGTH))
    batch = {"x": words[0], "t": words[1]}
    pins: dict[str, Spec] = {**SPLIT, "batch/x": (("data",),), "batch/t": (("data",),)}
    subject, answer = found(step, (params, batch), pins, **mesh)
    paths = subject.input_paths, subject.output_paths
    plan = make_plan(subject.program, answer.assignment, Mesh.of(**mesh), *paths)
    run = rhino.auto_parallel(plan=plan, mesh=mesh, donate=False)(step)
    got, want = run(params, batch), jax.jit(step)(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)
