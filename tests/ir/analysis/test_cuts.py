"""Cuts of networks whose blocks are known, and what every cut must hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.models import FIRST
from rhino_jax.ir.analysis.crossings import crossings
from rhino_jax.ir.analysis.cuts import MOST, Cut, cuts
from rhino_jax.ir.analysis.regions import FORWARD
from rhino_jax.ir.analysis.weight import heavy_values, is_heavy
from rhino_jax.rules.registry import HEAVY
from rhino_jax.trace import trace
from tests.ir.analysis.steps import (
    Analyzed,
    analyzed,
    batch_shapes,
    f32,
    mlp_loss,
    mlp_shapes,
    sgd,
    zoo,
)


def all_cuts(found: Analyzed, most: int = MOST) -> tuple[Cut, ...]:
    known = found.structure.regions
    return cuts(found.program, known, found.pairs, HEAVY, most)


def train(params: Any, batch: Any) -> Any:
    loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
    return sgd(params, grads), loss


def test_a_residual_chain_is_cut_at_each_sum() -> None:
    """Three layers have two sums between them; the batch itself is no frontier."""
    found = analyzed(train, mlp_shapes(3), batch_shapes())
    ends = [found.program.ops[cut.place - 1].kind for cut in all_cuts(found)]
    assert ends == ["add", "add"]
    shapes = [
        [found.program.values[v].shape for v in cut.frontier] for cut in all_cuts(found)
    ]
    assert shapes == [[(16, 8)]] * 2
    assert [cut.num_bytes for cut in all_cuts(found)] == [16 * 8 * 4] * 2


def test_values_that_are_cheap_to_make_again_do_not_count() -> None:
    """Ten masks of the batch and a cast of the parameters cross every place."""

    def forward(w: Any, x: Any) -> Any:
        masks = [x > i for i in range(10)]
        w = w.astype(jnp.bfloat16)
        for _ in range(3):
            x = x + jnp.tanh(x.astype(jnp.bfloat16) @ w).astype(x.dtype)
        return jnp.sum(sum(jnp.where(mask, x, 0.0) for mask in masks))

    def step(w: Any, x: Any) -> Any:
        loss, grad = jax.value_and_grad(forward)(w, x)
        return w - grad, loss

    found = analyzed(step, f32(8, 8), f32(16, 8))
    assert [len(cut.frontier) for cut in all_cuts(found)] == [1, 1]


def test_no_cut_carries_more_than_it_may() -> None:
    """Two streams that never meet before the end."""

    def forward(w: Any, x: Any) -> Any:
        a, b = x @ w, (x + 1.0) @ w
        for _ in range(3):
            a, b = a + jnp.tanh(a @ w), b + jnp.tanh(b @ w)
        return jnp.sum(a * b)

    def step(w: Any, x: Any) -> Any:
        loss, grad = jax.value_and_grad(forward)(w, x)
        return w - grad, loss

    found = analyzed(step, f32(8, 8), f32(16, 8))
    assert {len(cut.frontier) for cut in all_cuts(found)} == {1, 2}
    assert {len(cut.frontier) for cut in all_cuts(found, most=1)} == {1}
    assert all_cuts(found, most=0) == ()


@pytest.mark.parametrize("name", FIRST)
def test_a_frontier_is_all_that_is_heavy_and_read_behind(name: str) -> None:
    found = zoo(name)
    program, known = found.program, found.structure.regions
    heavy = heavy_values(program, known, found.pairs, HEAVY)
    begin = known.of.index("backward")
    ahead = [i for i, r in enumerate(known.of[:begin]) if r == FORWARD]
    places = [cut.place for cut in all_cuts(found)]
    assert places == sorted(set(places))
    for cut in all_cuts(found):
        made = {v for i in ahead if i < cut.place for v in program.ops[i].results}
        read = {v for i in ahead if i >= cut.place for v in program.ops[i].operands}
        assert set(cut.frontier) == made & read & heavy
        assert 0 < len(cut.frontier) <= MOST
        sizes = [program.values[v].num_bytes for v in cut.frontier]
        assert cut.num_bytes == sum(sizes)


BLOCKS = {"gpt_unrolled": 9, "vit": 9, "gpt_scanned": 2}
"""Attention and mlp of each of four layers end in a cut, a loop begins in one too."""


@pytest.mark.parametrize("name", BLOCKS)
def test_cuts_of_transformers_carry_the_residual_stream(name: str) -> None:
    found = zoo(name)
    assert len(all_cuts(found)) == BLOCKS[name]
    assert {len(cut.frontier) for cut in all_cuts(found)} == {1}


def test_decoders_carry_the_memory_until_it_is_last_read() -> None:
    found = zoo("t5")
    sizes = [len(cut.frontier) for cut in all_cuts(found)]
    assert sizes == [1] * 9 + [2] * 10 + [1] * 2


def test_crossings_are_counted_place_by_place() -> None:
    def chain(x: Any) -> Any:
        a = jnp.sin(x)
        b = jnp.cos(a)
        return a * b

    program = trace(chain, (f32(2),)).program
    a, b = (op.results[0] for op in program.ops[:2])
    found = crossings(program, frozenset((*program.inputs, a, b)), range(3))
    assert found.count == (0, 1, 2, 0)
    assert found.single == (0, 0, 1, 0)
    assert found.num_bytes == (0, 8, 16, 0)
    assert found.at([1, 2, 3]) == ((a,), (a, b), ())


def test_heavy_inside_a_body_is_heavy() -> None:
    def step(w: Any, x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=3)

    (op,) = (
        op for op in trace(step, (f32(4, 4), f32(2, 4))).program.ops if op.programs
    )
    assert is_heavy(op, HEAVY)
    assert not is_heavy(op, {"conv_general_dilated"})
