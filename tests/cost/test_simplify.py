"""What compilers rewrite first: scatters into sums, places of pooled maxima; tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.cost.buffers import Unfolded, unfold
from rhino_jax.cost.fusion import fusion
from rhino_jax.cost.habits import HABITS, Habits
from rhino_jax.cost.instructions import NARROW, OPAQUE, PLACES, Instruction
from rhino_jax.cost.memory import Held, memory
from rhino_jax.cost.order import gradients_at_end, kept_at_end, side_inputs
from rhino_jax.cost.simplify import looked_up, simplified
from rhino_jax.cost.tiles import flat_bytes, tiled_bytes
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.steps import ALL_GATHER, ALL_REDUCE, Step
from rhino_jax.rules import rule_of
from tests.cost.plans import ONE, f32, planned, traced_whole, trained

TPU, GPU, CPU = HABITS["tpu"], HABITS["cuda"], HABITS["cpu"]


def unfolded_of(habits: Habits, fun: object, *args: object) -> Unfolded:
    found, assignment = traced_whole(fun, *args)
    return unfold(found, assignment, ONE, rule_of, (), habits)


def kinds(unfolded: Unfolded) -> list[str]:
    return [one.kind for one in unfolded.instructions]


def labelled(x: jax.Array, label: jax.Array) -> jax.Array:
    """A gradient of a cross entropy: softmax, less one at the label."""
    probabilities = jnp.exp(x)
    taken = jnp.zeros_like(x).at[label].add(-1.0)
    return taken + probabilities


def test_a_scatter_into_zeros_that_is_added_changes_the_sum_in_place() -> None:
    label = jax.ShapeDtypeStruct((4,), jnp.int32)
    found = unfolded_of(CPU, labelled, f32(256), label)
    assert not {"add", "add_any"} & {
        one.kind
        for one in found.instructions
        if found.buffers[one.writes[0]].num_bytes == 1024
    }
    (scatter,) = [x for x in found.instructions if x.kind == "scatter-add"]
    ((before, after),) = scatter.overwrites
    assert found.outputs == (after,)
    (made,) = [x for x in found.instructions if before in x.writes]
    assert made.kind == "exp"


def test_a_scatter_that_is_read_otherwise_stays() -> None:
    def kept(x: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        taken = jnp.zeros_like(x).at[label].add(-1.0)
        return taken + x, taken

    label = jax.ShapeDtypeStruct((4,), jnp.int32)
    found = unfolded_of(CPU, kept, f32(256), label)
    (scatter,) = [x for x in found.instructions if x.kind == "scatter-add"]
    at = found.instructions.index(scatter)
    assert "add" in kinds(found)[at + 1 :]


def pooled_loss(x: jax.Array) -> jax.Array:
    window = (1, 2, 2, 1)
    pooled = jax.lax.reduce_window(
        jnp.sin(x), -jnp.inf, jax.lax.max, window, window, "VALID"
    )
    return jnp.sum(pooled**2)


def test_a_gpu_keeps_the_places_of_pooled_maxima() -> None:
    x = f32(2, 8, 8, 4)
    gpu = unfolded_of(GPU, jax.grad(pooled_loss), x)
    (find,) = [one for one in gpu.instructions if one.kind == PLACES]
    count = 2 * 4 * 4 * 4  # windows
    # One float32 maximum and four 32-bit coordinates for each window.
    assert gpu.buffers[find.writes[0]].num_bytes == 4 * count * 5
    order = kinds(gpu)
    assert order.index(PLACES) < order.index("select_and_scatter_add")
    assert PLACES not in kinds(unfolded_of(TPU, jax.grad(pooled_loss), x))


def test_a_tpu_makes_what_products_read_as_they_go() -> None:
    def fun(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(x @ w)
        return h @ w, h.T @ x

    args = (f32(256, 256), f32(256, 256))
    written = {}
    for name, habits in (("gpu", GPU), ("tpu", TPU)):
        found = unfolded_of(habits, fun, *args)
        (tanh,) = [x for x in found.instructions if x.kind == "tanh"]
        written[name] = fusion(found, habits).written[tanh.writes[0]]
    assert written == {"gpu": True, "tpu": False}


def test_a_loop_s_stored_products_wait_for_its_end() -> None:
    def fun(w: jax.Array, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(c: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sin(c @ w), x.T @ c

        return jax.lax.scan(body, jnp.ones((64, 64)), xs)

    found = unfolded_of(GPU, fun, f32(64, 64), f32(8, 64, 64))
    (body,) = next(x.bodies for x in found.instructions if x.bodies)
    late = kept_at_end(body)
    assert {body.instructions[i].kind for i in late} == {"dot_general", "store"}
    assert set(late.values()) == {len(body.instructions) - 1}
    carried = [
        i
        for i, x in enumerate(body.instructions)
        if x.kind == "dot_general" and i not in late
    ]
    assert len(carried) == 1  # the carry's is needed in its place


@given(st.lists(st.integers(1, 300), max_size=4), st.sampled_from([1, 2, 4]))
def test_tiles_hold_the_array_and_waste_less_than_a_tile_a_row(
    shape: list[int], item_bytes: int
) -> None:
    flat = flat_bytes(tuple(shape), item_bytes, False)
    for of_window in (False, True):
        assert tiled_bytes(tuple(shape), item_bytes, of_window) >= flat
    # A convolution may choose among more orders: never worse.
    free = tiled_bytes(tuple(shape), item_bytes, True)
    assert free <= tiled_bytes(tuple(shape), item_bytes, False)
    full = (*(128 * n for n in shape), 128, 128)
    assert tiled_bytes(full, item_bytes) == math.prod(full) * item_bytes


@pytest.mark.parametrize(("platform", "padded"), [("tpu", True), ("cuda", False)])
def test_arguments_are_padded_on_a_tpu(platform: str, padded: bool) -> None:
    found, assignment = traced_whole(lambda x: x + 1, f32(130, 5))
    plain = replace(HABITS[platform], workspace_bytes=0)
    held = memory(found, assignment, ONE, rule_of, (), plain)
    assert held.input_bytes == (256 * 8 * 4 if padded else 130 * 5 * 4)


def trained_on(devices: int, habits: Habits) -> Unfolded:
    mesh = Mesh.of(data=devices)
    assignment = planned("data_parallel", mesh)
    return unfold(trained().program, assignment, mesh, rule_of, (), habits)


def test_gradients_to_be_reduced_wait_for_the_last_product() -> None:
    found = trained_on(4, GPU)
    products = [i for i, x in enumerate(found.instructions) if x.kind == "dot_general"]
    late = gradients_at_end(found)
    assert set(late.values()) == {products[-1]}
    reduced = {i for i, x in enumerate(found.instructions) if x.kind == ALL_REDUCE}
    assert reduced & set(late)
    # Every gradient of a weight, and no product of the backward pass itself.
    assert 0 < len(set(late) & set(products)) < len(products)
    early = replace(GPU, stores_last=False)
    at_once = Held(found, fusion(found, early), early).peak_bytes
    assert Held(found, fusion(found, GPU), GPU).peak_bytes >= at_once


def test_gradients_that_stay_on_one_device_do_not_wait() -> None:
    assert not gradients_at_end(trained_on(1, GPU))


def convolved(x: jax.Array, w: jax.Array) -> jax.Array:
    kept = jnp.tanh(x)
    one, two = (
        jax.lax.conv_general_dilated(
            y, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for y in (x, kept)
    )
    return jnp.sum(jnp.maximum(one + two, 0.0))


def test_the_later_of_two_convolutions_adds_the_other() -> None:
    found = unfolded_of(GPU, convolved, f32(2, 8, 8, 4), f32(3, 3, 4, 4))
    first, later = (
        i for i, x in enumerate(found.instructions) if x.kind == "conv_general_dilated"
    )
    (made,) = found.instructions[first].writes
    assert side_inputs(found) == {made: later}


def test_a_broadcast_literal_is_made_in_the_loop_that_reads_it() -> None:
    def fun(x: jax.Array) -> jax.Array:
        base = jnp.full(x.shape, 2.0)
        return jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ base), x)

    found = unfolded_of(GPU, fun, f32(64, 64))
    (full,) = [x.writes[0] for x in found.instructions if x.constant == 2.0]
    assert not fusion(found, GPU).written[full]


def masked(x: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
    """Three layers that add the same computed bias to a product."""
    for _ in range(3):
        added = bias[None] + jnp.where(mask, 0.0, -1e9)[:, None, :]
        x = jnp.tanh(jnp.einsum("bqd,bkd->bqk", x, x) + added)
    return x


def test_what_gpus_add_to_products_is_written_once_for_all() -> None:
    mask = jax.ShapeDtypeStruct((4, 64), jnp.bool_)
    args = f32(4, 64, 64), mask, f32(64, 64)

    def written(habits: Habits) -> set[int]:
        """What additions read beside products, of that which is written."""
        found = unfolded_of(habits, masked, *args)
        real = fusion(found, habits).written
        makers = [found.instructions[at].kind for at in found.writer]
        return {
            read
            for one in found.instructions
            if one.kind == "add" and any(makers[b] == "dot_general" for b in one.reads)
            for read in one.reads
            if makers[read] != "dot_general" and real[read]
        }

    assert len(written(GPU)) == 1 and not written(CPU)


def test_a_tpu_writes_what_is_stacked_for_a_product() -> None:
    def fun(x: jax.Array, y: jax.Array) -> jax.Array:
        vectors = jnp.stack([jnp.sin(x), jnp.sin(y)], axis=1)
        return jnp.einsum("bid,bjd->bij", vectors, vectors)

    found = unfolded_of(TPU, fun, f32(256, 128), f32(256, 128))
    (stack,) = [x for x in found.instructions if x.kind == "stack"]
    sines = [x for x in found.instructions if x.kind == "sin"]
    written = fusion(found, TPU).written
    assert written[stack.writes[0]]
    assert not any(written[one.writes[0]] for one in sines)


ROWS = 4096


def adagrad(
    table: jax.Array, sums: jax.Array, w: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A step on the rows of one table."""

    def loss(table: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(table[ids] @ w))

    gradient = jax.grad(loss)(table)
    sums = sums + jnp.square(gradient)
    scale = jnp.where(sums > 0, jax.lax.rsqrt(sums), jnp.float32(0))
    return table - scale * gradient, sums


def test_a_gpu_copies_zeros_that_are_selected_to_scatter_into() -> None:
    table, ids = f32(ROWS, 64), jax.ShapeDtypeStruct((256,), jnp.int32)
    args = table, table, f32(64, 64), ids
    alone = unfolded_of(GPU, adagrad, *args)
    assert not alone.pinned  # nothing is sent: table by table
    found = simplified(sending(unfolded_of(CPU, adagrad, *args)), GPU)
    (scatter,) = [x for x in found.instructions if x.kind == "scatter-add"]
    (select,) = [
        x
        for x in found.instructions
        if x.kind == "select_n"
        and found.buffers[x.writes[0]].num_bytes == ROWS * 64 * 4
    ]
    (zeros,) = {*select.reads} & {*found.pinned}
    assert scatter.reads[0] in found.pinned and scatter.reads[0] != zeros
    written = fusion(found, GPU).written
    assert written[zeros] and written[scatter.reads[0]]
    forward, backward = (
        i for i, x in enumerate(found.instructions) if x.kind == "dot_general"
    )
    assert forward < found.writer[zeros] < backward
    assert not simplified(sending(unfolded_of(CPU, adagrad, *args)), TPU).pinned


def test_zeros_that_a_gpu_s_loop_begins_with_are_those_that_are_selected() -> None:
    # As compiled: one broadcast ahead of the loop, a copy of it for the carry.
    def step(
        table: jax.Array, sums: jax.Array, xs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def body(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return total + jnp.tanh(x), None

        gradient, _ = jax.lax.scan(body, jnp.zeros_like(table), xs)
        sums = sums + jnp.square(gradient)
        scale = jnp.where(sums > 0, jax.lax.rsqrt(sums), jnp.zeros_like(sums))
        return table - scale * gradient, sums

    args = f32(ROWS, 64), f32(ROWS, 64), f32(4, ROWS, 64)
    found = unfolded_of(GPU, step, *args)
    (loop,) = (i for i, x in enumerate(found.instructions) if x.bodies)
    (select,) = (x for x in found.instructions if x.kind == "select_n")
    (zeros,) = {*select.reads} & {*found.pinned}
    assert found.writer[zeros] < loop
    assert zeros not in found.instructions[loop].reads  # the carry is a copy
    held = Held(found, fusion(found, GPU), GPU)
    assert held.born[zeros] < loop < held.dies[zeros]
    assert not unfolded_of(TPU, step, *args).pinned


def test_a_scatter_into_something_is_a_scatter_into_the_sum() -> None:
    def fun(x: jax.Array, y: jax.Array, label: jax.Array) -> jax.Array:
        return x + jnp.sin(y).at[label].add(-1.0)

    label = jax.ShapeDtypeStruct((4,), jnp.int32)
    found = unfolded_of(GPU, fun, f32(256), f32(256), label)
    assert found.instructions[-1].kind == "scatter-add"
    (scatter,) = (x for x in found.instructions if x.kind == "scatter-add")
    ((before, after),) = scatter.overwrites
    assert found.instructions[found.writer[before]].kind == "add"
    assert found.outputs == (after,)


def rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.tanh(table[ids].astype(jnp.bfloat16))


def test_a_tpu_s_look_up_in_a_loop_is_narrow_and_a_kernel_of_its_own() -> None:
    ids = jax.ShapeDtypeStruct((256,), jnp.int32)
    plain = unfolded_of(TPU, rows_of, f32(ROWS, 64), ids)
    found = looked_up(plain)
    (gather,) = (x for x in found.instructions if x.kind == "gather")
    (rows,) = gather.writes
    assert found.buffers[rows].item_bytes == 2
    assert fusion(found, TPU).written[rows] and not fusion(plain, TPU).written[rows]
    assert "convert_element_type" not in kinds(found)


def test_a_table_that_is_gathered_for_a_look_up_is_converted_before() -> None:
    # As compiled for v5e: bf16[625000,128] convert, then the all-gather.
    ids = jax.ShapeDtypeStruct((256,), jnp.int32)
    plain = unfolded_of(TPU, rows_of, f32(ROWS, 64), ids)
    (table, *_), whole = plain.inputs, len(plain.buffers)
    shard = replace(plain.buffers[table], num_bytes=plain.buffers[table].num_bytes // 4)
    step = Step(ALL_GATHER, ("x",), Layout.of([("x", 1)], []), Layout.of([], []), 8)
    first = plain.instructions[0]
    bring = replace(first, kind=ALL_GATHER, role=OPAQUE, step=step, overwrites=())
    bring = replace(bring, reads=(table,), writes=(whole,))
    buffers = [*plain.buffers, plain.buffers[table]]
    buffers[table] = shard
    read = tuple(
        replace(x, reads=tuple(whole if b == table else b for b in x.reads))
        for x in plain.instructions
    )
    found = looked_up(
        replace(plain, buffers=tuple(buffers), instructions=(bring, *read))
    )
    assert kinds(found)[:2] == [NARROW, ALL_GATHER]
    (narrow,), (brought,) = (x.writes for x in found.instructions[:2])
    assert found.instructions[1].reads == (narrow,)
    assert found.buffers[narrow].num_bytes == shard.num_bytes // 2
    assert found.buffers[brought].num_bytes == 4 * found.buffers[narrow].num_bytes


def sending(unfolded: Unfolded) -> Unfolded:
    """With an all-reduce of an input at its end."""
    layout = Layout((), (("x", "sum"),))
    step = Step(ALL_REDUCE, ("x",), layout, Layout(()), 8)
    last = unfolded.instructions[-1]
    made = len(unfolded.buffers)
    buffers = (*unfolded.buffers, unfolded.buffers[unfolded.inputs[-1]])
    sent = Instruction(
        ALL_REDUCE,
        OPAQUE,
        (unfolded.inputs[-1],),
        (made,),
        last.program,
        last.index,
        step=step,
    )
    return replace(
        unfolded, buffers=buffers, instructions=(*unfolded.instructions, sent)
    )
