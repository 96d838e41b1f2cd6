"""With the number of stages left open, pipelines compete with none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from rhino_jax import errors
from tests.search.test_selective import train_step


def shapes(width: int, rows: int) -> tuple[Any, Any]:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {"up": array(width, 4 * width), "down": array(4 * width, width)}
    return [layer] * 8, {"x": array(rows, width), "y": array(rows, width)}


def planned(cluster: str, **options: Any) -> rhino.Planned:
    found: rhino.Planned = rhino.plan(
        train_step, *shapes(2048, 8192), cluster=cluster, cache_dir="", **options
    )
    return found


def seconds(planned: rhino.Planned) -> float:
    assert planned.predicted is not None
    return planned.predicted.step_seconds


def test_a_pipeline_where_hosts_are_far_apart() -> None:
    """Every host has one GPU: weights' gradients cross the network, or activations."""
    found = planned("t4:4x1")  # nothing is asked for
    assert found.plan.stages is not None and found.plan.stages.num_workers > 1
    (note,) = (n for n in found.plan.notes if n.startswith("pipelines compared"))
    assert "no pipeline" in note and "2 stages" in note and "4 stages" in note
    alone = planned("t4:4x1", pipeline_stages=1)
    assert alone.plan.stages is None
    assert seconds(found) < seconds(alone)
    assert note in " ".join(str(found).split())


def test_none_on_one_fast_host() -> None:
    found = planned("h100:1x4", pipeline_stages="auto")
    assert found.plan.stages is None
    assert any("2 stages" in note for note in found.plan.notes)
    unasked = planned("h100:1x4")
    assert unasked.plan.stages is None
    assert not any("pipelines" in note for note in unasked.plan.notes)


def test_what_is_chosen_runs_and_is_equal() -> None:
    rng = np.random.default_rng(0)
    params, batch = jax.tree.map(
        lambda s: rng.normal(size=s.shape).astype(np.float32) / 8, shapes(16, 32)
    )
    step = rhino.auto_parallel(pipeline_stages="auto", cache_dir="", donate=False)(
        train_step
    )
    found, loss = step(params, batch)
    expected, its_loss = jax.jit(train_step)(params, batch)
    np.testing.assert_allclose(loss, its_loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )
    assert any(
        "pipelines compared" in n for n in step.planned(params, batch).plan.notes
    )


def test_a_recipe_needs_a_number() -> None:
    with pytest.raises(errors.OptionsError, match="say how many"):
        rhino.auto_parallel(pipeline_stages="auto", recipe="zero3")(train_step)
    with pytest.raises(errors.OptionsError, match="pipeline_stages='many'"):
        rhino.auto_parallel(pipeline_stages="many")(train_step)
