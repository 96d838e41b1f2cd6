"""Collective matmul from the decorator down: chosen, priced, written, run, compiled."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
import pytest

import rhino_jax as rhino
from benchmarks.equality import STATE_TOLERANCE, worst_leaf
from benchmarks.models import build
from benchmarks.models.zoo import run_init
from rhino_jax.api.planned import Planned
from rhino_jax.cost.habits import HABITS
from rhino_jax.plan import Plan
from rhino_jax.search import collective_matmul

CLUSTER = "v5p:2x2x2"


@cache
def planned(asked: bool) -> Planned:
    model = build("gpt_unrolled", "large", depth=1, dtype="bfloat16")
    shapes = model.state_shapes, model.batch_shapes
    return rhino.plan(
        model.train_step,
        *shapes,
        cluster=CLUSTER,
        collective_matmul=asked,
        cache_dir="",
        pipeline_stages=1,
    )


def test_a_tpus_products_take_in_what_they_hide() -> None:
    """The same bytes as without, in less time; written down, and said."""
    with_, without = planned(True), planned(False)
    assert with_.predicted and without.predicted
    assert with_.predicted.step_seconds < without.predicted.step_seconds
    assert with_.predicted.compute_seconds == pytest.approx(
        without.predicted.compute_seconds, rel=0.05
    )
    assert with_.plan.wire_bytes == without.plan.wire_bytes
    assert any("collective matmul" in note for note in with_.plan.notes)
    assert not any("collective matmul" in note for note in without.plan.notes)
    assert Plan.from_json(with_.plan.to_json()) == with_.plan
    said = with_.prediction()
    assert said.step_seconds == pytest.approx(with_.predicted.step_seconds)
    priced = sum(c.wire_bytes * c.count for c in said.collectives)
    assert priced == with_.plan.wire_bytes


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("t5", {"x": 8}),
        ("moe", {"x": 2, "y": 4}),
    ],
)
def test_equal_and_compiled_as_planned(
    name: str,
    mesh: dict[str, int],
    x64: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything that can be is done within products, worth it or not."""
    monkeypatch.setattr(collective_matmul, "WORTH", -math.inf)
    monkeypatch.setitem(HABITS, "cpu", replace(HABITS["cpu"], sends_beside=True))
    model = build(name, "tiny", dtype="float64")
    _, state, batch = run_init(model)
    step = rhino.auto_parallel(mesh=mesh, donate=False, cache_dir="")(model.train_step)
    want = jax.jit(model.train_step)(state, batch)
    made = step.planned(state, batch)
    assert any("collective matmul" in note for note in made.plan.notes)
    error, path = worst_leaf(want, step(state, batch))
    assert error <= STATE_TOLERANCE, path
    verified = made.verify(cache_dir=None)
    assert verified.ok, str(verified)
