"""Pipelines from the decorator: the undecorated step, run stage by stage."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from benchmarks.equality import worst_leaf
from benchmarks.models import materialize
from benchmarks.models.branches import STEPS
from rhino_jax import errors
from rhino_jax.api.passing import passing
from rhino_jax.api.pipelined import PipelinePlanned
from rhino_jax.ir.pipeline.flow import LOOP
from rhino_jax.plan import Plan
from rhino_jax.runtime.controller import Controller
from rhino_jax.runtime.tasks import Free, Run, Task, flat
from rhino_jax.schedule.memory import in_flight
from tests.api.pipes import check_equal, mesh

WORKERS = {"cache_dir": "", "microbatches": 4, "recipe": "data_parallel"}


# ---- equal --------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "stages", "schedule", "axes", "recipe"),
    [
        ("tied", 2, "gpipe", {"data": 2, "tensor": 2}, "zero3"),
        ("tied", 4, "zero_bubble", {"data": 2}, "zero3"),
        ("unet", 4, "interleaved", {}, ""),
        ("towers", 4, "circular", {"data": 2}, "data_parallel"),
        ("towers", 2, "eager_1f1b", {}, ""),
    ],
)
def test_branching_steps(
    name: str, stages: int, schedule: str, axes: dict[str, int], recipe: str
) -> None:
    step, state, batch = STEPS[name]("float64")
    looped = schedule in ("interleaved", "circular")
    piped = rhino.auto_parallel(
        pipeline_stages=stages,
        microbatches=4,
        schedule=schedule,
        mesh=mesh(stages // 2 if looped else stages, **axes),
        recipe=recipe,
        cache_dir="",
    )(step)
    check_equal(step, state, batch, piped)


@pytest.mark.usefixtures("x64")
def test_a_transformer_of_the_zoo() -> None:
    step, state, batch = materialize("gpt_unrolled", dtype="float64", depth=1)
    piped = rhino.auto_parallel(
        pipeline_stages=2,
        recipe="megatron",
        mesh={"data": 2, "tensor": 2},
        microbatches=4,
        donate=False,
        cache_dir="",
    )(step)
    check_equal(step, state, batch, piped)


@pytest.mark.usefixtures("x64")
def test_examples_that_meet_are_one_microbatch() -> None:
    step, state, batch = STEPS["clip"]("float64")
    options = {"pipeline_stages": 2, "recipe": "data_parallel", "cache_dir": ""}
    piped = rhino.auto_parallel(**options)(step)
    planned = piped.planned(state, batch)
    assert planned.plan.microbatches == 1
    assert "one microbatch" in planned.plan.notes[0]
    check_equal(step, state, batch, piped)
    with pytest.raises(errors.InfeasibleError, match="different examples meet"):
        rhino.plan(step, state, batch, microbatches=4, **options)


def test_dropout_bits_and_rows_of_every_microbatch() -> None:
    """Random bits of a microbatch are those of the whole draw; rows come together."""

    def step(params: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> Any:
            x = batch["x"]
            keys = jax.random.split(jax.random.key(batch["seed"]), len(params))
            for w, key in zip(params, keys, strict=True):
                kept = jax.random.bernoulli(key, 0.75, x.shape)
                x = jnp.where(kept, jnp.tanh(x @ w), 0)
            losses = jnp.mean((x - batch["y"]) ** 2, axis=-1)
            return jnp.mean(losses), losses

        (_, losses), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), losses

    rng = np.random.default_rng(0)
    params = [rng.normal(size=(8, 8)).astype(np.float32) for _ in range(4)]
    batch = {name: rng.normal(size=(16, 8)).astype(np.float32) for name in "xy"}
    batch["seed"] = np.int32(3)
    piped = rhino.auto_parallel(pipeline_stages=2, **WORKERS)(step)
    found, losses = piped(params, batch)
    expected, wanted = jax.jit(step)(params, batch)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- where things are ---------------------------------------------------------------


def test_a_stage_holds_its_own_state_only() -> None:
    step, state, batch = STEPS["tied"]()
    piped = rhino.auto_parallel(pipeline_stages=2, **WORKERS)(step)

    def init(_: jax.Array) -> Any:
        return jax.tree.map(jnp.asarray, state)

    held = piped.init(init, jax.random.key(0), batch)
    halves = [frozenset(jax.devices()[:4]), frozenset(jax.devices()[4:])]
    ends = held[0]["embed"], held[0]["layers"][-1]["up"]
    first, last = (x.sharding.device_set for x in ends)
    assert [first, last] == halves
    slots = held[1][1][0].mu["layers"][-1]["up"].sharding.device_set
    assert slots == halves[1]
    worst, _ = worst_leaf(state, held)
    assert worst == 0
    laid = piped.shard_batch(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is moved, every donation is used
        now, _ = piped(held, laid)
        again, _ = piped(now, batch)
    for before, after in zip(*map(jax.tree.leaves, (now, again)), strict=True):
        assert before.is_deleted()
        assert before.sharding == after.sharding
    with pytest.raises(errors.DonationError, match="test_pipeline"):
        piped(held, batch)


def test_the_state_is_kept_where_it_is_not_to_be_donated() -> None:
    step, state, batch = STEPS["towers"]()
    piped = rhino.auto_parallel(pipeline_stages=2, donate=False, **WORKERS)(step)
    held = piped.place(state, batch)
    first, _ = piped(held, batch)
    second, _ = piped(held, batch)
    assert worst_leaf(first, second)[0] == 0


def test_what_is_returned_twice_or_handed_through() -> None:
    step, state, batch = STEPS["towers"]()

    def averaged(held: Any, batch: Any) -> Any:
        (params, slots), _, frozen = held
        (params, slots), metrics = step((params, slots), batch)
        return ((params, slots), params, frozen), metrics

    copy = jax.tree.map(jnp.copy, state[0])
    piped = rhino.auto_parallel(pipeline_stages=2, **WORKERS)(averaged)
    now, wanted = piped.place((state, copy, jnp.arange(3.0)), batch), state
    for _ in range(3):
        now, _ = piped(now, batch)
        wanted, _ = jax.jit(step)(wanted, batch)
    error, path = worst_leaf((wanted, wanted[0], jnp.arange(3.0)), now)
    assert error < 1e-5, path


# ---- memory -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_no_worker_holds_more_than_its_bound(schedule: str) -> None:
    """Bytes alive on devices, seen by JAX, and microbatches held for backward."""
    step, state, batch = STEPS["tied"]()
    piped = rhino.auto_parallel(pipeline_stages=4, schedule=schedule, **WORKERS)(step)
    planned = piped.planned(state, batch)
    assert isinstance(planned, PipelinePlanned)
    held = piped.place(state, batch)
    laid = piped.shard_batch(batch)
    given = jax.tree.leaves((held, laid))
    others = {id(x) for x in jax.live_arrays()} - {id(x) for x in given}
    graph, seen = planned.graph, []

    class Watch:
        def began(self) -> None: ...

        def handed(self, task: Task, made: Sequence[Any]) -> None:
            seen.append(
                bytes_by_worker(x for x in jax.live_arrays() if id(x) not in others)
            )

    traced = planned.traced
    controller = Controller(graph, planned.programs, traced.donated, Watch())
    outs = controller((*jax.tree.leaves(((held, laid), {})), *traced.constants))
    assert len(seen) == len(graph.tasks)
    # The batch stays with its owner; microbatches have numbers; a scalar is as good as
    # nothing.
    beside = bytes_by_worker(jax.tree.leaves(laid))
    for worker, bound in enumerate(graph.peaks):
        found = max(alive[worker] for alive in seen)
        assert 0.8 * bound < found <= bound + beside[worker] + 64
    kept, most = _kept(planned), in_flight(planned.schedule)
    assert kept[0] == most[0]
    assert all(n <= limit for n, limit in zip(kept, most, strict=True))
    del outs


def bytes_by_worker(arrays: Iterable[jax.Array]) -> Counter[int]:
    """Bytes on each device of workers of two devices. (``addressable_shards`` would
    make arrays that are alive themselves.)"""
    found: Counter[int] = Counter()
    for x in arrays:
        if not x.is_deleted():
            size = int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
            found[min(d.id for d in x.sharding.device_set) // 2] += size
    return found


def _kept(planned: PipelinePlanned) -> list[int]:
    """The most microbatches whose forward half a worker keeps something of."""
    graph, held = planned.graph, [set[tuple[int, int]]() for _ in range(4)]
    most = [0] * 4
    for task in graph.tasks:
        here = held[task.worker]
        if isinstance(task, Run) and task.key.phase == LOOP and not task.start:
            side = planned.programs.chunks.side(task.key)
            if side == "forward":
                here |= {(task.microbatch or 0, slot) for slot in task.gives}
        gone = set(flat(task.takes)) if isinstance(task, Free) else set()
        held[task.worker] = {one for one in here if one[1] not in gone}
        totals = {s for s, slot in enumerate(graph.slots) if slot.total}
        alive = {m for m, slot in held[task.worker] if slot not in totals}
        most[task.worker] = max(most[task.worker], len(alive))
    return most


def test_nothing_is_left_after_many_steps() -> None:
    step, state, batch = STEPS["towers"]()
    piped = rhino.auto_parallel(pipeline_stages=2, **WORKERS)(step)
    held = piped.place(state, batch)
    counts = []
    for _ in range(21):
        held, metrics = piped(held, batch)
        counts.append(len(jax.live_arrays()))
    assert np.isfinite(float(metrics["loss"]))
    assert counts[0] == counts[-1]


# ---- plans --------------------------------------------------------------------------


def test_a_plan_prints_and_comes_back(tmp_path: Path) -> None:
    step, state, batch = STEPS["tied"]()
    options = {"pipeline_stages": 4, "schedule": "interleaved", **WORKERS}
    planned = rhino.plan(step, state, batch, **options)
    text = str(planned)
    assert "4 stages (2 a worker), interleaved · each on mesh (data=4)" in text
    assert "sent each microbatch" in text
    planned.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == planned.plan
    assert "segments" in str(rhino.plan(step, state, batch, plan=loaded))
    other = rhino.plan(step, state, batch, **{**options, "schedule": "circular"})
    assert any("stages: 4 stages" in line for line in planned.diff(other))
    bound = rhino.auto_parallel(plan=loaded, cache_dir="")(step)
    assert bound.planned(state, batch).plan == planned.plan


def test_the_schedule_is_drawn_on_the_predicted_clock(tmp_path: Path) -> None:
    step, state, batch = STEPS["towers"]()
    planned = rhino.plan(step, state, batch, pipeline_stages=2, cache_dir="")
    assert isinstance(planned, PipelinePlanned) and planned.predicted is not None
    planned.timeline(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    kinds = {task.kind for task in planned.schedule.tasks}
    runs = [e for e in events if e["ph"] == "X" and e["cat"] in kinds]
    assert len(runs) == len(list(planned.schedule.tasks))
    end = max(e["ts"] + e["dur"] for e in runs)
    assert 0 < end <= planned.predicted.step_seconds * 1e6 * (1 + 1e-9)
    with pytest.raises(errors.OptionsError, match="pipeline_stages"):
        rhino.plan(step, state, batch, cache_dir="").timeline(tmp_path / "none.json")


def test_kept_plans_are_kept_apart(tmp_path: Path) -> None:
    step, state, batch = STEPS["towers"]()
    folder = str(tmp_path)
    kinds = [
        {},
        {"pipeline_stages": 2},
        {"pipeline_stages": 2, "schedule": "gpipe"},
        {"pipeline_stages": 4},
    ]
    plans = [rhino.plan(step, state, batch, cache_dir=folder, **k).plan for k in kinds]
    assert len(list(tmp_path.rglob("*.json"))) == len(kinds)
    again = [rhino.plan(step, state, batch, cache_dir=folder, **k).plan for k in kinds]
    assert plans == again
    explained = rhino.plan(
        step, state, batch, cache_dir=folder, pipeline_stages=2
    ).explain("state/0/left/0/up")
    assert "planned" in explained
    predicted = plans[1].predicted
    assert predicted is not None
    assert 0 < predicted.peak_bytes <= predicted.limit_bytes


def test_lowered_programs_of_described_devices() -> None:
    step, state, batch = STEPS["tied"]()
    shapes = jax.eval_shape(lambda *args: args, state, batch)
    planned = rhino.plan(
        step, *shapes, pipeline_stages=2, microbatches=4, cluster="h100:2x8"
    )
    lowered = planned.lower()
    names = [one.as_text().split("@")[1].split()[0] for one in lowered]
    assert any("forward_0" in name for name in names)
    assert any("backward_1" in name for name in names)
    assert planned.plan.num_devices == 16
    with pytest.raises(errors.VerifyError, match="gives each"):
        planned.verify()
    with pytest.raises(errors.MeshError, match="16 devices"):
        planned.attached()


# ---- errors -------------------------------------------------------------------------


def towers_error(kind: type[Exception], match: str, **options: Any) -> None:
    step, state, batch = STEPS["towers"]()
    with pytest.raises(kind, match=match):
        rhino.plan(step, state, batch, cache_dir="", **options)


def test_what_can_not_be_is_said() -> None:
    towers_error(errors.InfeasibleError, "8 segments|7 segments", pipeline_stages=8)
    towers_error(errors.MeshError, "do not divide the 8 devices", pipeline_stages=3)
    towers_error(
        errors.OptionsError,
        "did you mean '1f1b'",
        pipeline_stages=2,
        schedule="1f2b",
    )
    towers_error(
        errors.OptionsError,
        "a multiple of 2",
        pipeline_stages=3,
        schedule="interleaved",
    )
    towers_error(
        errors.OptionsError, "only circular", pipeline_stages=2, schedule="gpipe:2"
    )
    towers_error(
        errors.OptionsError, "lowering='auto'", pipeline_stages=2, lowering="auto"
    )
    towers_error(
        errors.InfeasibleError,
        "do not divide the 16 examples",
        pipeline_stages=2,
        microbatches=3,
    )
    towers_error(
        errors.MeshError, 'named "stage"', pipeline_stages=2, mesh=_flat_mesh()
    )
    towers_error(
        errors.MeshError,
        "sizes must multiply to 4",
        pipeline_stages=2,
        mesh={"data": 8},
    )
    towers_error(
        errors.InfeasibleError,
        "fits under 1f1b",
        pipeline_stages=2,
        recipe="data_parallel",
        memory_limit_bytes=20_000,
    )


def _flat_mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices(), object), ("data",))


def test_a_pipeline_is_followed_by_a_step_on_all_devices() -> None:
    step, state, batch = STEPS["towers"]()
    piped = rhino.auto_parallel(pipeline_stages=2, **WORKERS)(step)
    held = piped.place(state, batch)
    evaluate = rhino.follow(piped, lambda state, batch: step(state, batch)[1])
    with pytest.warns(UserWarning, match="moved"):
        found = evaluate(held, batch)
    wanted = jax.jit(step)(state, batch)[1]
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    np.testing.assert_allclose(evaluate(held, batch)["loss"], found["loss"], rtol=1e-6)
    assert len(found["loss"].sharding.device_set) == 8


def test_an_error_names_the_stage_and_the_microbatch() -> None:
    step, state, batch = STEPS["towers"]()
    piped = rhino.auto_parallel(pipeline_stages=2, **WORKERS)(step)
    planned = piped.planned(state, batch)
    run = planned.jit_call(passing(planned.traced.in_tree, ()))
    assert run.__name__ == "train_step"
    assert isinstance(planned, PipelinePlanned)
    controller = Controller(planned.graph, planned.programs)

    def fail(*args: Any) -> Any:
        raise FloatingPointError("not a number")

    key = planned.programs.chunks.key_of("backward", 1)
    controller.programs = {**controller.programs, (key, False): fail}
    leaves = jax.tree.leaves(((state, batch), {}))
    with pytest.raises(FloatingPointError) as caught:
        controller((*leaves, *planned.traced.constants))
    (note,) = caught.value.__notes__
    assert "backward half of stage 1" in note
    assert "microbatch 0" in note


def test_what_is_no_number_names_the_line_that_made_it() -> None:
    def step(params: Any, x: Any) -> Any:
        def loss_of(params: Any) -> Any:
            hidden = jnp.tanh(jnp.tanh(x @ params[0]) @ params[1])
            hidden = jnp.tanh(hidden @ params[2])
            return jnp.mean(jnp.log(hidden - 2) @ params[3])  # of less than nothing

        loss, grads = jax.value_and_grad(loss_of)(params)
        return jax.tree.map(lambda p, g: p - g, params, grads), loss

    rng = np.random.default_rng(0)
    params = [rng.normal(size=(8, 8)).astype(np.float32) for _ in range(4)]
    x = rng.normal(size=(16, 8)).astype(np.float32)
    piped = rhino.auto_parallel(pipeline_stages=2, **WORKERS)(step)
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        piped(params, x)
    notes = " ".join(caught.value.__notes__)
    assert "forward half of stage 1 on worker 1, microbatch 0 of step" in notes
    line = step.__code__.co_firstlineno + 4
    assert f"first made by log at test_pipeline.py:{line}" in notes
