"""The replay under constraints is the undecorated step too."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from rhino_jax.ir.mesh import Mesh
from tests.lower.programs import arguments, check_equal, flat, lowered, random_pins

DeviceMesh = Callable[[Mesh], Any]
MESH = Mesh.of(data=2, tensor=4)


@pytest.mark.parametrize("recipe", ["zero1", "megatron", "zero3 x megatron"])
def test_equal_under_random_pins(recipe: str, device_mesh: DeviceMesh) -> None:
    pins = random_pins(random.Random(recipe), MESH)
    check_equal(lowered(recipe, MESH, device_mesh(MESH), pins, "auto"))


def test_values_are_constrained_inside_bodies(device_mesh: DeviceMesh) -> None:
    """The named activation of the scanned layer lies as it is pinned."""
    pins = {"hidden": ((), ("data",))}
    jitted = lowered("megatron", MESH, device_mesh(MESH), pins, "auto")
    text = jitted.lower(*flat(arguments())).as_text()
    assert "sdy.sharding_constraint" in text
    assert '[{}, {"data"}]' in text


def test_equal_on_one_device() -> None:
    check_equal(lowered("data_parallel", Mesh(()), None, {}, "auto"))
