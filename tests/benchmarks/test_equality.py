"""A covering dozen of the equality matrix; the whole of it is benchmarks/equality.py.

Each of the first seven models, every recipe and every mesh is met, and every pair of
recipe and mesh once or more; and of the others those with ops that no first one has:
scatters into a cache, a scan over time, derivatives of derivatives in a `while`.
"""

from __future__ import annotations

import pytest

from benchmarks.equality import BY_BYTES, SEARCH, cell

CELLS = [
    ("gpt_unrolled", "megatron", "2x4"),
    ("gpt_unrolled", "zero3 x megatron", "2x2x2"),
    ("gpt_scanned", "zero3 x megatron", "2x4"),
    ("gpt_scanned", "zero3", "8"),
    ("vit", "zero1", "2x2x2"),
    ("vit", "megatron", "8"),
    ("resnet", "data_parallel", "8"),
    ("resnet", "zero3", "2x4"),
    ("moe", "expert", "2x2x2"),
    ("moe", "expert", "8"),
    ("t5", "megatron", "2x2x2"),
    ("recommender", "zero1", "2x4"),
]
MORE = [
    ("decode", BY_BYTES),
    ("decode", SEARCH),
    ("lstm", BY_BYTES),
    ("pinn", BY_BYTES),
]


@pytest.mark.parametrize(("name", "recipe", "mesh"), CELLS)
def test_three_steps_leave_the_same_state(name: str, recipe: str, mesh: str) -> None:
    assert cell(name, recipe, mesh, "state")["outcome"] == "equal"


@pytest.mark.parametrize(("name", "recipe"), MORE)
def test_so_do_those_of_other_kinds(name: str, recipe: str) -> None:
    assert cell(name, recipe, "2x4", "state")["outcome"] == "equal"


@pytest.mark.parametrize(("name", "recipe", "mesh"), CELLS[::4])
def test_the_gradients_are_the_same(name: str, recipe: str, mesh: str) -> None:
    assert cell(name, recipe, mesh, "gradients")["outcome"] == "equal"


def test_losses_agree_in_float32() -> None:
    assert cell("gpt_scanned", "zero3", "2x4", "float32")["outcome"] == "equal"
