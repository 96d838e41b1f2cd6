"""What a TPU's kernels write: labels, guests of products, and what shares a pass.

Each rule was read off programs compiled for v5e and v5p (libtpu 0.0.42); the small
programs here are those, without their models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.cost.buffers import Unfolded, unfold
from rhino_jax.cost.fusion import fusion
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.memory import Held
from rhino_jax.cost.order import JOINED_BYTES, look_ups_at
from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.steps import ALL_GATHER, Move, Step
from rhino_jax.rules import rule_of
from tests.cost.plans import ONE, f32, program, traced_whole, whole

TPU, GPU = HABITS["tpu"], HABITS["cuda"]
ROWS, WIDTH, WORDS = 256, 128, 1024


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def unfolded_of(fun: Any, *args: Any) -> Unfolded:
    found, assignment = traced_whole(fun, *args)
    return unfold(found, assignment, ONE, rule_of, (), TPU)


def indices(unfolded: Unfolded, kind: str) -> list[int]:
    return [i for i, x in enumerate(unfolded.instructions) if x.kind == kind]


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """A cross entropy in float32."""
    logits = logits.astype(jnp.float32)
    taken = jnp.take_along_axis(logits, labels, axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(taken, axis=-1))


@pytest.mark.parametrize(("labels", "scatters"), [(1, 0), (4, 1)])
def test_a_scatter_of_one_element_to_each_row_is_a_selection(
    labels: int, scatters: int
) -> None:
    found = unfolded_of(jax.grad(loss), bf16(ROWS, WORDS), i32(ROWS, labels))
    assert len(indices(found, "scatter-add")) == scatters


def test_logits_in_float32_are_written_for_the_look_up_alone() -> None:
    def step(x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
        return loss(x @ w, labels)

    found = unfolded_of(step, bf16(ROWS, WIDTH), bf16(WIDTH, WORDS), i32(ROWS, 1))
    fused = fusion(found, TPU)
    held = Held(found, fused, TPU)
    (product,) = indices(found, "dot_general")
    (logits,) = found.instructions[product].writes
    wide = [
        b
        for b, at in enumerate(found.writer)
        if at >= 0 and found.buffers[b].num_bytes == 4 * ROWS * WORDS
    ]
    (written,) = [b for b in wide if fused.written[b]]
    # The product writes both; nothing later reads the wide one.
    assert held.born[logits] == held.born[written] == held.dies[written] == product
    assert held.dies[logits] > product
    (row_maxima,) = indices(found, "reduce_max")
    assert set(fused.sources[found.instructions[row_maxima].reads[0]]) == {logits}


@pytest.mark.parametrize("joined", [True, False])
def test_what_only_the_loss_looks_up_is_written_with_the_gradient(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        shifted = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(shifted, labels, axis=-1))

    def step(logits: jax.Array, labels: jax.Array) -> object:
        return jax.value_and_grad(loss)(logits, labels)

    found = unfolded_of(step, bf16(ROWS, WORDS), i32(ROWS, 1))
    most = JOINED_BYTES if joined else 4 * ROWS * WORDS - 1
    monkeypatch.setattr("rhino_jax.cost.order.JOINED_BYTES", most)
    fused = fusion(found, TPU)
    places = look_ups_at(found, fused, ())
    gradient = found.writer[found.outputs[1]]
    assert [*places.values()] == ([gradient] if joined else [])


def gated(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    h = jax.nn.silu(x @ gate) * (x @ up)
    return jnp.sum(jnp.sin(h @ down))


@pytest.mark.parametrize("remade", [2, 0])
def test_what_two_products_read_is_made_by_both(remade: int) -> None:
    w = f32(WIDTH, WIDTH)
    found = unfolded_of(jax.grad(gated, argnums=(1, 2, 3)), f32(ROWS, WIDTH), w, w, w)
    written = fusion(found, replace(TPU, remade=remade)).written
    readers = [
        {found.instructions[i].kind for i in found.readers[b]}
        for b, one in enumerate(found.buffers)
        if written[b]
        and found.writer[b] >= 0
        and found.instructions[found.writer[b]].kind == "mul"
        and one.num_bytes == 4 * ROWS * WIDTH
        and len(found.readers[b]) == 2
    ]
    assert readers.count({"dot_general"}) == (0 if remade else 1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqd,bkd->bqk", q, k) + bias
    return jnp.sum(jnp.sin(jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v)))


@pytest.mark.parametrize("learned", [True, False])
def test_probabilities_are_written_beside_the_gradient_of_a_bias(learned: bool) -> None:
    x, bias = f32(64, 128, 128), f32(128, 128)
    argnums = (0, 1, 2, 3) if learned else (0, 1, 2)
    found = unfolded_of(jax.grad(attention, argnums=argnums), x, x, x, bias)
    fused = fusion(found, TPU)
    kinds = [found.instructions[at].kind for at in fused.beside]
    assert kinds == (["div"] if learned else [])
    for maker, index in fused.beside.items():
        (probabilities,) = found.instructions[maker].writes
        held = Held(found, fused, TPU)
        assert held.born[probabilities] == index


def test_rows_of_a_table_are_written_where_several_read_them() -> None:
    def step(table: jax.Array, ids: jax.Array, w: jax.Array) -> jax.Array:
        x = jax.lax.optimization_barrier(table)[ids] + 1.0
        return jnp.sum(jnp.tanh(x @ w) * x)

    found = unfolded_of(step, f32(WORDS, WIDTH), i32(ROWS), f32(WIDTH, WIDTH))
    (product,) = indices(found, "dot_general")
    x = found.instructions[product].reads[0]
    assert len(found.readers[x]) == 2
    assert fusion(found, TPU).written[x]
    assert not fusion(found, replace(TPU, looks_up=False)).written[x]


def test_what_waits_for_a_weight_that_is_gathered_again_is_written() -> None:
    # sin(cotangent) is read by a product: a TPU makes it there, but for the barrier.
    mesh, split = Mesh.of(d=4), Layout.of([("d", 64)], [])
    whole_weight = Layout.replicated(2)
    shape = (256, 256)
    ops = [
        ("mystery", (0,), (2,)),
        ("sin", (2,), (3,)),
        (
            "dot_general",
            (3, 1),
            (4,),
            (("dimension_numbers", (((1,), (0,)), ((), ()))),),
        ),
    ]
    of = program([shape] * 5, (0, 1), ops, (4,))
    step = Step(ALL_GATHER, ("d",), split, whole_weight, 3 * 4 * 64 * 256)
    plain = whole(of)
    for again in (False, True):
        gather = Move(1, split, whole_weight, (step,), again=again)
        plans = (OpPlan(), OpPlan(), OpPlan(before=(gather,)))
        assignment = Assignment((whole_weight, split), plain.outputs, plans)
        found = unfold(of, assignment, mesh, rule_of, (), TPU)
        (sine,) = (x.writes[0] for x in found.instructions if x.kind == "sin")
        assert fusion(found, TPU).written[sine] == again
