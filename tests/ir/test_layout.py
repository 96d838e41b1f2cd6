"""Layouts: digits of dimensions, against counting elements one by one."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhino_jax.ir.layout import (
    OPERATORS,
    Layout,
    Split,
    contiguous,
    local_size,
    padded_size,
    parse_layout,
)
from rhino_jax.ir.mesh import Mesh
from tests.layouts import coordinates, held, random_layout, random_mesh, random_shape

RANDOM = st.randoms(use_true_random=False)
MESH = Mesh.of(x=2, y=3, z=4)


def drawn(rng: random.Random) -> tuple[Layout, tuple[int, ...], Mesh]:
    mesh, shape = random_mesh(rng), random_shape(rng)
    return random_layout(rng, shape, mesh, OPERATORS), shape, mesh


@given(RANDOM)
def test_text_is_read_back(rng: random.Random) -> None:
    layout, _, _ = drawn(rng)
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize("text", ["[]", "[-]", "[]+sum(x)", "[x/4.y/1,-]+max(z)"])
def test_text_is_written_back(text: str) -> None:
    assert str(parse_layout(text)) == text


@given(RANDOM)
@settings(max_examples=60)
def test_shards_cover_a_value_once(rng: random.Random) -> None:
    """Local shapes count what each device holds; ragged dimensions hold pads."""
    layout, shape, mesh = drawn(rng)
    local = layout.local_shape(shape, mesh)
    everyone = [held(layout, shape, mesh, at) for at in coordinates(mesh)]
    assert {tuple(map(len, indices)) for indices in everyone} == {local}
    copies = mesh.num_devices // mesh.group_size(layout.split_axes)
    inside = sum(
        math.prod(sum(i < n for i in ii) for n, ii in zip(shape, indices, strict=True))
        for indices in everyone
    )
    assert inside == copies * math.prod(shape)
    padded = {d for ii in everyone for d, n in enumerate(shape) if max(ii[d]) >= n}
    assert set(layout.ragged_dims(shape, mesh)) == padded


@given(
    st.integers(1, 60),
    st.lists(st.sampled_from("xyz"), unique=True, min_size=1, max_size=3),
)
def test_contiguous_hands_out_blocks(size: int, axes: list[str]) -> None:
    dim = contiguous(size, axes, MESH)
    parts = MESH.group_size(tuple(axes))
    block = -(-size // parts)
    assert [s.axis for s in dim] == axes
    assert not Layout((dim,)).problems((size,), MESH)
    assert local_size(size, dim, MESH) == block
    assert padded_size(size, dim, MESH) == block * parts
    for at in coordinates(MESH):
        number = 0
        for axis in axes:
            number = number * MESH.size(axis) + at[axis]
        (indices,) = held(Layout((dim,)), (size,), MESH, at)
        assert indices == list(range(number * block, (number + 1) * block))


def test_contiguous_over_no_axis_is_whole() -> None:
    assert contiguous(12, (), MESH) == ()


@given(RANDOM)
def test_taking_apart_and_together(rng: random.Random) -> None:
    layout, shape, _ = drawn(rng)
    rebuilt = Layout.replicated(len(shape))
    for axis in layout.axes:
        only = layout.only(axis)
        assert only.axes == (axis,)
        where = layout.find(axis)
        assert (where is None) == (layout.operator(axis) is not None)
        if where is None:
            rebuilt = rebuilt.with_partial(axis, layout.operator(axis))
        else:
            assert only.find(axis) == where
            rebuilt = rebuilt.with_split(*where)
    assert rebuilt == layout
    assert layout.without(layout.axes) == Layout.replicated(len(shape))
    assert layout.settled().partial == ()
    assert layout.settled().split_axes == layout.split_axes
    assert layout.prepended().dropped_first() == layout


def test_of_sorts_digits_and_terms() -> None:
    made = Layout.of([("x", 1), ("y", 2)], partial=[("z", "sum")])
    assert made.dims == ((Split("y", 2), Split("x", 1)),)
    other = Layout.replicated(1).with_partial("z", "sum").with_partial("y", "sum")
    assert other.partial == (("y", "sum"), ("z", "sum"))


LAWS = {
    "rank": ("[-,-]", (8,), "2 dimensions, shape (8,)"),
    "stranger": ("[w/4]", (8,), "axis 'w' of layout [w/4] is not in the mesh"),
    "stranger partial": ("[-]+sum(w)", (8,), "axis 'w'"),
    "twice": ("[x/4,x/4]", (8, 8), "an axis is used twice"),
    "twice in a dimension": ("[x/4.x/2]", (8,), "an axis is used twice"),
    "split and partial": ("[x/4]+sum(x)", (8,), "an axis is used twice"),
    "operator": ("[-]+mean(x)", (8,), "operator 'mean'"),
    "order": ("[x/1.z/2]", (8,), "not in order of falling stride"),
    "inner digit of an odd size": ("[x/2]", (6,), "6 is not a multiple of 4"),
    "digits overlap": ("[x/4.z/2]", (8,), "stride 4 is not a multiple of 8"),
    "digits apart": ("[x/6.z/1]", (12,), "stride 6 is not a multiple of 4"),
}


@pytest.mark.parametrize("law", LAWS)
def test_each_law_is_caught(law: str) -> None:
    text, shape, expected = LAWS[law]
    found = parse_layout(text).problems(shape, MESH)
    assert len(found) == 1, found
    assert expected in found[0]


def test_every_bad_dimension_is_named() -> None:
    found = parse_layout("[x/2,-,z/1]").problems((6, 5, 6), MESH)
    assert [text.split(" in ")[0] for text in found] == [
        "dimension 0 of size 6",
        "dimension 2 of size 6",
    ]


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from("xyz"))
def test_one_digit_is_lawful_when_shards_are_equal(
    size: int, stride: int, axis: str
) -> None:
    """A stride fits if its digit is the outermost, or counts evenly."""
    layout = Layout.of([(axis, stride)])
    top = stride * MESH.size(axis)
    fits = top >= size or size % top == 0
    assert (not layout.problems((size,), MESH)) == fits
