"""Segments divide the ops, keep their order, and own what is theirs."""

from __future__ import annotations

import jax
import pytest

from benchmarks.models import FIRST
from rhino_jax.ir.analysis.regions import BACKWARD, FORWARD, RESIDUAL
from rhino_jax.ir.analysis.segments import EPILOGUE_OWNER, Segmentation
from tests.ir.analysis.steps import (
    Analyzed,
    analyzed,
    batch_shapes,
    mlp_loss,
    mlp_shapes,
    sgd,
    zoo,
)

GRAINS = ("fine", "blocks")


def division(found: Analyzed, grain: str) -> Segmentation:
    return found.structure.fine if grain == "fine" else found.structure.blocks


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", FIRST)
def test_every_op_belongs_to_one(name: str, grain: str) -> None:
    found = zoo(name)
    divided = division(found, grain)
    ops = [i for segment in divided.segments for i in segment.ops]
    ops += (*divided.prologue, *divided.epilogue)
    assert sorted(ops) == list(range(len(found.program.ops)))
    for segment in divided.segments:
        assert {divided.owner[i] for i in segment.ops} <= {segment.index}
        assert segment.forward, "a segment without a forward half"
    assert len(divided.segments) == len(divided.cuts) + 1


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", FIRST)
def test_segments_run_forward_and_then_back(name: str, grain: str) -> None:
    """What a forward op reads is made in an earlier segment or its own, what a
    backward op reads of the backward pass in a later one or its own."""
    found = zoo(name)
    program, known = found.program, found.structure.regions
    owner = division(found, grain).owner
    for index, op in enumerate(program.ops):
        for value in op.operands:
            maker = program.producer.get(value)
            if maker is None or owner[maker] < 0 or owner[index] < 0:
                continue
            if known.of[index] in (FORWARD, RESIDUAL):
                assert owner[maker] <= owner[index]
            elif known.of[index] == BACKWARD and known.of[maker] == BACKWARD:
                assert owner[maker] >= owner[index]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt_unrolled", "resnet", "t5", "moe"])
def test_gradients_are_made_in_the_segment_of_their_parameter(
    name: str, dtype: str
) -> None:
    """Also where all parameters are cast before the first segment (moe)."""
    found = zoo(name, dtype=dtype)
    program, known = found.program, found.structure.regions
    divided = found.structure.fine
    for segment in divided.segments:
        for position in segment.parameters:
            path = found.named(position)
            maker = program.producer[known.gradients[position]]
            assert divided.owner[maker] == segment.index, path
            new = program.outputs[found.pairs[position]]
            assert divided.owner[program.producer[new]] == segment.index, path


@pytest.mark.parametrize("name", ["gpt_unrolled", "vit"])
def test_cotangents_cross_where_the_frontier_does(name: str) -> None:
    """One cotangent of the residual stream enters the backward half of a segment."""
    found = zoo(name)
    program, known = found.program, found.structure.regions
    divided = found.structure.fine
    for segment in divided.segments[:-1]:
        made = {
            v
            for i in known.ops(BACKWARD)
            if divided.owner[i] > segment.index
            for v in program.ops[i].results
        }
        read = {v for i in segment.backward for v in program.ops[i].operands}
        (cotangent,) = (made & read) - known.uniform
        (frontier,) = segment.exit
        assert program.values[cotangent].shape == program.values[frontier].shape


def test_a_chain_of_layers() -> None:
    """Each layer: product, bias, tanh, sum; two parameters; two updates of two ops."""

    def step(params: object, batch: object) -> object:
        loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
        return sgd(params, grads), loss

    found = analyzed(step, mlp_shapes(3), batch_shapes())
    parts = found.structure.fine.segments
    assert [segment.parameters for segment in parts] == [(0, 1), (2, 3), (4, 5)]
    assert [len(segment.update) for segment in parts] == [4, 4, 4]
    assert found.structure.fine.epilogue == ()
    assert parts[0].exit == parts[1].entry
    assert parts[1].exit == parts[2].entry
    kinds = {
        half: [found.program.ops[i].kind for i in getattr(parts[1], half)]
        for half in ("forward", "backward")
    }
    assert kinds["forward"].count("dot_general") == 1
    assert kinds["backward"].count("dot_general") == 2


def test_the_norm_of_all_gradients_is_the_epilogues() -> None:
    """Squares and their sums are each segment's own; the scalars are nobody's."""
    found = zoo("gpt_scanned")
    program, divided = found.program, found.structure.blocks
    shared = [program.ops[i] for i in divided.epilogue]
    assert any(
        op.kind == "sqrt" and program.shapes(op.results) == ((),) for op in shared
    )
    sums = [i for i, op in enumerate(program.ops) if op.kind == "reduce_sum"]
    assert EPILOGUE_OWNER not in {
        divided.owner[i]
        for i in sums
        if program.values[program.ops[i].operands[0]].shape == (4, 64)
    }
