"""A ``shard_map`` of the user's in the step: obeyed, counted, searched around."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rhino_jax as rhino
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.model import predict
from rhino_jax.errors import MeshError, OptionsError, TraceError
from rhino_jax.rules import rule_of

ROWS, WIDTH, HIDDEN, EXPERTS = 16, 8, 32, 8
DATA, TENSOR = 2, 4


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    names = ("data", "tensor")[-len(sizes) :]
    devices = jax.devices()[: int(np.prod(sizes))]
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=auto, devices=devices)


def tensor_parallel(mesh: Any, **more: Any) -> Any:
    """Two products, the hidden dimension split: Megatron's block by hand."""

    def block(x: Any, up: Any, down: Any) -> Any:
        return lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    specs = (P("data"), P(None, "tensor"), P("tensor"))
    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P("data"), **more)


def ring(mesh: Any) -> Any:
    """``x up down``, rows of ``up`` going around while devices add their part."""

    def block(x: Any, up: Any, down: Any) -> Any:
        n, me = lax.axis_size("tensor"), lax.axis_index("tensor")
        wide = up.shape[0]

        def turn(held: Any, k: Any) -> Any:
            part, total = held
            mine = lax.dynamic_slice_in_dim(x, (me - k) % n * wide, wide, 1)
            on = lax.ppermute(part, "tensor", [(i, (i + 1) % n) for i in range(n)])
            return (on, total + mine @ part), None

        start = lax.pcast(jnp.zeros((len(x), HIDDEN), x.dtype), "data", to="varying")
        start = lax.pcast(start, "tensor", to="varying")
        (_, total), _ = lax.scan(turn, (up, start), jnp.arange(n))
        return lax.pmean(jnp.tanh(total) @ down, "tensor")

    specs = (P("data"), P("tensor"), P())
    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P("data"))


def experts(mesh: Any) -> Any:
    """Rows go to the devices of their experts and come back."""

    def block(x: Any, up: Any, down: Any) -> Any:
        mine = x.reshape(EXPERTS, -1, WIDTH)  # as if a router had sorted them
        sent = lax.all_to_all(mine, "tensor", 0, 1, tiled=True)
        done = jnp.einsum("ecd,edh->ech", sent, up)
        done = jnp.einsum("ech,ehd->ecd", jnp.tanh(done), down)
        return lax.all_to_all(done, "tensor", 1, 0, tiled=True).reshape(x.shape)

    rows = P(("data", "tensor"))
    specs = (rows, P("tensor"), P("tensor"))
    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=rows)


def state_of(kind: str) -> Any:
    rng = np.random.default_rng(0)
    wide = (EXPERTS,) if kind == "experts" else ()
    rows = 8 * ROWS if kind == "experts" else ROWS
    shapes = {
        "first": (WIDTH, WIDTH),
        "up": (*wide, WIDTH, HIDDEN),
        "down": (*wide, HIDDEN, WIDTH),
        "last": (WIDTH, 4),
    }
    state = {name: rng.normal(size=shape) / 3 for name, shape in shapes.items()}
    return state, rng.normal(size=(rows, WIDTH))


def train_step(block: Any, state: Any, x: Any) -> Any:
    def loss_of(state: Any) -> Any:
        h = jnp.tanh(x @ state["first"])
        h = h + block(h, state["up"], state["down"])
        return jnp.mean((h @ state["last"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state)
    return jax.tree.map(lambda p, g: p - g, state, grads), loss


def layers_step(block: Any, state: Any, x: Any) -> Any:
    """The same block three times in a scan, made again in the backward pass."""
    deep = {**state, **{n: jnp.stack([state[n]] * 3) for n in ("up", "down")}}

    def loss_of(state: Any) -> Any:
        @jax.checkpoint
        def layer(h: Any, weights: Any) -> Any:
            return h + block(h, *weights), None

        h, _ = lax.scan(layer, jnp.tanh(x @ state["first"]), (deep["up"], deep["down"]))
        return jnp.mean((h @ state["last"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state)
    return jax.tree.map(lambda p, g: p - g, state, grads), loss


BLOCKS = {
    "tensor_parallel": tensor_parallel,
    "unchecked": partial(tensor_parallel, check_vma=False),
    "ring": ring,
    "experts": experts,
}


def same(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_found_plan_is_the_undecorated_step(
    kind: str, x64: None, tmp_path: Path
) -> None:
    """Its plan is found, compiled as planned, and the same once it was written down."""
    step = partial(train_step, BLOCKS[kind](mesh_of(DATA, TENSOR)))
    args = state_of(kind)
    run = rhino.auto_parallel(step, cache_dir="", donate=False)
    want = jax.jit(step)(*args)
    same(run(*args), want)
    planned = run.planned(*args)
    assert planned.plan.mesh.shape == {"data": DATA, "tensor": TENSOR}
    checked = planned.verify()
    assert checked.ok, checked
    planned.plan.save(tmp_path / "plan.json")
    loaded = rhino.auto_parallel(step, plan=tmp_path / "plan.json", donate=False)
    assert loaded.planned(*args).plan == planned.plan


def sent(planned: Any) -> Counter[tuple[str, str]]:
    """Bytes a device sends in a step, by kind and axes."""
    found: Counter[tuple[str, str]] = Counter()
    for one in planned.plan.collectives:
        found[one.kind, *one.axes] += one.count * one.wire_bytes
    return found


def test_what_it_sends_is_counted_in_loops_too(x64: None) -> None:
    """Three layers in a scan, made again in the backward pass; and in the prediction.

    A psum of ``[ROWS / DATA, WIDTH]`` forward, one of the same size backward; those of
    the gradients for the weights fall away, since nothing reads them here.
    """
    step = partial(layers_step, tensor_parallel(mesh_of(DATA, TENSOR)))
    args = state_of("tensor_parallel")
    run = rhino.auto_parallel(step, cache_dir="", donate=False)
    same(run(*args), jax.jit(step)(*args))
    planned = run.planned(*args)
    each = 2 * ROWS // DATA * WIDTH * 8 * (TENSOR - 1) // TENSOR
    assert sent(planned)["all-reduce", "tensor"] == 3 * each + 3 * each
    assert planned.verify().ok
    plan = planned.plan
    cluster = parse_cluster("h100:1x8")
    args = planned.traced.program, plan.assignment, plan.mesh, cluster, rule_of
    predicted = predict(*args)
    assert [(c.kind, c.axes, c.count) for c in predicted.collectives] == [
        (c.kind, c.axes, c.count) for c in plan.collectives
    ]
    products = 2 * ROWS // DATA * WIDTH * HIDDEN // TENSOR
    assert predicted.flops > 3 * 6 * products  # inside, two forward and four backward


def test_axes_that_the_user_leaves_alone(x64: None) -> None:
    """What is not manual is done whole there, and constraints inside are let lie."""
    mesh = mesh_of(DATA, TENSOR)

    def block(x: Any, up: Any, down: Any) -> Any:
        inside = NamedSharding(jax.sharding.get_abstract_mesh(), P("data"))
        h = lax.with_sharding_constraint(x @ up, inside)
        return lax.psum(jnp.tanh(h) @ down, "tensor")

    specs = (P(), P(None, "tensor"), P("tensor"))
    partly = jax.shard_map(
        block, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"tensor"}
    )
    step, args = partial(train_step, partly), state_of("tensor_parallel")
    run = rhino.auto_parallel(step, cache_dir="", donate=False)
    same(run(*args), jax.jit(step)(*args))
    (note, *_) = run.planned(*args).plan.notes
    assert "is over tensor: done whole over data" in note


def over_four() -> Any:
    """A block over a mesh of four devices, whichever they are."""
    four = AbstractMesh((TENSOR,), ("tensor",), axis_types=(AxisType.Auto,))

    def block(x: Any, up: Any, down: Any) -> Any:
        return lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    specs = (P(), P(None, "tensor"), P("tensor"))
    return jax.shard_map(block, mesh=four, in_specs=specs, out_specs=P())


def test_the_mesh_is_found_around_that_of_the_user(x64: None) -> None:
    args = state_of("tensor_parallel")
    step = partial(train_step, over_four())
    run = rhino.auto_parallel(step, cache_dir="", donate=False)
    whole = partial(train_step, lambda x, up, down: jnp.tanh(x @ up) @ down)
    same(run(*args), jax.jit(whole)(*args))
    assert run.planned(*args).plan.mesh.shape == {"x": 2, "tensor": TENSOR}
    for options in ({"recipe": "data_parallel"}, {"cluster": "h100:2x8"}):
        plan = rhino.plan(step, *args, cache_dir="", **options).plan
        assert list(plan.mesh.shape.items())[-1] == ("tensor", TENSOR)


WIDE = AbstractMesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_what_can_not_be_is_said(x64: None) -> None:
    args = state_of("tensor_parallel")
    step = partial(train_step, tensor_parallel(mesh_of(DATA, TENSOR)))
    plan = partial(rhino.plan, step, *args, cache_dir="")
    wide = r"test_manual.py:\d+: shard_map over mesh \(data=1, tensor=8\)"
    place = r"test_manual.py:\d+: shard_map over mesh \(data=2, tensor=4\)"
    with pytest.raises(MeshError, match=r"\(data=2, tensor=4\), the plan's is .*=8"):
        plan(mesh={"data": 8})
    with pytest.raises(OptionsError, match=f"pipeline stages:\n  - {place}"):
        plan(pipeline_stages=2)
    with pytest.raises(MeshError, match=f"4 devices do not divide.*\n  - {place}"):
        plan(cluster="h100:1x4")
    with pytest.raises(rhino.RhinoError, match=r"shard_map at .*seen whole"):
        plan(microbatches=2)
    both = partial(train_step, lambda *a: over_four()(*a) + tensor_parallel(WIDE)(*a))
    with pytest.raises(MeshError, match=f"two sizes.*\n  - .*\n  - {wide}"):
        rhino.plan(both, *args, cache_dir="")
    timed = jax.shard_map(
        lambda x, *_: x, mesh=AbstractMesh((8,), ("time",)), in_specs=P(), out_specs=P()
    )
    with pytest.raises(MeshError, match="'time' is that of microbatches"):
        rhino.plan(partial(train_step, timed), *args, cache_dir="")

    def inner(x: Any, up: Any, down: Any) -> Any:
        more = jax.shard_map(
            lambda x: lax.psum(x, "tensor"),
            in_specs=P("tensor"),
            out_specs=P(),
            axis_names={"tensor"},
        )
        return jnp.tile(more(x), (TENSOR, 1))

    nested = jax.shard_map(
        inner,
        mesh=mesh_of(DATA, TENSOR),
        in_specs=(P("data"), P(), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with pytest.raises(TraceError, match=r"\d+: a shard_map inside a shard_map"):
        rhino.plan(partial(train_step, nested), *args, cache_dir="")
    step = partial(train_step, nested)  # JAX's partitioner takes it
    run = rhino.auto_parallel(step, cache_dir="", donate=False, lowering="auto")
    same(run(*args), jax.jit(step)(*args))


def test_it_is_kept_by_the_other_lowering(x64: None) -> None:
    args = state_of("tensor_parallel")
    step = partial(train_step, tensor_parallel(mesh_of(DATA, TENSOR)))
    options: Any = {"lowering": "auto", "mesh": {"data": DATA, "tensor": TENSOR}}
    run = rhino.auto_parallel(step, cache_dir="", donate=False, **options)
    same(run(*args), jax.jit(step)(*args))


def constrained(x: Any) -> Any:
    asked = NamedSharding(mesh_of(DATA, TENSOR), P("data", "tensor"))
    return jnp.sum(lax.with_sharding_constraint(2 * x, asked), 0)


def test_the_mesh_of_a_constraint_is_the_plans() -> None:
    """So that it is obeyed; with another mesh asked for it is a wish."""
    x = np.ones((ROWS, WIDTH), np.float32)
    for options in ({}, {"recipe": "data_parallel"}, {"cluster": "h100:1x8"}):
        planned = rhino.plan(constrained, x, cache_dir="", **options)
        assert planned.plan.mesh.shape == {"data": DATA, "tensor": TENSOR}
        assert not planned.plan.notes
    np.testing.assert_allclose(
        rhino.auto_parallel(constrained, cache_dir="")(x), 2 * np.sum(x, 0)
    )
    (note,) = rhino.plan(constrained, x, cache_dir="", mesh={"x": 8}).plan.notes
    assert "ignored" in note
    for count, shape in ((32, {"x": 4}), (2, {"x": 2})):
        plan = rhino.plan(constrained, x, cache_dir="", cluster=f"h100:1x{count}").plan
        assert dict(list(plan.mesh.shape.items())[:1]) == shape


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_under_a_mesh_of_jax(kind: Any, x64: None) -> None:
    """``jax.set_mesh`` around the call, of either kind of axes."""
    args = state_of("tensor_parallel")
    mesh = jax.make_mesh((DATA, TENSOR), ("data", "tensor"), axis_types=(kind,) * 2)
    block = tensor_parallel(None)

    def moved(x: Any, up: Any, down: Any) -> Any:
        if kind is AxisType.Auto:
            return block(x, up, down)
        x, up = jax.reshard(x, P("data")), jax.reshard(up, P(None, "tensor"))
        return jax.reshard(block(x, up, jax.reshard(down, P("tensor"))), P())

    step = partial(train_step, moved)
    with jax.set_mesh(mesh):
        run = rhino.auto_parallel(step, cache_dir="", donate=False)
        same(run(*args), jax.jit(step)(*args))
    assert run.planned(*args).plan.mesh.shape == {"data": DATA, "tensor": TENSOR}


def test_ragged_rows_count_as_if_all_were_sent() -> None:
    """How many rows go where is known when it runs; not on CPU devices."""
    x = np.ones((8 * ROWS, WIDTH), np.float32)

    def swap(x: Any) -> Any:
        each = jnp.full(8, len(x) // 8)
        first = jnp.arange(8) * each
        there = lax.axis_index("tensor") * each
        return lax.ragged_all_to_all(
            x, jnp.zeros_like(x), first, each, there, each, axis_name="tensor"
        )

    mapped = jax.shard_map(
        swap, mesh=mesh_of(8), in_specs=P("tensor"), out_specs=P("tensor")
    )
    planned = rhino.plan(lambda x: mapped(2 * x), x, cache_dir="", cluster="h100:1x8")
    assert sent(planned) == {("ragged-all-to-all", "tensor"): x.nbytes // 8 * 7 // 8}
    assert planned.plan.predicted.comm_seconds > 0
