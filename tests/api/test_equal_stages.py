"""Scanned layers as a pipeline in one program: the undecorated step, all the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rhino_jax as rhino
from rhino_jax.api.pipelined import PipelinePlanned
from rhino_jax.ir.analysis.loops import accumulators
from rhino_jax.ir.mesh import STAGE
from rhino_jax.ir.steps import PERMUTE
from rhino_jax.plan import Plan
from tests.api.pipes import check_equal, mesh
from tests.layers import checkpointed, dropping, make, normed, plain, sharing


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("layer", "stages", "schedule", "axes", "microbatches", "recipe"),
    [
        (plain, 2, "gpipe", {}, 4, ""),
        (plain, 2, "gpipe", {"data": 2, "tensor": 2}, 4, "megatron"),
        (sharing, 4, "gpipe", {"data": 2}, 2, ""),
        (sharing, 4, "circular", {"data": 2}, 4, "zero3"),
        (checkpointed, 2, "gpipe", {"data": 2, "tensor": 2}, 8, ""),
        (dropping, 4, "circular", {"data": 2}, 2, "data_parallel"),
    ],
)
def test_equal(
    layer: Any,
    stages: int,
    schedule: str,
    axes: dict[str, int],
    microbatches: int,
    recipe: str,
) -> None:
    step, state, batch = make(layer)
    workers = stages // (2 if schedule == "circular" else 1)
    piped = rhino.auto_parallel(
        pipeline_stages=stages,
        schedule=schedule,
        microbatches=microbatches,
        recipe=recipe,
        mesh=mesh(workers, **axes),
        cache_dir="",
    )(step)
    check_equal(step, state, batch, piped)
    planned = piped.planned(state, batch)
    assert not isinstance(planned, PipelinePlanned)
    ticks = microbatches * stages // workers + workers - 1
    sent = Counter[str]()
    for one in planned.plan.collectives:
        if one.kind == PERMUTE:
            sent[one.axes[0]] += one.count
    # The carry both ways; of what layers share, the gradient where JAX does not make it
    # a plain sum (0.10 does not, 0.11 does).
    passed = sum(
        op.param["num_carry"]
        - len(accumulators(*op.programs, op.param["num_consts"], op.param["num_carry"]))
        for op in planned.traced.program.ops
        if op.kind == "scan"
    )
    assert passed in ({2, 3} if layer is sharing else {2})
    assert sent == {STAGE: passed * ticks}


@pytest.mark.parametrize("microbatches", [None, 4])
def test_options_and_report(microbatches: int | None) -> None:
    step, state, batch = make(dtype="float32")
    options = {"pipeline_stages": 2, "schedule": "gpipe", "cluster": "h100:1x8"}
    planned = rhino.plan(
        step,
        state,
        batch,
        mesh={"data": 2, "tensor": 2},
        microbatches=microbatches,
        cache_dir="",
        **options,
    )
    plan = planned.plan
    assert plan.mesh.shape == {"stage": 2, "data": 2, "tensor": 2}
    (cut, same) = plan.assignment.staged
    assert cut == same
    assert plan.microbatches == cut.microbatches
    if microbatches:
        assert cut.microbatches == microbatches
        assert f"{cut.bubble:.0%} idle" in str(planned)
    else:
        assert any("compared by prediction" in note for note in plan.notes)
    assert planned.predicted is not None
    assert planned.predicted.step_seconds > 0


def test_a_saved_plan_runs(tmp_path: Path) -> None:
    step, state, batch = make(dtype="float32")
    options: dict[str, Any] = {
        "pipeline_stages": 4,
        "schedule": "circular",
        "microbatches": 4,
        "mesh": mesh(2, data=2),
        "cache_dir": "",
    }
    planned = rhino.auto_parallel(**options)(step).planned(state, batch)
    planned.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == planned.plan
    again = rhino.auto_parallel(plan=tmp_path / "plan.json", **options)(step)
    _, metrics = again(again.place(state, batch), batch)
    _, expected = jax.jit(step)(state, batch)
    assert abs(float(metrics["loss"]) - float(expected["loss"])) < 1e-5


def test_what_can_not_be_cut_so_is_said() -> None:
    step, state, batch = make(normed, dtype="float32")
    options = {"schedule": "gpipe", "cluster": "cpu:2", "microbatches": 1}
    planned = rhino.plan(step, state, batch, pipeline_stages=2, cache_dir="", **options)
    assert isinstance(planned, PipelinePlanned)  # a scan is one segment there


def test_equal_stages_compete() -> None:
    step, state, batch = make(dtype="float32")
    planned = rhino.plan(
        step, state, batch, pipeline_stages="auto", cluster="cpu:2", cache_dir=""
    )
    (note,) = [n for n in planned.plan.notes if "compared" in n]
    assert "no pipeline" in note
    assert "2 stages in one program, gpipe" in note


def test_every_stage_holds_its_own_layers() -> None:
    step, state, batch = make(dtype="float32")
    planned = rhino.plan(
        step,
        state,
        batch,
        pipeline_stages=4,
        schedule="gpipe",
        microbatches=4,
        recipe="zero3",
        cluster="cpu:4",
        mesh={"data": 1},
        cache_dir="",
    )
    specs = planned.in_shardings[0][0]["params"]["layers"]
    assert {spec.spec[0] for spec in specs.values()} == {"stage"}


def test_explained_and_followed() -> None:
    step, state, batch = make(dtype="float32")
    piped = rhino.auto_parallel(
        pipeline_stages=2,
        schedule="gpipe",
        microbatches=4,
        mesh={"data": 4},
        cache_dir="",
    )(step)
    now = piped.place(state, batch)
    said = piped.planned(state, batch).explain("params/layers/up")
    assert "stage" in said

    def norms(state: Any) -> Any:
        return jax.tree.map(lambda x: jax.numpy.sum(x * x), state["params"])

    found = rhino.follow(piped, norms)(now)
    for one, wanted in zip(
        jax.tree.leaves(found), jax.tree.leaves(norms(state)), strict=True
    ):
        np.testing.assert_allclose(one, wanted, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_a_loss_that_layers_add_to() -> None:
    """Means over the batch in the carry are terms of every microbatch."""

    def step(params: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> Any:
            def layer(held: Any, w: Any) -> Any:
                x, loss = held
                y = jax.numpy.tanh(x @ w)
                return (x + y, loss + jax.numpy.mean(y * y)), None

            start = batch @ params["in"], jax.numpy.zeros(())
            (x, loss), _ = jax.lax.scan(layer, start, params["layers"])
            return jax.numpy.mean(x * x) + loss

        loss, grads = jax.value_and_grad(loss_of)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}

    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(8, 8)), "layers": rng.normal(size=(4, 8, 8))}
    params = jax.tree.map(lambda x: 0.3 * x, params)
    piped = rhino.auto_parallel(
        pipeline_stages=2,
        schedule="gpipe",
        microbatches=4,
        mesh=mesh(2, data=2),
        cache_dir="",
    )(step)
    check_equal(step, params, rng.normal(size=(16, 8)), piped)
    assert piped.planned(params, np.ones((16, 8))).plan.assignment.staged


@pytest.mark.usefixtures("x64")
def test_layers_are_recomputed() -> None:
    step, state, batch = make(plain)
    piped = rhino.auto_parallel(
        pipeline_stages=2,
        schedule="gpipe",
        microbatches=4,
        remat="boundary",
        mesh=mesh(2, data=2),
        cache_dir="",
    )(step)
    check_equal(step, state, batch, piped)
    plan = piped.planned(state, batch).plan
    assert plan.remat
    assert plan.assignment.staged
