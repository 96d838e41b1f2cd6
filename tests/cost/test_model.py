"""The whole prediction: its parts agree with the plan and with one another."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.memory import memory
from rhino_jax.cost.model import Prediction, predict
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.search.choose import plan_recipe
from rhino_jax.search.subject import Subject
from rhino_jax.sent import collectives
from rhino_jax.trace import Traced
from tests.cost.plans import LAYERS, planned, trained
from tests.ir.analysis.steps import zoo


def predicted(recipe: str, devices: int) -> Prediction:
    mesh = Mesh.of(data=devices)
    donated = tuple(trained().donated)
    cluster = parse_cluster(f"h100:1x{devices}")
    assignment = planned(recipe, mesh)
    return predict(trained().program, assignment, mesh, cluster, rule_of, donated)


@pytest.mark.parametrize("recipe", ["data_parallel", "zero1", "zero3"])
def test_the_parts_make_the_whole(recipe: str) -> None:
    found, mesh = predicted(recipe, 4), Mesh.of(data=4)
    assert found.step_seconds == found.compute_seconds + found.comm_seconds
    assert 0 < found.compute_seconds and 0 < found.comm_seconds
    assert found.comm_seconds == sum(one.total_seconds for one in found.collectives)
    donated = tuple(trained().donated)
    assignment = planned(recipe, mesh)
    habits = HABITS["cuda"]
    of = trained().program
    assert found.memory == memory(of, assignment, mesh, rule_of, donated, habits)
    assert found.peak_bytes == found.memory.peak_bytes
    assert found.fits
    steps = [s for move in assignment.moves() for s in move.steps if s.wire_bytes]
    cluster = parse_cluster("h100:1x4")
    for one, step in zip(found.collectives, steps, strict=True):
        assert (one.kind, one.wire_bytes) == (step.kind, step.wire_bytes)
        assert 0 < one.seconds <= step_seconds(step, mesh, cluster) * (1 + 1e-9)


def test_what_a_compiler_combines_waits_once() -> None:
    mesh = Mesh.of(data=4)
    of, assignment = trained().program, planned("data_parallel", mesh)
    steps = [s for move in assignment.moves() for s in move.steps if s.wire_bytes]
    found = predicted("data_parallel", 4).collectives
    _, *gradients = found
    assert len(gradients) == LAYERS
    *_, before, last = gradients
    two = replace(steps[-1], wire_bytes=before.wire_bytes + last.wire_bytes)
    gpus = parse_cluster("h100:1x4")
    assert before.seconds + last.seconds == pytest.approx(step_seconds(two, mesh, gpus))
    alone = sum(step_seconds(step, mesh, gpus) for step in steps)
    assert sum(one.seconds for one in found) < 0.6 * alone
    tpu = parse_cluster("v5e:2x2")
    apart = predict(of, assignment, mesh, tpu, rule_of).collectives
    assert [one.seconds for one in apart] == pytest.approx(
        [step_seconds(step, mesh, tpu) for step in steps]
    ), "a compiler of which that is not known"


def test_a_device_too_small_does_not_fit() -> None:
    found = predicted("zero3", 4)
    small = Prediction(**{**vars(found), "device_bytes": found.peak_bytes - 1})
    assert not small.fits


@pytest.mark.parametrize("recipe", ["data_parallel", "zero3"])
def test_more_devices_need_fewer_bytes_and_less_compute(recipe: str) -> None:
    found = [predicted(recipe, devices) for devices in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(found):
        # One device has no copies of gradients to reduce.
        assert more.peak_bytes < fewer.peak_bytes or fewer is found[0]
        assert more.compute_seconds < fewer.compute_seconds
        assert more.flops * 2 == fewer.flops
    assert found[0].comm_seconds == 0 == found[0].wire_bytes


def zoo_prediction(traced: Traced, recipe: str, mesh: Mesh) -> Prediction:
    subject = Subject(
        traced.program, traced.input_paths, traced.output_paths, traced.state_pairs
    )
    assignment = plan_recipe(subject, mesh, recipe, {})[1]
    cluster = parse_cluster(f"h100:1x{mesh.num_devices}")
    donated = tuple(traced.donated)
    found = predict(traced.program, assignment, mesh, cluster, rule_of, donated)
    written = list(collectives(traced.program, assignment, mesh))
    assert found.wire_bytes == sum(one.total_bytes for one in written)
    assert [(c.kind, c.axes, c.count) for c in found.collectives] == [
        (c.kind, c.axes, c.count) for c in written
    ]
    return found


@pytest.mark.parametrize("name", ["gpt_scanned", "moe"])
def test_models_of_the_zoo_are_predicted(name: str) -> None:
    traced = zoo(name).traced
    mesh = Mesh.of(data=8)
    data = zoo_prediction(traced, "data_parallel", mesh)
    zero = zoo_prediction(traced, "zero3", mesh)
    assert zero.memory.input_bytes < data.memory.input_bytes
    assert zero.flops == data.flops > 0
    assert data.peak_bytes > data.memory.input_bytes
    assert data.memory.at_peak


def test_the_same_prediction_every_time() -> None:
    assert predicted("zero3", 4) == predicted("zero3", 4)
