"""What a convolution in blocks sends and copies: rows of an image, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rhino_jax.cost.halo import extended_bytes
from rhino_jax.cost.handed import handed_on
from rhino_jax.ir.factors import Choice, Rule, choice_problems
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import TIME, Axis, Mesh
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of

MESH = Mesh.of(x=4, y=2)
IMAGE = Value((2, 32, 16, 8), "bfloat16")
KERNEL = Value((5, 3, 8, 6), "bfloat16")
MADE = Value((2, 16, 16, 6), "bfloat16")
NUMBERS = (("lhs_spec", (0, 3, 1, 2)), ("rhs_spec", (3, 2, 0, 1)))
ROW = 16 * 8 * 2  # bytes: a row of one image


def convolution() -> Rule:
    """5 x 3 by stride 2 in height, "SAME": 1 row before a block, 2 behind."""
    params = {
        "dimension_numbers": (*NUMBERS, ("out_spec", (0, 3, 1, 2))),
        "padding": ((1, 2), (1, 1)),
        "window_strides": (2, 1),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "feature_group_count": 1,
        "batch_group_count": 1,
    }
    op = Op("conv_general_dilated", (0, 1), (2,), tuple(sorted(params.items())))
    return rule_of(Program((IMAGE, KERNEL, MADE), (0, 1), (op,), (2,)), op)


CHOICES = {
    "height": (Choice.of({"h0": [Split("x", 4)]}), [2 * ROW, 4 * ROW], 2 * 11 * ROW),
    "height over both": (
        Choice.of({"h0": [Split("x", 4), Split("y", 2)]}),
        [2 * ROW, 4 * ROW],
        2 * 7 * ROW,
    ),
    "height and images": (
        Choice.of({"h0": [Split("x", 4)], "n": [Split("y", 1)]}),
        [ROW, 2 * ROW],
        11 * ROW,
    ),
    "width": (
        Choice.of({"h1": [Split("x", 4)]}),
        [2 * 32 * 8 * 2] * 2,
        2 * 32 * 6 * 8 * 2,
    ),
    "both, with corners": (
        Choice.of({"h0": [Split("x", 4)], "h1": [Split("y", 8)]}),
        [ROW, 2 * ROW, *[2 * 11 * 8 * 2] * 2],
        2 * 11 * 10 * 8 * 2,
    ),
    "images": (Choice.of({"n": [Split("y", 1)]}), [], 0),
}


@pytest.mark.parametrize("name", CHOICES)
def test_rows_that_are_sent_and_blocks_that_are_copied(name: str) -> None:
    choice, sent, copied = CHOICES[name]
    rule = convolution()
    assert not choice_problems(rule, choice, MESH)
    found = list(handed_on(rule, choice, (IMAGE, KERNEL), (MADE,), MESH))
    assert [one.step.wire_bytes for one in found] == sent
    assert {one.turns for one in found} <= {1}
    assert extended_bytes(rule, choice, (IMAGE, KERNEL), MESH) == copied


def test_a_halo_is_no_wider_than_a_neighbours_block() -> None:
    rule = convolution()
    wide = Mesh.of(x=16)
    assert not choice_problems(rule, Choice.of({"h0": [Split("x", 1)]}), wide)
    found = choice_problems(rule, Choice.of({"h1": [Split("x", 1)]}), wide)
    assert not found
    (problem,) = choice_problems(tall(), Choice.of({"h0": [Split("x", 1)]}), wide)
    assert "in blocks of 2 of operand 0 needs 3 of a neighbour's" in problem


def tall() -> Rule:
    """9 rows of a window by stride 2: 3 before, 4 behind."""
    rule = convolution()
    (h,) = (f for f in rule.factors if f.name == "h0")
    wider = tuple(replace(halo, before=3) for halo in h.halos)
    factors = tuple(replace(f, halos=wider) if f is h else f for f in rule.factors)
    return replace(rule, factors=factors)


def test_blocks_are_contiguous_and_of_devices() -> None:
    rule = convolution()
    strided = Choice.of({"h0": [Split("x", 2)]})
    assert any("can not be strided" in p for p in choice_problems(rule, strided, MESH))
    holes = Choice.of({"h0": [Split("x", 4), Split("y", 1)]})
    assert any("can not be strided" in p for p in choice_problems(rule, holes, MESH))
    mesh = Mesh((Axis("x", 4), Axis(TIME, 2)))
    (problem,) = choice_problems(rule, Choice.of({"h0": [Split(TIME, 8)]}), mesh)
    assert problem == "factor 'h0' is a window: turns hand nothing around"
