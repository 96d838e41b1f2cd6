"""The manual program is the undecorated step, whatever is pinned where."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.program import SignatureChanged
from tests.lower import programs
from tests.lower.programs import (
    arguments,
    check_equal,
    flat,
    lowered,
    random_pins,
    traced,
)

DeviceMesh = Callable[[Mesh], Any]
MESHES = [Mesh.of(data=2, tensor=4), Mesh.of(a=2, b=2, c=2), Mesh.of(data=4, tensor=2)]
CASES = [
    ("data_parallel", 0),
    ("zero1", 1),
    ("zero3", 2),
    ("megatron", 0),
    ("zero3 x megatron", 1),
]


def test_the_step_holds_every_kind_of_nesting() -> None:
    kinds = {op.kind for _, op in traced()[0].program.walk()}
    nested = {"scan", "while", "cond", "remat2", "random_bits", "name"}
    assert nested <= kinds


@pytest.mark.parametrize(("recipe", "mesh"), CASES)
def test_equal_under_random_pins(
    recipe: str, mesh: int, device_mesh: DeviceMesh
) -> None:
    grid = MESHES[mesh]
    pins = random_pins(random.Random(f"{recipe}{mesh}"), grid)
    assert any(axes for spec in pins.values() for axes in spec), pins
    check_equal(lowered(recipe, grid, device_mesh(grid), pins))


def test_equal_on_one_device() -> None:
    check_equal(lowered("data_parallel", Mesh(()), None, {}))


def test_names_and_lines_of_the_user_are_kept(device_mesh: DeviceMesh) -> None:
    """An op of the lowered program says where it was written, and under what name."""
    mesh = MESHES[0]
    jitted = lowered("megatron", mesh, device_mesh(mesh), {})
    text = jitted.lower(*flat(arguments())).as_text(debug_info=True)
    source, first = inspect.getsourcelines(programs)
    for written in ('x @ layer["up"]', '@ params["head"]', "matrix @ v", "0.9 * m"):
        (line,) = [n for n, s in enumerate(source, first or 1) if written in s]
        assert re.search(rf'programs\.py"?:{line}\b', text), written
    scopes = re.findall(r'"([^"]*hidden_layer[^"]*)"', text)
    assert any(name.endswith("dot_general") for name in scopes)
    assert any("transpose(" in name for name in re.findall(r'"([^"]*)"', text))


def test_collectives_bear_the_name_of_the_op_they_serve(
    device_mesh: DeviceMesh,
) -> None:
    mesh = MESHES[0]
    jitted = lowered("zero3", mesh, device_mesh(mesh), {})
    text = jitted.lower(*flat(arguments())).as_text(debug_info=True)
    names = set(re.findall(r'"([^"]*/all_gather)"', text))
    inside = {name for name in names if "hidden_layer/" in name}
    assert any("rematted_computation" in name for name in inside), names
    assert any("rematted_computation" not in name for name in inside), names


def test_other_shapes_are_refused(device_mesh: DeviceMesh) -> None:
    mesh = MESHES[0]
    jitted = lowered("data_parallel", mesh, device_mesh(mesh), {})
    wrong = [np.concatenate([x, x]) if np.ndim(x) else x for x in flat(arguments())]
    with pytest.raises(SignatureChanged):
        jax.eval_shape(jitted, *wrong)
