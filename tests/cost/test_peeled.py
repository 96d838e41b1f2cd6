"""What stands ahead of a loop whose first turn is peeled off."""

from __future__ import annotations

import pytest

from rhino_jax.cost.buffers import Unfolded
from rhino_jax.cost.peeled import ahead
from tests.cost.plans import BATCH, CHANNELS, DEVICES, HEADS, LENGTH, held_layers


def backward_loop(unfolded: Unfolded) -> int:
    return max(i for i, x in enumerate(unfolded.instructions) if x.kind == "scan")


def test_what_is_recomputed_runs_beside_the_loss_up_to_its_last_product() -> None:
    one = held_layers("data_parallel")
    loop = backward_loop(one.unfolded)
    (first, until, num_bytes), _ = ahead(one.unfolded, one.within)
    assert until == loop
    # All that the loop reads but its carry is there behind the forward loop.
    kinds = [x.kind for x in one.unfolded.instructions]
    assert first == kinds.index("scan") + 1
    # Queries, keys, values, scores, shares; no more than those, the layer's input, its
    # weights, the values' sums, and maxima and sums of rows.
    rows, row = BATCH // DEVICES * LENGTH, 4 * CHANNELS
    scores = rows * HEADS * LENGTH * 4
    least = 3 * rows * row + 2 * scores
    weights, sums = 4 * 4 * CHANNELS**2, 3 * rows * HEADS * 4
    assert least <= num_bytes <= least + 2 * rows * row + weights + sums


def test_a_gather_on_the_way_to_the_loop_is_hidden_behind_it() -> None:
    one = held_layers("zero3")
    loop = backward_loop(one.unfolded)
    (first, until, _), _ = ahead(one.unfolded, one.within)
    gathers = [
        i for i, x in enumerate(one.unfolded.instructions) if x.kind == "all-gather"
    ]
    assert (first, until) == (max(i for i in gathers if i < loop), loop)


@pytest.mark.parametrize("recipe", ["zero3", "data_parallel"])
def test_a_mask_is_made_whole_for_the_first_turn(recipe: str) -> None:
    one = held_layers(recipe)
    loop = backward_loop(one.unfolded)
    _, (_, until, num_bytes) = ahead(one.unfolded, one.within)
    assert until == loop + 1
    assert num_bytes == BATCH // DEVICES * HEADS * LENGTH**2


def test_only_what_compilers_peel_stands_ahead() -> None:
    assert held_layers("zero3").early
    assert not held_layers("zero3", "cpu").early
