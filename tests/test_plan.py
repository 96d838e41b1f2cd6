"""Plans as files: the same bytes, the same program, and no traceback for a bad one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rhino_jax as rhino
from rhino_jax.errors import PlanFileError
from rhino_jax.plan import Plan
from rhino_jax.search.recipes import RECIPES

ROOT = Path(__file__).parents[1]
MESH = {"data": 2, "tensor": 4}


def train_step(w: Any, x: jax.Array) -> Any:
    def loss_of(w: Any) -> jax.Array:
        def layer(x: jax.Array, one: Any) -> Any:
            return x + jnp.tanh(x @ one["up"]) @ one["down"], None

        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2)

    loss, grads = jax.value_and_grad(loss_of)(w)
    return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), loss


def planned(recipe: str = "zero3 x megatron", **options: Any) -> rhino.Planned:
    w = {
        "up": jax.ShapeDtypeStruct((3, 16, 64), jnp.float32),
        "down": jax.ShapeDtypeStruct((3, 64, 16), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    asked = options or {"mesh": MESH, "recipe": recipe}
    return rhino.plan(train_step, w, x, **asked)


TEXT = planned().plan.to_json()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "expert"])
def test_json_both_ways(recipe: str, tmp_path: Path) -> None:
    plan = planned(recipe).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert planned(recipe).plan.to_json() == plan.to_json()
    assert plan.diff(plan) == ()


def test_differences_are_named() -> None:
    lines = planned("zero3").diff(planned("data_parallel"))
    assert any(line.startswith("input w/up") for line in lines)
    assert any(line.startswith("bytes sent") for line in lines)


ELSEWHERE = """
import sys
from tests.test_plan import planned
print(planned(plan=sys.argv[1]).lower().as_text())
"""


def test_loaded_in_a_new_process_it_lowers_to_the_same_program(tmp_path: Path) -> None:
    here = planned()
    here.save(tmp_path / "plan.json")
    out = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "plan.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.strip() == here.lower().as_text().strip()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.integers(1, 127))
def test_a_damaged_file_is_called_damaged(place: int, other: int) -> None:
    broken = TEXT[:place] + chr(other) + TEXT[place + 1 :]
    try:
        found = Plan.from_json(broken)
    except PlanFileError:
        return
    assert found == Plan.from_json(TEXT), "a change that nobody noticed"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "rhino-plan"}', "null"])
def test_what_is_no_plan_is_said(text: str) -> None:
    with pytest.raises(PlanFileError):
        Plan.from_json(text)


def test_a_foreign_plan_names_what_differs() -> None:
    plan = planned().plan
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    with pytest.raises(PlanFileError, match=r"planned .*\[3, 64, 16\]"):
        rhino.plan(lambda w, x: (w - x, 0.0), {"a": x}["a"], x, plan=plan)


def test_a_plan_reads_as_text() -> None:
    text = str(planned())
    assert max(map(len, text.splitlines())) <= 100
    assert "P(None, 'data', 'tensor')" in text
    assert "reduce-scatter" in text and "test_plan.py:" in text
