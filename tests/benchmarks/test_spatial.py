"""An image in blocks: found unasked where it pays, and the same step."""

from __future__ import annotations

import pytest

from benchmarks.models import unet
from benchmarks.spatial import (
    LARGE,
    TOLERANCE,
    difference,
    in_blocks,
    with_halos,
    without_halos,
)


@pytest.mark.parametrize("name", ["unet", "resnet"])
def test_a_step_in_blocks_is_the_undecorated_step(name: str) -> None:
    worst, count = difference(name)
    assert count > 4
    assert worst < TOLERANCE


def test_a_large_image_is_split_unasked() -> None:
    model = unet.build(LARGE, depth=1, dtype="bfloat16")
    whole, found = without_halos(model), with_halos(model)
    assert not list(in_blocks(whole.assignment, whole.subject.program))
    kinds = set(in_blocks(found.plan.assignment, found.traced.program))
    assert kinds == {"conv_general_dilated"}
    after, before = found.prediction(), whole.prediction
    assert after.step_seconds < before.step_seconds
    assert after.peak_bytes < before.peak_bytes
    layouts = {leaf.path: leaf.layout for leaf in found.plan.inputs}
    assert layouts["batch/images"].dims[1], "the height is split in what comes in"
