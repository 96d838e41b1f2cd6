"""Sizes that do not divide: what may be padded is, what may not is not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.ir.assignment import Assignment, boundary
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.rules import rule_of
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Wish
from rhino_jax.search.domains import ALIGNED, LONG
from rhino_jax.search.notes import plan_notes
from rhino_jax.search.planner import Request, energy_of, read, search
from rhino_jax.search.prices import AlphaBeta
from tests.search.steps import f32, subject_of

MESH = Mesh.of(x=4)
ROWS, WIDTH, CLASSES = 64, 64, 1001


def step(params: Any, batch: Any) -> Any:
    """Classes that divide by nothing, and are many beside the rows."""

    def loss_of(params: Any) -> Any:
        scores = jnp.tanh(batch["x"] @ params["up"]) @ params["head"]
        logs = jax.nn.log_softmax(scores)
        picked = jnp.take_along_axis(logs, batch["labels"][:, None], axis=1)
        return -jnp.mean(picked)

    grads = jax.grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - g, params, grads)


def given(rows: int = ROWS, classes: int = CLASSES, width: int = WIDTH) -> Any:
    params = {"up": f32(width, width), "head": f32(width, classes)}
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return subject_of(step, params, {"x": f32(rows, width), "labels": labels})


def results(program: Program, assignment: Assignment) -> list[tuple[int, Layout]]:
    """For every op its first result's (size of the last dimension, layout)."""
    found = []
    for op, plan in zip(program.ops, assignment.ops, strict=True):
        _, made = boundary(program, op, plan, rule_of(program, op))
        shape = program.values[op.results[0]].shape
        if shape:
            found.append((shape[-1], made[0]))
    return found


def padded(subject: Any, assignment: Assignment) -> list[Layout]:
    return [
        layout
        for size, layout in results(subject.program, assignment)
        if layout.dims[-1] and layout.dims[-1][0].stride * 4 > size
    ]


def found(subject: Any, even: bool = False) -> Assignment:
    request = Request(MESH, AlphaBeta(), replicate_heavy=False, even=even)
    return search(subject, request).assignment


def test_classes_are_padded_inside_and_nothing_that_is_stored_is() -> None:
    subject = given()
    assignment = found(subject)
    assert padded(subject, assignment)
    shapes = subject.program.shapes
    for layouts, values in (
        (assignment.inputs, subject.program.inputs),
        (assignment.outputs, subject.program.outputs),
    ):
        for layout, shape in zip(layouts, shapes(values), strict=True):
            assert not layout.ragged_dims(shape, MESH)


def test_the_plan_says_what_is_padded() -> None:
    subject = given()
    notes = plan_notes(subject.program, found(subject), MESH)
    assert notes == (f"uneven: {CLASSES} as 4 × 251",)
    even = given(classes=1000)
    assert plan_notes(even.program, found(even), MESH) == ()


def test_without_padding_the_same_step_sends_more() -> None:
    subject = given()
    ticks = {
        even: search(
            subject, Request(MESH, AlphaBeta(), replicate_heavy=False, even=even)
        ).answer.ticks
        for even in (False, True)
    }
    assert not padded(subject, found(subject, even=True))
    assert ticks[False] < ticks[True]


def test_long_dimensions_are_padded_to_aligned_shards() -> None:
    long = 4 * LONG + 1
    subject = given(classes=long)
    strides = {x.dims[-1][0].stride for x in padded(subject, found(subject))}
    assert strides == {LONG + ALIGNED}


@pytest.mark.parametrize("size", [2, 1])
def test_fewer_elements_than_pads_are_left_whole(size: int) -> None:
    subject = given(classes=size)
    request = Request(MESH, AlphaBeta())
    energy = energy_of(read(subject), request)
    for kind in energy.kinds:
        for slot in kind.options("x"):
            assert slot is None or slot[2][1] != size


def test_what_is_run_in_microbatches_is_not_padded() -> None:
    rows = 3 * 16001
    subject = given(rows, CLASSES - 1, width=1024)
    cluster = parse_cluster("h100:1x4")

    def notes(microbatches: int) -> tuple[str, ...]:
        best = plan_search(subject, Wish(cluster, (MESH,), 2**40, 1, microbatches)).best
        return plan_notes(subject.program, best.assignment, MESH)

    assert any(f"{rows} as 4" in note for note in notes(1))
    assert notes(3) == ()


def test_rows_that_powers_of_two_do_not_divide_are_cut_otherwise() -> None:
    """24 examples, 3 on each of 8 devices, where there is no memory for all of them."""

    def loss_of(params: Any, batch: Any) -> Any:
        hidden = batch["x"]
        for w in params:
            hidden = jnp.tanh(hidden @ w)
        return jnp.mean(hidden**2)

    def train(params: Any, batch: Any) -> Any:
        grads = jax.grad(loss_of)(params, batch)
        return [p - g for p, g in zip(params, grads, strict=True)]

    subject = subject_of(train, [f32(64, 64)] * 6, {"x": f32(24, 4097, 64)})
    cluster, mesh = parse_cluster("h100:1x8"), Mesh.of(x=8)

    def best(limit_bytes: int, microbatches: int = 0) -> Any:
        wish = Wish(cluster, (mesh,), limit_bytes, 1, microbatches, "none")
        return plan_search(subject, wish).best

    peaks = [best(2**60, n).prediction.peak_bytes for n in (1, 3)]
    assert best(sum(peaks) // 2).microbatches == 3
