"""Equal segments, who corresponds to whom, and patterns that repeat."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.ir.analysis.classes import SegmentClass
from rhino_jax.ir.analysis.repeats import group_repeats
from tests.ir.analysis.steps import analyzed, batch_shapes, mlp_shapes, sgd, zoo


def multiplicities(classes: tuple[SegmentClass, ...]) -> list[int]:
    return sorted(c.multiplicity for c in classes)


@pytest.mark.parametrize("name", ["gpt_unrolled", "vit"])
def test_equal_layers_are_one_class(name: str) -> None:
    found = zoo(name).structure
    assert multiplicities(found.classes) == [1, 1, 4]
    assert multiplicities(found.fine_classes) == [1, 1, 4, 4]


def test_a_deep_network_has_no_more_classes() -> None:
    found = zoo("gpt_unrolled", 24).structure
    assert multiplicities(found.classes) == [1, 1, 24]


def test_inner_layers_of_two_stacks() -> None:
    """T5's first and last layers end or begin the sums over layers of the cotangents
    of its biases and memory; four of six are alike in each stack."""
    found = zoo("t5", 6).structure
    assert multiplicities(found.classes)[-3:] == [1, 4, 4]
    # Encoder attention and mlp; decoder attention, cross-attention and mlp.
    assert multiplicities(found.fine_classes)[-6:] == [1, 4, 4, 5, 5, 5]


def test_every_second_layer() -> None:
    found = zoo("moe", 8).structure
    counts = Counter(multiplicities(found.fine_classes))
    assert counts[8] == 1  # attention
    assert counts[4] >= 2  # feed-forward, and what a mixture is made of


@pytest.mark.parametrize("name", ["gpt_unrolled", "t5", "moe"])
def test_what_corresponds_is_alike(name: str) -> None:
    found = zoo(name)
    program = found.program
    known = [c for c in found.structure.fine_classes if c.multiplicity > 1]
    assert known
    for each in known:
        for other in range(1, each.multiplicity):
            values = each.value_map(0, other)
            for one, two in each.op_map(0, other).items():
                a, b = program.ops[one], program.ops[two]
                assert (a.kind, a.params, a.programs) == (b.kind, b.params, b.programs)
                assert tuple(values[v] for v in a.operands) == b.operands
                assert tuple(values[v] for v in a.results) == b.results
            for one, two in values.items():
                a_value, b_value = program.values[one], program.values[two]
                assert (a_value.shape, a_value.dtype) == (b_value.shape, b_value.dtype)
            segments = found.structure.fine.segments
            first, second = (segments[each.members[m]] for m in (0, other))
            assert tuple(values[v] for v in first.entry) == second.entry
            assert tuple(values[v] for v in first.exit) == second.exit


def train(activations: list[Any]) -> Any:
    def loss_fn(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for act, layer in zip(activations, params, strict=True):
            x = x + act(x @ layer["w"] + layer["b"])
        return jnp.mean(jnp.square(x - batch["y"]))

    def step(params: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return sgd(params, grads), loss

    return step


def members(activations: list[Any]) -> list[tuple[int, ...]]:
    shapes = mlp_shapes(len(activations))
    found = analyzed(train(activations), shapes, batch_shapes())
    return [c.members for c in found.structure.fine_classes]


def test_a_layer_with_another_function_is_no_member() -> None:
    layers = [jnp.tanh] * 3 + [jnp.sin] + [jnp.tanh] * 2
    # The first reads the batch itself, the last feeds the loss.
    assert members(layers) == [(0,), (1, 2, 4), (3,), (5,)]


def test_literals_do_not_tell_layers_apart() -> None:
    layers = [lambda x, k=k: jnp.tanh(k * x) for k in (1.5, 2.5, 3.5, 4.5)]
    assert members(layers) == [(0,), (1, 2), (3,)]


@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(1, 5))
def test_groups_cover_all_items_in_order(items: list[str], longest: int) -> None:
    groups = group_repeats(items, longest)
    assert [i for start, stop in groups for i in range(start, stop)] == [
        *range(len(items))
    ]
    assert all(0 < stop - start <= longest for start, stop in groups)


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        ("eAMAMAMh", "e AM AM AM h"),
        ("AAAA", "A A A A"),
        ("eABCABCABx", "e ABC ABC A B x"),
        ("AABAAB", "AAB AAB"),
        ("", ""),
    ],
)
def test_patterns(items: str, wanted: str) -> None:
    assert " ".join(items[a:b] for a, b in group_repeats(items)) == wanted
