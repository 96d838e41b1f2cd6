"""Of layers that stand one by one no more are recomputed than must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from rhino_jax.api.planned import Planned, subject_of
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.model import predict
from rhino_jax.cost.stretches import stretches
from rhino_jax.errors import PlanFileError
from rhino_jax.ir.spans import numbers
from rhino_jax.rules import rule_of
from rhino_jax.search.frontier import Cost
from rhino_jax.search.remat import recomputable
from rhino_jax.search.selective import choices
from rhino_jax.verify.compile_only import installed

LAYERS, WIDTH, HIDDEN, BATCH = 6, 256, 1024, 2048
CLUSTER = "h100:1x1"


def train_step(state: Any, batch: Any) -> Any:
    def loss_of(params: Any) -> jax.Array:
        x = batch["x"]
        for layer in params:
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return jnp.mean((x - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), loss


def shapes() -> tuple[Any, Any]:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {"up": array(WIDTH, HIDDEN), "down": array(HIDDEN, WIDTH)}
    return [layer] * LAYERS, {"x": array(BATCH, WIDTH), "y": array(BATCH, WIDTH)}


def planned(limit_bytes: int | None = None, **options: Any) -> Planned:
    options.setdefault("cluster", CLUSTER)
    return rhino.plan(
        train_step, *shapes(), memory_limit_bytes=limit_bytes, cache_dir="", **options
    )


def ends() -> tuple[Any, Any]:
    """What the step needs with nothing recomputed, and with everything."""
    none, every = planned(remat="none"), planned(remat="boundary")
    return none.prediction(), every.prediction()


def test_as_few_as_must_be() -> None:
    none, every = ends()
    least = every.compiled.placed_bytes
    gap = none.compiled.placed_bytes - least
    assert gap > 2**20
    counts, seconds = [], [none.step_seconds]
    for part in (0.75, 0.5, 0.25):
        found = planned(least + int(part * gap))
        ((segments, policy),) = found.plan.remat
        assert policy == "boundary" and segments != "*"
        assert found.predicted is not None
        assert found.prediction().compiled.placed_bytes <= least + part * gap
        seconds.append(found.predicted.step_seconds)
        counts.append(len(numbers(segments)))
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] < LAYERS
    assert [*seconds, every.step_seconds] == sorted([*seconds, every.step_seconds])
    assert seconds[-1] < every.step_seconds


def test_segments_add_up_to_the_predicted_peak() -> None:
    """In the backward pass: their numbers are those of the whole plan, taken apart."""
    one = planned(remat="none")
    subject, cluster = subject_of(one.traced), parse_cluster(CLUSTER)
    assignment, mesh = one.plan.assignment, one.plan.mesh
    found = recomputable(subject.program, subject.pairs, subject.batch_inputs)
    divided = [segment for segment, _ in found]
    donated = one.traced.donated
    given = subject.program, assignment, mesh, cluster, rule_of, donated
    total = Cost()
    for stretch, (_, again) in zip(stretches(*given, divided), found, strict=True):
        total = total.then(choices(stretch, again)[0])
    expected = predict(*given).memory
    beside = expected.peak_bytes - expected.input_bytes
    assert total.peak == pytest.approx(beside, rel=0.02)


def test_some_recomputed_is_equal_to_the_undecorated_step(
    x64: None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    state, batch = jax.tree.map(lambda s: rng.normal(size=s.shape) / 16, shapes())
    # On several devices a price for memory may do as well.
    one = jax.sharding.Mesh(np.array(jax.devices()[:1], object), ("x",))
    asked: dict[str, Any] = {"mesh": one, "cache_dir": ""}
    none = rhino.plan(train_step, state, batch, remat="none", **asked)
    every = rhino.plan(train_step, state, batch, remat="boundary", **asked)
    assert none.predicted is not None and every.predicted is not None
    limit = (none.predicted.peak_bytes + every.predicted.peak_bytes) // 2
    some = rhino.plan(train_step, state, batch, memory_limit_bytes=limit, **asked)
    ((segments, _),) = some.plan.remat
    assert segments != "*"
    some.save(tmp_path / "plan.json")
    step = rhino.auto_parallel(
        plan=str(tmp_path / "plan.json"), mesh=one, donate=False
    )(train_step)
    found, loss = step(state, batch)
    expected, its_loss = jax.jit(train_step)(state, batch)
    np.testing.assert_allclose(loss, its_loss, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        found,
        expected,
    )


def test_a_plan_names_its_segments(tmp_path: Path) -> None:
    none, every = ends()
    some = planned((none.peak_bytes + every.peak_bytes) // 2)
    ((segments, _),) = some.plan.remat
    assert f"remat boundary of segments {segments}" in str(some)
    path = tmp_path / "plan.json"
    some.save(path)
    again = rhino.plan(train_step, *shapes(), cluster=CLUSTER, plan=str(path))
    assert again.lower("cpu").as_text() == some.lower("cpu").as_text()
    path.write_text(path.read_text().replace(f'"{segments}"', '"many"'))
    with pytest.raises(PlanFileError):
        rhino.plan(train_step, *shapes(), cluster=CLUSTER, plan=str(path))


@pytest.mark.compilers
def test_what_is_predicted_to_fit_fits() -> None:
    if not installed("cuda"):
        pytest.skip("the compiler for cuda is not installed")
    none, every = ends()
    limit = (none.peak_bytes + every.peak_bytes) // 2
    facts = planned(limit).compile_only(cache_dir=None)
    assert facts.ok, facts.message
    assert facts.memory.peak_bytes <= limit * 1.05
    whole = planned(remat="none").compile_only(cache_dir=None)
    assert facts.memory.peak_bytes < whole.memory.peak_bytes
