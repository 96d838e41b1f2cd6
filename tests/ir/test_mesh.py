"""Meshes: names, sizes, groups, links."""

from __future__ import annotations

import pytest

from rhino_jax.ir.mesh import TIME, TORUS, Axis, Mesh

MESH = Mesh.of(pod=2, data=3, tensor=4)


def test_axes_keep_their_order() -> None:
    assert MESH.names == ("pod", "data", "tensor")
    assert list(MESH.shape.items()) == [("pod", 2), ("data", 3), ("tensor", 4)]
    assert str(MESH) == "pod=2, data=3, tensor=4"


def test_a_group_is_the_product_of_its_axes() -> None:
    assert MESH.group_size(("pod", "tensor")) == 8
    assert MESH.group_size(()) == 1
    assert MESH.size("data") == 3


def test_an_unknown_axis_names_the_mesh() -> None:
    with pytest.raises(KeyError, match="no axis 'model' in mesh"):
        MESH.size("model")


def test_time_needs_no_devices() -> None:
    timed = Mesh((*MESH.axes, Axis(TIME, 16)))
    assert timed.num_devices == MESH.num_devices == 24
    assert timed.group_size((TIME,)) == 16


def test_a_mesh_without_axes_is_one_device() -> None:
    assert Mesh(()).num_devices == 1
    assert str(Mesh(())) == ""


def test_in_order_sorts_and_drops_repeats_and_strangers() -> None:
    assert MESH.in_order(("tensor", "pod", "tensor", "other")) == ("pod", "tensor")
    assert MESH.in_order(iter(("data",))) == ("data",)


def test_a_link_is_set_on_every_axis_and_is_part_of_the_mesh() -> None:
    torus = MESH.linked(TORUS)
    assert {axis.link for axis in torus.axes} == {TORUS}
    assert torus != MESH
    assert torus.shape == MESH.shape
    assert torus.linked("") == MESH


@pytest.mark.parametrize(
    ("axes", "what"),
    [
        ((Axis("a", 2), Axis("a", 3)), "repeat"),
        ((("a", 0),), "size 0"),
        ((("a b", 2),), "no identifier"),
    ],
)
def test_what_is_no_mesh(axes: tuple, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        Mesh(tuple(a if isinstance(a, Axis) else Axis(*a) for a in axes))
