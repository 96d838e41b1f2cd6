"""A pipeline of equal stages on the real compilers: the planned collectives."""

from __future__ import annotations

import pytest

import rhino_jax as rhino
from rhino_jax.verify.audit import audit
from rhino_jax.verify.compile_only import installed
from tests.layers import checkpointed, make

TARGETS = {"cuda": "h100:1x4", "tpu": "v5e:2x2"}


@pytest.mark.parametrize("platform", TARGETS)
def test_compiled_as_planned(platform: str) -> None:
    if not installed(platform):
        pytest.skip(f"no compiler for {platform} here")
    step, state, batch = make(checkpointed, dtype="float32", hidden=256)
    planned = rhino.plan(
        step,
        state,
        batch,
        pipeline_stages=4 if platform == "cuda" else 2,
        schedule="circular" if platform == "cuda" else "gpipe",
        microbatches=4,
        recipe="megatron",
        cluster=TARGETS[platform],
        mesh={"data": 1, "tensor": 2},
        cache_dir="",
    )
    facts = planned.compile_only()
    assert facts.ok, facts.message
    found = audit(planned.planned_collectives(), facts, planned.plan.mesh.shape)
    assert found.ok, str(found)
    assert {axes for row in found.rows for axes in row.axes.split(",")} == {
        "stage",
        "tensor",
    }
