"""Where compilers leave the order of a plan: products of a backward pass."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from rhino_jax.cost.buffers import Unfolded, unfold
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.order import kept_at_end, products_ahead, products_at
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.steps import ALL_REDUCE
from rhino_jax.rules import rule_of
from tests.cost.plans import ONE, f32, held_layers, planned, traced_whole, trained


def test_the_values_gradient_runs_behind_those_of_the_scores() -> None:
    # Read off XLA's GPU programs of a scanned GPT: the softmax's gradient, those of
    # queries and keys, then that of the values, right before what reads it.
    one = held_layers("data_parallel")
    body = one.within[max(one.within)].unfolded
    runs = {**products_at(body), **kept_at_end(body)}
    moved = products_ahead(body, runs)
    products = [i for i, x in enumerate(body.instructions) if x.kind == "dot_general"]
    ((values, place),) = moved.items()
    assert values in products
    readers = body.readers[body.instructions[values].writes[0]]
    assert place == min(runs[r] for r in readers)
    # Of queries and keys both, and of what these were made of.
    assert len([i for i in products if values < i < place and i not in runs]) >= 2


def converted(sent_behind: bool) -> Unfolded:
    """A product in a narrow type that is added to what is there later."""

    def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = (x.T @ x).astype(jnp.float32)
        return made + jnp.sort(jnp.sort(w)), jnp.sum(x)

    narrow = jax.ShapeDtypeStruct((512, 32), jnp.bfloat16)
    of, assignment = traced_whole(step, narrow, f32(32, 32))
    unfolded = unfold(of, assignment, ONE, rule_of)
    last = unfolded.instructions[-1]
    sent = replace(last, kind=ALL_REDUCE) if sent_behind else last
    return replace(unfolded, instructions=(*unfolded.instructions[:-1], sent))


def test_a_converted_product_waits_only_to_hide_what_is_sent() -> None:
    assert len(products_at(converted(sent_behind=True), apart=True)) == 1
    assert not products_at(converted(sent_behind=False), apart=True)
    assert len(products_at(converted(sent_behind=False))) == 1


def test_nothing_is_moved_that_something_else_waits_for() -> None:
    mesh, assignment = Mesh.of(data=4), planned("data_parallel", Mesh.of(data=4))
    of = unfold(trained().program, assignment, mesh, rule_of, (), HABITS["cuda"])
    assert products_ahead(of, {}) == {}
