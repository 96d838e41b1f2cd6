"""Sizes that do not divide, as GPT-2 XL has them: the price, and the same step."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.uneven import (
    EVEN,
    MOST_DEARER,
    SMALL,
    TOLERANCE,
    UNEVEN,
    difference,
    padded,
    planned,
)


def test_heads_and_vocabulary_are_padded_and_the_step_is_the_same() -> None:
    worst, leaves = difference("8")
    assert worst < TOLERANCE
    shapes = {leaf.shape for leaf in leaves}
    assert any(shape[1] == SMALL.heads for shape in shapes if len(shape) == 4)
    assert any(shape[-1] == SMALL.vocab for shape in shapes)


def test_a_flop_costs_little_more_than_where_sizes_divide() -> None:
    prices = []
    for cfg in (EVEN, UNEVEN):
        found = planned(replace(cfg, layers=2))
        assert found.predicted is not None
        flops = replace(cfg, layers=2).train_flops
        prices.append(found.predicted.step_seconds / flops)
    assert prices[1] < MOST_DEARER * prices[0]
    assert any(leaf.shape[-1] == UNEVEN.vocab for leaf in padded(found))
    assert any("50257 as 8 × 6288" in note for note in found.plan.notes)
