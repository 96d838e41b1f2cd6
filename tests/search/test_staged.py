"""Which scans can be pipelined, and what a plan of one is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.api.planned import subject_of
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.model import predict
from rhino_jax.ir.assignment import Assignment, boundary
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import STAGE, TIME, Mesh
from rhino_jax.ir.staged import Staged
from rhino_jax.rules import rule_of
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import ClusterPrices
from rhino_jax.search.staged import Scans, Uncut, fed, staged_scans
from rhino_jax.search.subject import Subject
from rhino_jax.trace import trace
from tests.layers import LAYERS, ROWS, make, normed, plain, sharing

MESH = Mesh.of(stage=2, data=2)
CLUSTER = parse_cluster("h100:1x4")


def subject(step: Callable[..., Any], state: Any, batch: Any) -> Subject:
    return subject_of(trace(step, [state, batch], {}, (), True, {}))


def planned(
    layer: Any, cut: Staged, mesh: Mesh = MESH
) -> tuple[Subject, Scans, Assignment]:
    """The step of ``layer``, pipelined."""
    one = subject(*make(layer, dtype="float32"))
    scans = staged_scans(one, cut)
    assert isinstance(scans, Scans), str(scans)
    prices = ClusterPrices(parse_cluster(f"h100:1x{mesh.num_devices}"))
    request = Request(mesh, prices)
    found = search(one, request, scans.staged).assignment
    done = fed(scans, one.program, found, mesh)
    assert isinstance(done, Assignment), str(done)
    return one, scans, done


@pytest.mark.parametrize(
    ("layer", "cut", "why"),
    [
        (sharing, Staged(3, 4), f"{LAYERS} layers do not divide by 3 stages"),
        (sharing, Staged(2, 3), f"3 microbatches do not divide {ROWS} examples"),
        (sharing, Staged(2, 1, 2), "at least as many microbatches as stages"),
        (normed, Staged(2, 4), "combines the examples|different examples|not linear"),
    ],
)
def test_refused_by_name(layer: Any, cut: Staged, why: str) -> None:
    found = staged_scans(subject(*make(layer, dtype="float32")), cut)
    assert isinstance(found, Uncut)
    with pytest.raises(ValueError, match=why):
        raise ValueError(str(found))


def test_a_carry_without_examples_is_refused() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        def loss_of(w: jax.Array) -> jax.Array:
            def layer(held: Any, w: jax.Array) -> Any:
                x, scale = held
                return (jnp.tanh(x @ w) * scale, scale * 0.5), None

            (out, _), _ = jax.lax.scan(layer, (x, jnp.float32(1)), w)
            return jnp.mean(out)

        return w - jax.grad(loss_of)(w)

    found = staged_scans(
        subject(step, jnp.ones((4, 8, 8)), jnp.ones((8, 8))), Staged(2, 2)
    )
    assert isinstance(found, Uncut)
    assert "holds no examples to pass on" in str(found)


def test_layers_are_split_outside_and_examples_inside() -> None:
    cut = Staged(2, 4)
    one, scans, done = planned(sharing, cut)
    for index in scans.ops:
        op, plan = one.program.ops[index], done.ops[index]
        wanted, given = boundary(one.program, op, plan, None)
        first = op.param["num_consts"] + op.param["num_carry"]
        carry = op.param["num_carry"]
        stack = (Split(STAGE, LAYERS // 2),)
        assert {x.dims[0] for x in (*wanted[first:], *given[carry:])} == {stack}
        assert all(x.operator(STAGE) for x in given[:carry])
        assert not any(TIME in x.axes for x in (*wanted, *given))
        (inner,) = plan.inner
        assert any(TIME in x.axes for x in inner.inputs)
        assert not any(STAGE in x.axes for x in (*inner.inputs, *inner.outputs))


def test_bubbles_are_priced() -> None:
    """Half the ticks of work do nothing with one microbatch for two stages."""
    few, many = (
        predict(one.program, done, MESH, CLUSTER, rule_of)
        for one, _, done in (planned(sharing, Staged(2, n)) for n in (1, 8))
    )
    assert few.flops > 1.5 * many.flops


def test_devices_leave_rows_to_every_microbatch() -> None:
    """16 rows in 8 microbatches: 4 devices side by side may split them in two only."""
    mesh = Mesh.of(stage=2, data=4)
    _, scans, done = planned(plain, Staged(2, 8), mesh)
    for index in scans.ops:
        (inner,) = done.ops[index].inner
        rows = [x for x in inner.inputs if x.find(TIME)]
        assert rows
        for layout in rows:
            dim, _ = layout.find(TIME) or (0, None)
            assert math.prod(mesh.size(s.axis) for s in layout.dims[dim][:-1]) <= 2
