"""The search on whole steps: known optima, determinism, pins, and its own bounds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import linked
from rhino_jax.errors import InfeasibleError, PinError
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search import auto, planner
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Wish
from rhino_jax.search.choose import plan_recipe
from rhino_jax.search.descend import orders
from rhino_jax.search.energy import Energy
from rhino_jax.search.planner import (
    Request,
    energy_of,
    read,
    repeats,
    search,
    ties_of,
)
from rhino_jax.search.prices import AlphaBeta, ClusterPrices
from rhino_jax.search.recipes import RECIPES
from rhino_jax.search.remat import BOUNDARY, NONE, apply_remat
from rhino_jax.search.remat_scans import REMATERIALIZE
from rhino_jax.search.subject import Subject
from rhino_jax.sent import collectives
from tests.search.steps import (
    ATTENTION,
    MICROBATCHES,
    MLP,
    MOE,
    PLAIN_PARAMS,
    WIDTH,
    accumulated,
    f32,
    plain_loss,
    rows_outside,
    state_of,
    subject_of,
)

BATCHES = {"x": f32(1024, WIDTH), "y": f32(1024, WIDTH)}
STEPS = {"mlp": MLP, "attention": ATTENTION, "moe": MOE}


def sent(subject: Any, assignment: Any, mesh: Mesh) -> int:
    return sum(c.total_bytes for c in collectives(subject.program, assignment, mesh))


def by_bytes(mesh: Mesh, **more: Any) -> Request:
    return Request(mesh, AlphaBeta(alpha=dict.fromkeys(mesh.names, 0.0)), **more)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_search_sends_no_more_than_a_recipe(name: str, recipe: str) -> None:
    """With the recipe's own inputs and no product done twice, nothing is cheaper."""
    fun, state, batch = STEPS[name]
    subject, mesh = subject_of(fun, state, batch), Mesh.of(data=2, tensor=2)
    placement, assignment = plan_recipe(subject, mesh, recipe, {})
    placed = dict(enumerate(placement.inputs))
    found = search(subject, by_bytes(mesh, placed=placed))
    assert sent(subject, found.assignment, mesh) <= sent(subject, assignment, mesh)
    assert found.assignment.inputs == placement.inputs


def test_one_axis_is_solved_to_its_optimum() -> None:
    fun, state, batch = MLP
    found = search(subject_of(fun, state, batch), by_bytes(Mesh.of(data=4)))
    assert found.answer.proven


def test_rows_of_a_microbatch_keep_their_split_in_blocks() -> None:
    """The batch is exchanged once, before the user's loop; gradients after it."""
    step = accumulated(plain_loss, rows_outside)
    subject = subject_of(step, state_of(PLAIN_PARAMS), BATCHES)
    whole = {i: Layout.replicated(len(subject.shape(i))) for i in subject.pairs}
    mesh = Mesh.of(data=4)
    found = search(subject, by_bytes(mesh, placed=whole, replicate_heavy=False))
    reduced = [
        c
        for c in collectives(subject.program, found.assignment, mesh)
        if c.shape and c.kind in ("all-reduce", "reduce-scatter")
    ]
    assert reduced and all(c.count < MICROBATCHES for c in reduced)


@pytest.mark.parametrize("name", STEPS)
def test_a_written_plan_costs_what_the_answer_says(name: str) -> None:
    """Bytes of the Assignment's collectives are those that the search paid for."""
    fun, state, batch = STEPS[name]
    subject, mesh = subject_of(fun, state, batch), Mesh.of(data=2, tensor=2)
    found = search(subject, by_bytes(mesh, replicate_heavy=False))
    paid = found.answer.ticks / AlphaBeta().ticks_per_second
    written = sent(subject, found.assignment, mesh)
    assert written <= paid * 1.001 + 1


def test_memory_that_costs_is_sharded() -> None:
    fun, state, batch = MLP
    subject, mesh = subject_of(fun, state, batch), Mesh.of(data=4)
    free = search(subject, by_bytes(mesh, replicate_heavy=False))
    dear = search(subject, by_bytes(mesh, memory_weight=100.0))
    matrices = [i for i in subject.pairs if len(subject.shape(i)) > 1]
    assert all(dear.assignment.inputs[i].axes for i in matrices)
    assert sent(subject, dear.assignment, mesh) >= sent(subject, free.assignment, mesh)


def test_pins_hold_and_the_rest_is_filled_in() -> None:
    fun, state, batch = MLP
    subject, mesh = subject_of(fun, state, batch), Mesh.of(data=2, tensor=2)
    pins = {"params/head": (("tensor",), ())}
    found = search(subject, by_bytes(mesh, pins=pins))
    at = next(i for i, p in enumerate(subject.input_paths) if p.endswith("params/head"))
    assert found.assignment.inputs[at].dims[0][0].axis == "tensor"
    with pytest.raises(PinError, match="heed"):
        search(subject, by_bytes(mesh, pins={"params/heed": (("tensor",),)}))


def test_a_named_value_is_pinned_inside_a_loop() -> None:
    fun, state, batch = MLP
    subject, mesh = subject_of(fun, state, batch), Mesh.of(data=2, tensor=2)
    found = search(subject, by_bytes(mesh, pins={"hidden": ((), ("tensor",))}))
    energy: Energy = found.energy
    named = [
        v
        for v, var in enumerate(energy.graph.vars)
        if var.op is not None and var.op.kind == "name"
    ]
    assert named
    for v in named:
        (layout,) = found.meaning(v).gives
        assert [s.axis for s in layout.dims[-1]] == ["tensor"]


def wish(cluster: str, **more: Any) -> Wish:
    made = parse_cluster(cluster)
    meshes = (Mesh.of(x=made.num_devices),)
    limit = more.pop("limit_bytes", made.device.memory_bytes)
    return Wish(made, meshes, limit, **more)


def test_what_can_not_fit_says_the_bytes_short() -> None:
    fun, state, batch = MLP
    subject = subject_of(fun, state, batch)
    with pytest.raises(InfeasibleError) as caught:
        plan_search(subject, wish("h100:1x4", limit_bytes=1000))
    text = str(caught.value)
    assert "too much" in text and "devices" in text and "peak" in text
    assert "or raise memory_limit_bytes" in text
    asked = wish("h100:1x4", limit_bytes=1000, more_memory="free some")
    with pytest.raises(InfeasibleError, match="or free some, shorten the batch"):
        plan_search(subject, asked)


def test_a_limit_is_kept_by_sharding() -> None:
    fun, state, batch = MLP
    subject = subject_of(fun, state, batch)
    free = plan_search(subject, wish("cpu:4")).best.prediction
    limit = int(free.peak_bytes * 0.8)
    tight = plan_search(subject, wish("cpu:4", limit_bytes=limit)).best
    assert tight.prediction.peak_bytes <= limit
    assert tight.prediction.step_seconds >= free.step_seconds


def test_microbatches_that_do_not_divide_are_refused() -> None:
    fun, state, batch = MLP
    subject = subject_of(fun, state, batch)
    with pytest.raises(InfeasibleError, match="7 microbatches do not divide"):
        plan_search(subject, wish("h100:1x4", microbatches=7))


def test_nothing_is_tied_where_nothing_is_equal() -> None:
    reading = read(subject_of(*ATTENTION))
    assert ties_of(reading.subject.program, (), {}).ops == {}
    mesh = linked(parse_cluster("h100:1x4"), Mesh.of(x=4))
    prices = ClusterPrices(parse_cluster("h100:1x4"))
    energy = energy_of(reading, Request(mesh, prices))
    assert len(energy.graph.vars) == len(energy.kinds)


def unrolled(layers: int) -> Subject:
    """Shapes of a residual network whose layers stand one by one."""

    def step(params: Any, x: Any) -> Any:
        def loss_of(params: Any) -> Any:
            h = x
            for layer in params:
                h = h + jnp.tanh(h @ layer["up"]) @ layer["down"]
            return jnp.mean(h**2)

        loss, grads = jax.value_and_grad(loss_of)(params)
        return jax.tree.map(lambda p, g: p - g, params, grads), loss

    array = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    layer = {"up": array((64, 256)), "down": array((256, 64))}
    return subject_of(step, [layer] * layers, array((128, 64)))


@pytest.mark.parametrize("policy", [NONE, BOUNDARY])
def test_equal_layers_share_their_variables(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "MOST_UNTIED_OPS", 0)

    def variables(layers: int) -> int:
        was = unrolled(layers)
        program = apply_remat(was.program, was.pairs, was.batch_inputs, policy)
        assert (program is was.program) == (policy == NONE)
        return len(read(replace(was, program=program)).graph.vars)

    assert variables(9) == variables(15)


def test_what_is_computed_again_is_decided_as_it_was() -> None:
    was = unrolled(6)
    assert not repeats(was.program).ops
    program = apply_remat(was.program, was.pairs, was.batch_inputs, BOUNDARY)
    found = repeats(program).ops
    assert len(found) == len(program.ops) - len(was.program.ops) - sum(
        op.kind == REMATERIALIZE for op in program.ops
    )
    for copy, first in found.items():
        assert first < copy
        assert program.ops[copy].source is program.ops[first].source
    sites = read(replace(was, program=program)).graph.sites
    assert all(sites[(), copy] == sites[(), first] for copy, first in found.items())


def test_nothing_between_is_tried_where_the_highest_price_does_not_fit() -> None:
    """Nor that price, where dividing everything could not make it fit."""
    subject = subject_of(*MLP)

    def tried(limit: int) -> dict[float, int]:
        search = auto._Search(subject, wish("cpu:4", limit_bytes=limit))
        found = search._with((NONE,), (1,))
        return {c.byte_seconds: c.prediction.peak_bytes for c in found}

    free = plan_search(subject, wish("cpu:4")).best.prediction.peak_bytes
    some = tried(int(free * 0.8))
    assert list(some)[1] == max(some) and len(some) > 2
    assert len(tried(some[max(some)] - 1)) == 2
    assert list(tried(1000)) == [0.0]


def test_orders_are_rotations_first() -> None:
    assert orders(3, 4) == [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)]


SCRIPT = """
from tests.search.steps import MOE, subject_of
from tests.search.test_planner import by_bytes
from rhino_jax.ir.mesh import Mesh
from rhino_jax.plan import make_plan
from rhino_jax.search.planner import search
subject = subject_of(*MOE)
mesh = Mesh.of(x=2, y=2)
found = search(subject, by_bytes(mesh, replicate_heavy=False))
paths = subject.input_paths, subject.output_paths
print(make_plan(subject.program, found.assignment, mesh, *paths).to_json())
"""


def test_plans_are_the_same_bytes_in_every_process() -> None:
    plans = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "123")
    ]
    assert plans[0] == plans[1] and len(plans[0]) > 1000
