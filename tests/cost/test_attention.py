"""Attention's arithmetic against a count of pairs; what a ring sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rhino_jax.cost.attention import attention_flops
from rhino_jax.cost.handed import handed_on
from rhino_jax.ir.factors import Choice, choice_problems
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import TIME, Axis, Mesh
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.attention import BACKWARD, FORWARD, attention

BATCH, ROWS, HEADS, GROUP, DEPTH = 2, 64, 4, 2, 8
MESH = Mesh.of(x=4, y=2)
QUERY = Value((BATCH, ROWS, HEADS * GROUP, DEPTH), "bfloat16")
KEY = Value((BATCH, ROWS, HEADS, DEPTH), "bfloat16")
SUMS = Value((BATCH, HEADS * GROUP, ROWS), "float32")
NONE = Value((0,), "bfloat16")
READS = {
    FORWARD: (QUERY, KEY, KEY, *[NONE] * 7),
    BACKWARD: (QUERY, KEY, KEY, *[NONE] * 7, SUMS, QUERY, QUERY),
}
MAKES = {FORWARD: (QUERY, SUMS), BACKWARD: (QUERY, KEY, KEY)}


def made(kind: str, mask: str = "CAUSAL", window: int | None = None) -> tuple[Op, Any]:
    params = {
        "scale": 1.0,
        "layout": 0,
        "mask_type": mask,
        "sliding_window_length": window,
        "variadic_args": (False, False),
        "dropout_rate": 0.0,
    }
    op = Op(kind, (), (), tuple(sorted(params.items())))
    return op, attention(op, READS[kind], MAKES[kind])


def positions(choice: Choice) -> np.ndarray:
    """[devices, rows]: those that each device has."""
    rows = np.arange(ROWS)
    digits = choice.on("s")
    number = np.zeros(ROWS, int)
    for split in digits:
        size = MESH.size(split.axis)
        number = number * size + rows // split.stride % size
    count = int(number.max()) + 1
    return np.stack([rows[number == n] for n in range(count)])


CHOICES = {
    "whole": Choice(),
    "blocks": Choice.of({"s": [Split("x", 16)]}),
    "blocks over both": Choice.of({"s": [Split("x", 16), Split("y", 8)]}),
    "four rounds": Choice.of({"s": [Split("x", 4), Split("y", 2)]}),
    "stripes": Choice.of({"s": [Split("x", 2), Split("y", 1)]}),
    "heads too": Choice.of({"s": [Split("x", 4)], "h": [Split("y", 2)]}),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_the_busiest_device_turn_by_turn(name: str, kind: str) -> None:
    """Blocks of rows count whole or not at all, triangles half: as kernels do them."""
    choice = CHOICES[name]
    op, rule = made(kind)
    held = positions(choice)
    count = len(held)
    pairs = 0.0
    for turn in range(count):
        seen = [
            (held[i][:, None] > held[(i - turn) % count]).sum()
            + (held[i][:, None] == held[(i - turn) % count]).sum() / 2
            for i in range(count)
        ]
        pairs += max(seen)
    heads = HEADS * GROUP // (2 if choice.on("h") else 1)
    products = {FORWARD: 2, BACKWARD: 5}[kind]
    expected = 2 * products * DEPTH * BATCH * heads * pairs
    assert attention_flops(op, rule, choice, MESH) == pytest.approx(expected)


def test_without_a_mask_every_pair_counts() -> None:
    op, rule = made(FORWARD, "NO_MASK")
    whole = 2 * 2 * BATCH * HEADS * GROUP * ROWS * ROWS * DEPTH
    assert attention_flops(op, rule, Choice(), MESH) == whole
    split = Choice.of({"s": [Split("x", 16)], "g": [Split("y", 1)]})
    assert attention_flops(op, rule, split, MESH) == whole // 8


def test_a_window_leaves_a_band() -> None:
    op, rule = made(FORWARD, window=4)
    whole = 2 * 2 * BATCH * HEADS * GROUP * ROWS * ROWS * DEPTH
    assert attention_flops(op, rule, Choice(), MESH) == whole * 4 // ROWS


def test_what_a_ring_sends() -> None:
    """Keys and values to all others; backward their gradients too, and then home."""
    choice = CHOICES["blocks over both"]
    shard = KEY.num_bytes // 8
    _, rule = made(FORWARD)
    sent = list(handed_on(rule, choice, READS[FORWARD], MAKES[FORWARD], MESH))
    assert [(one.step.wire_bytes, one.turns) for one in sent] == [(shard, 7)] * 2
    _, rule = made(BACKWARD)
    sent = list(handed_on(rule, choice, READS[BACKWARD], MAKES[BACKWARD], MESH))
    assert [(one.step.wire_bytes, one.turns) for one in sent] == [
        *[(shard, 7)] * 2,
        *[(2 * shard, 7), (shard, 1)] * 2,
    ]
    assert {one.step.axes for one in sent} == {("x", "y")}
    assert not list(handed_on(rule, Choice(), READS[BACKWARD], MAKES[BACKWARD], MESH))


def test_turns_of_a_loop_hand_nothing_around() -> None:
    mesh = Mesh((Axis("x", 4), Axis(TIME, 2)))
    _, rule = made(FORWARD)
    assert not choice_problems(rule, CHOICES["blocks"], mesh)
    found = choice_problems(rule, Choice.of({"s": [Split(TIME, 32)]}), mesh)
    assert found == ["factor 's' is a ring: turns hand nothing around"]
