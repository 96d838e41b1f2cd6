"""Small plans to price: Programs by hand, and a traced step under a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.factors import BLOCKED, PARALLEL, REDUCTION, Factor, Rule
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Value
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
