"""Fused QKV: the search finds the strided layout by itself, and it is the same step."""

from __future__ import annotations

import pytest

from benchmarks.strided import (
    AXIS,
    LARGE,
    MODELS,
    RECIPE,
    SEARCHED,
    SMALL,
    TOLERANCE,
    difference,
    is_strided,
    planned,
    qkv_layouts,
)
from rhino_jax.ir.layout import Layout


def test_blocks_of_a_fused_projection_are_not_strided() -> None:
    assert is_strided(Layout.of((), (), [(AXIS, 512)]), 4096)
    assert not is_strided(Layout.of((), (), [(AXIS, 1536)]), 4096)
    assert not is_strided(Layout.replicated(3), 4096)


@pytest.mark.parametrize("name", MODELS)
def test_the_search_splits_heads_inside_each_third(name: str) -> None:
    found = planned(MODELS[name](LARGE[name]))
    layouts = list(qkv_layouts(found, LARGE[name].hidden))
    assert len(layouts) == LARGE[name].layers
    assert all(is_strided(layout, LARGE[name].hidden) for layout in layouts)


@pytest.mark.parametrize(
    ("name", "way"), [("block", RECIPE), ("block", SEARCHED), ("gpt", SEARCHED)]
)
def test_a_strided_step_is_the_undecorated_one(name: str, way: str) -> None:
    worst, layouts = difference(name, way)
    assert worst < TOLERANCE
    assert layouts
    assert all(is_strided(layout, SMALL[name].hidden) for layout in layouts)
