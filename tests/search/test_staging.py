"""A real step divided among stages: who runs what, and what crosses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import jax
import pytest

from benchmarks.models.branches import STEPS
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import between_parts, part
from rhino_jax.cost.model import predict
from rhino_jax.cost.stretches import op_seconds
from rhino_jax.errors import InfeasibleError
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.pipeline.chunks import Chunks, crossing
from rhino_jax.ir.pipeline.flow import (
    AFTER,
    BEFORE,
    LOOP,
    TOTAL,
    leaving,
    version_bytes,
)
from rhino_jax.ir.pipeline.labels import labels
from rhino_jax.rules import rule_of
from rhino_jax.search.choose import plan_recipe
from rhino_jax.search.microbatch import Refusal, microbatched
from rhino_jax.search.stages import cut_stages
from rhino_jax.search.staging import Divided, check_stages, problem_of, runs
from rhino_jax.search.subject import Subject
from rhino_jax.trace import trace

MESH = Mesh.of(data=2)
STAGES = ((0, 1), (2, 3), (4, 5))


@cache
def tied(microbatches: int = 4) -> tuple[Divided, Assignment]:
    """Tied embeddings and a clipped global norm, on a mesh of two devices."""
    step, state, batch = STEPS["tied"]("float32")
    traced = trace(step, jax.eval_shape(lambda *args: args, state, batch))
    subject = Subject(
        traced.program, traced.input_paths, traced.output_paths, traced.state_pairs
    )
    divided = Divided(subject)
    _, plain = plan_recipe(subject, MESH, "data_parallel", {})
    if microbatches == 1:
        return divided, plain
    owner = divided.segmentation.owner
    found = microbatched(subject, plain, MESH, microbatches, owner)
    assert not isinstance(found, Refusal), str(found)
    return divided, found[0]


def cut(stages: Sequence[Sequence[int]] = STAGES, split: bool = False) -> Chunks:
    divided, assignment = tied()
    return divided.chunks(assignment, stages, split)


def test_segments_halves_and_updates_are_labelled() -> None:
    divided, _ = tied()
    program, found = divided.subject.program, divided.segmentation
    stage_of = [k for k, held in enumerate(STAGES) for _ in held]
    named = labels(program, divided.regions, found, stage_of)
    for segment in found.segments:
        stage = stage_of[segment.index]
        assert {named[i].stage for i in segment.ops} == {stage}
        assert not any(named[i].backward for i in segment.forward)
        assert all(named[i].backward for i in (*segment.backward, *segment.update))
    # The count of steps is wanted by every update, and made of nothing but itself.
    assert any(named[i].spread and program.ops[i].kind == "add" for i in found.epilogue)
    # The updates of the tied embedding are on the first stage that reads it.
    embed = program.values[program.inputs[0]].shape
    large = [
        i
        for i in found.epilogue
        if program.values[program.ops[i].results[0]].shape == embed
    ]
    assert large
    assert {named[i].stage for i in large} == {0}


def test_gradients_of_a_tied_parameter_cross_once_a_step() -> None:
    divided, assignment = tied()
    program, wide = divided.subject.program, assignment.over(MESH)
    inputs = tuple(zip(program.inputs, assignment.inputs, strict=True))
    embed = program.values[program.inputs[0]].num_bytes
    chunks = cut()
    each, once = [], []
    for edge, phase, version in crossing(chunks, inputs):
        size = version_bytes(program, version, wide)
        (each if phase == LOOP else once).append((edge, size))
    # Activations of 16 examples, 8 tokens, 16 wide: of 2 devices and 4 microbatches.
    frontier = 16 * 8 * 16 * 4 // 8
    assert sorted(each) == [
        ((0, 1), frontier),
        ((1, 0), frontier),
        ((1, 2), frontier),
        ((2, 1), frontier),
    ]
    large = sorted(edge for edge, size in once if size == embed)
    assert large == [((0, 2)), ((2, 0))]


def test_with_its_parts_in_one_segment_a_sum_stays_in_the_loop() -> None:
    divided, assignment = tied()
    subject = divided.subject
    _, plain = plan_recipe(subject, MESH, "data_parallel", {})
    together = microbatched(subject, plain, MESH, 4)
    assert not isinstance(together, Refusal)
    loops = [one.loop for one in (assignment, together[0])]
    assert loops[0] is not None
    assert loops[1] is not None
    moved = set(loops[1].ops) - set(loops[0].ops)
    assert [subject.program.ops[i].kind for i in moved] == ["add_any"]
    totals = [sum(leaving(m) == TOTAL for m in loop.leave) for loop in loops if loop]
    assert totals[0] == totals[1] + 1


@pytest.mark.parametrize("split", [False, True])
def test_every_chunk_is_in_its_phase(split: bool) -> None:
    chunks = cut(split=split)
    keys = [c.key for c in chunks.chunks]
    assert keys == sorted(keys)
    assert {key.phase for key in keys} == {BEFORE, LOOP, AFTER}
    ran = [(c.units, c.key) for c in chunks.chunks]
    every = {n for units, _ in ran for n in units}
    assert every == set(range(len(chunks.flow.units)))
    sides = {chunks.side(key) for key in keys}
    assert ("weights" in sides) == split


def test_a_step_without_a_loop_is_cut_too() -> None:
    divided, plain = tied(1)
    chunks = divided.chunks(plain, STAGES, False)
    places = [c.key.place for c in chunks.chunks if c.key.phase == LOOP]
    assert places == list(range(6))


def test_runs_come_from_what_segments_cost() -> None:
    divided, assignment = tied()
    cluster = parse_cluster("h100:1x4")
    share = part(cluster, 2)
    spent = op_seconds(divided.subject.program, assignment, MESH, share, rule_of)
    loop = assignment.loop
    assert loop is not None
    # Gradients are reduced once, behind the loop: that is no op's of it.
    left = {divided.subject.program.producer[m.value] for m in loop.leave}
    assert {~op for op in spent if op < 0} <= left
    assert any(op < 0 for op in spent)
    whole = predict(divided.subject.program, assignment, MESH, share, rule_of)
    assert sum(spent.values()) == pytest.approx(whole.step_seconds)
    link = between_parts(cluster)
    problem = problem_of(divided, assignment, MESH, spent, "1f1b", 2, 1, link, 2**40)
    assert len(problem.segments) == divided.count
    assert all(one.forward_seconds > 0 for one in problem.segments)
    assert all(one.held_bytes > 0 for one in problem.segments)
    program = divided.subject.program
    inputs = sum(
        version_bytes(program, one, MESH)
        for one in zip(program.inputs, assignment.inputs, strict=True)
    )
    assert sum(one.held_bytes for one in problem.segments) > inputs
    held = runs(cut_stages(problem).starts, divided.count)
    assert [i for run in held for i in run] == list(range(divided.count))
    with pytest.raises(InfeasibleError, match="6 segments"):
        check_stages(divided, 7)
