"""Small plans to price: Programs by hand, and a traced step under a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from rhino_jax.cost.buffers import unfold
from rhino_jax.cost.fusion import fusion
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.memory import Held
from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.factors import BLOCKED, PARALLEL, REDUCTION, Factor, Rule
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of
from rhino_jax.search.choose import plan_recipe
from rhino_jax.search.subject import Subject
from rhino_jax.trace import Traced, trace

ONE = Mesh.of(d=1)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def program(
    shapes: list[tuple[int, ...]],
    inputs: tuple[int, ...],
    ops: Sequence[tuple[Any, ...]],
    outputs: tuple[int, ...],
) -> Program:
    """float32 values of ``shapes``, ops as (kind, operands, results[, params])."""
    values = tuple(Value(shape, "float32") for shape in shapes)
    return Program(values, inputs, tuple(Op(*parts) for parts in ops), outputs)


def whole(program: Program) -> Assignment:
    """Every value whole on every device."""

    def layouts(values: tuple[int, ...]) -> tuple[Layout, ...]:
        return tuple(Layout.replicated(len(program.values[v].shape)) for v in values)

    return Assignment(
        layouts(program.inputs),
        layouts(program.outputs),
        tuple(
            OpPlan(inner=tuple(whole(body) for body in op.programs))
            for op in program.ops
        ),
    )


def traced_whole(fun: Any, *args: Any) -> tuple[Program, Assignment]:
    found = trace(fun, args).program
    return found, whole(found)


KINDS = {
    **dict.fromkeys(("fused", "tanh"), PARALLEL),
    "reducing": REDUCTION,
    "opaque": BLOCKED,
}


def by_role(program: Program, op: Op) -> Rule:
    """A rule that makes an op what its kind says, over one factor."""
    dims = ((("x",),),)
    return Rule((Factor("x", 1, KINDS[op.kind]),), dims * len(op.operands), dims)


WIDTH, LAYERS, EXAMPLES = 64, 3, 32


@lru_cache
def trained() -> Traced:
    """A step of gradient descent with momentum on three wide layers."""

    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean(jnp.square(x - batch["y"]))

    def train_step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state["p"], batch)
        slots = [0.9 * m + g for m, g in zip(state["m"], grads, strict=True)]
        params = [p - 0.1 * m for p, m in zip(state["p"], slots, strict=True)]
        return {"p": params, "m": slots}, value

    weights = [f32(WIDTH, WIDTH)] * LAYERS
    batch = {"x": f32(EXAMPLES, WIDTH), "y": f32(EXAMPLES, WIDTH)}
    return trace(train_step, ({"p": weights, "m": weights}, batch))


@lru_cache
def planned(recipe: str, mesh: Mesh) -> Assignment:
    """:func:`trained` under a recipe."""
    found = trained()
    subject = Subject(
        found.program, found.input_paths, found.output_paths, found.state_pairs
    )
    return plan_recipe(subject, mesh, recipe, {})[1]


BATCH, LENGTH, HEADS, DEPTH, DEVICES = 8, 32, 4, 16, 4
CHANNELS = HEADS * DEPTH


@lru_cache
def attending() -> Traced:
    """A step on recomputed layers of masked attention, in a scan."""

    def layer(mask: jax.Array, x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        scaled = jnp.tanh(x)
        q, k, v = (
            (scaled @ weights[name]).reshape(-1, LENGTH, HEADS, DEPTH) for name in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        shares = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e9))
        made = jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(x.shape)
        return x + jnp.tanh(made @ weights["out"]), None

    def loss(params: Any, x: jax.Array) -> jax.Array:
        at = jnp.arange(LENGTH)
        mask = jnp.broadcast_to(at[:, None] >= at[None, :], (BATCH, LENGTH, LENGTH))
        one = jax.checkpoint(partial(layer, mask))
        x, _ = jax.lax.scan(one, x, params["layers"])
        return jnp.mean(jnp.square(x @ params["head"]))

    def train_step(params: Any, x: jax.Array) -> Any:
        grads = jax.grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    layers = {name: f32(LAYERS, CHANNELS, CHANNELS) for name in ("q", "k", "v", "out")}
    params = {"layers": layers, "head": f32(CHANNELS, CHANNELS)}
    return trace(train_step, (params, f32(BATCH, LENGTH, CHANNELS)))


def held_layers(recipe: str, platform: str = "cuda") -> Held:
    """:func:`attending` under a recipe, as a platform's compiler holds it."""
    found, mesh, habits = attending(), Mesh.of(data=DEVICES), HABITS[platform]
    subject = Subject(
        found.program, found.input_paths, found.output_paths, found.state_pairs
    )
    assignment = plan_recipe(subject, mesh, recipe, {})[1]
    unfolded = unfold(
        found.program, assignment, mesh, rule_of, tuple(found.donated), habits
    )
    return Held(unfolded, fusion(unfolded, habits), habits)
