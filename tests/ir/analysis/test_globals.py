"""Tied parameters, masks and memories."""

from __future__ import annotations

import pytest

from rhino_jax.ir.analysis.globals_ import global_values
from tests.ir.analysis.steps import zoo


@pytest.mark.parametrize("name", ["gpt_unrolled", "vit", "resnet", "moe"])
def test_chains_have_none(name: str) -> None:
    assert zoo(name).structure.globals_ == ()


def test_a_tied_embedding() -> None:
    found = zoo("gpt_scanned")
    (tied,) = found.structure.globals_
    assert (
        tied.value
        == found.program.inputs[
            found.traced.input_paths.index("state/params/embed/embedding")
        ]
    )
    assert (tied.is_parameter, tied.readers) == (True, (0, 2))


def test_what_all_layers_of_t5_read() -> None:
    """Both tables of positions, the shared embedding; bias, mask and memory."""
    found = zoo("t5")
    program = found.program
    names = {program.inputs[i]: found.named(i) for i in range(found.traced.num_inputs)}
    tied = [g for g in found.structure.globals_ if g.is_parameter]
    assert [names[g.value].removeprefix("state/params/") for g in tied] == [
        "decoder_bias/table",
        "embed/embedding",
        "encoder_bias/table",
    ]
    others = {
        program.values[g.value].shape
        for g in found.structure.globals_
        if not g.is_parameter
    }
    memory, padding, bias = (16, 16, 64), (16, 1, 1, 16), (1, 8, 16, 16)
    assert {memory, padding, bias} <= others


def test_few_readers_make_no_global() -> None:
    found = zoo("t5")
    known = found.structure
    for value in global_values(found.program, known.regions, known.blocks, few=5):
        assert value.is_parameter or len(value.readers) > 5
    assert len(known.globals_) > len(
        global_values(found.program, known.regions, known.blocks, few=5)
    )
