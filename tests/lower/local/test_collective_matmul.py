"""Products that gather or scatter while they work, against the product as it stands."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rhino_jax.cost.reshard import route
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.factors import Choice, choice_problems, layouts
from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.steps import ALL_GATHER, COLLECTED, PASSED, REDUCE_SCATTER, Move
from rhino_jax.lower.manual import run
from rhino_jax.rules import rule_of
from tests.lower.local.harness import evaluate, one_op, plan_of, random_choice

PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "plain": (jnp.matmul, (16, 24), (24, 8)),
    "batched": (lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), (2, 16, 8), (2, 8, 24)),
    "transposed": (lambda x, y: jnp.einsum("kam,nk->amn", x, y), (8, 3, 16), (32, 8)),
    "two summed": (lambda x, y: jnp.einsum("abi,iaj->bj", x, y), (4, 8, 8), (8, 4, 16)),
}
MESHES = (Mesh.of(x=4, y=2), Mesh.of(y=2, x=2), Mesh.of(x=8))
CASES = 12
"""Random choices and digits of each product on each mesh; those without a ring fall
away."""


def gathering(program: Program, choice: Choice, mesh: Mesh, rng: random.Random) -> Any:
    """A plan whose product gathers an operand over ``x``; None where it can not."""
    (op,) = program.ops
    rule = rule_of(program, op)
    wanted, _ = layouts(rule, choice)
    number = rng.randrange(2)
    value, target = op.operands[number], wanted[number]
    places = [d for d, (name,) in enumerate(rule.operands[number]) if name[0] != "b"]
    dim = rng.choice(places)
    size = program.values[value].shape[dim]
    inner = rng.choice([s for s in (1, 2, size // mesh.size("x")) if s])
    source = target.using({"x": (dim, Split("x", inner))})
    if "x" in target.axes or not fits(program, value, source, mesh):
        return None
    (step,) = route(*of(program, value), source, target, mesh)
    if step.kind != ALL_GATHER:
        return None
    plan = plan_of(program, choice, mesh)
    rest = [m for m in plan.ops[0].before if m.value != value]
    begin = Layout.replicated(target.rank)
    cut = Move(value, begin, source, route(*of(program, value), begin, source, mesh))
    around = Move(
        value, source, target, (step,), within=rng.choice((PASSED, COLLECTED))
    )
    return with_moves(plan, (*rest, cut, around), plan.ops[0].after)


def scattering(program: Program, choice: Choice, mesh: Mesh, rng: random.Random) -> Any:
    """A plan whose product scatters its result over ``x``; None where it can not."""
    (op,) = program.ops
    rule = rule_of(program, op)
    _, (given,) = layouts(rule, choice)
    (value,) = op.results
    if given.operator("x") != "sum":
        return None
    places = [d for d, (name,) in enumerate(rule.results[0]) if name[0] != "b"]
    dim = rng.choice(places)
    size = program.values[value].shape[dim]
    inner = rng.choice([s for s in (1, 2, size // mesh.size("x")) if s])
    target = given.using({"x": (dim, Split("x", inner))})
    if not fits(program, value, target, mesh):
        return None
    steps = route(*of(program, value), given, target, mesh)
    if [step.kind for step in steps] != [REDUCE_SCATTER]:
        return None
    whole = Layout.replicated(given.rank)
    after = (
        Move(value, given, target, steps, within=PASSED),
        Move(value, target, whole, route(*of(program, value), target, whole, mesh)),
    )
    plan = plan_of(program, choice, mesh)
    return with_moves(plan, plan.ops[0].before, after)


def of(program: Program, value: int) -> tuple[tuple[int, ...], str]:
    v = program.values[value]
    return v.shape, v.dtype


def fits(program: Program, value: int, layout: Layout, mesh: Mesh) -> bool:
    """Whether the digits of every dimension lie beside one another, and divide it."""
    for size, dim in zip(program.values[value].shape, layout.dims, strict=True):
        high = size
        for split in dim:
            span = split.stride * mesh.size(split.axis)
            if high % span:
                return False
            high = split.stride
    return True


def with_moves(
    plan: Assignment, before: tuple[Move, ...], after: tuple[Move, ...]
) -> Assignment:
    return replace(plan, ops=(replace(plan.ops[0], before=before, after=after),))


@pytest.mark.parametrize("make", [gathering, scattering])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_equal(make: Any, mesh: Mesh, x64: None) -> None:
    """Rows, columns and contracted dimensions; blocks and strided; beside splits."""
    devices = np.array(jax.devices()[: mesh.num_devices], object)
    grid = jax.sharding.Mesh(
        devices.reshape([axis.size for axis in mesh.axes]), mesh.names
    )
    rng, tried = random.Random(7), 0
    for fun, left, right in PRODUCTS.values():
        data = np.random.default_rng(3)
        args = [data.normal(size=left), data.normal(size=right)]
        program, op = one_op(fun, *args, kind="dot_general")
        operands = [args[program.inputs.index(v)] for v in op.operands]
        given = [operands[op.operands.index(v)] for v in program.inputs]
        rule = rule_of(program, op)
        plans = []
        for _ in range(CASES):
            choice = random_choice(rule, mesh, rng)
            if make is scattering and not rng.randrange(3):
                choice = Choice().with_split("k0", Split("x", 1))
                if choice_problems(rule, choice, mesh):
                    continue
            plan = make(program, choice, mesh, rng)
            plans += [plan] if plan else []
        (want,) = evaluate(program, given)
        body = jax.shard_map(
            lambda *xs, p=program, some=plans: [run(p, x, mesh, xs) for x in some],
            mesh=grid,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        for plan, (found,) in zip(plans, jax.jit(body)(*given), strict=True):
            np.testing.assert_allclose(found, want, 1e-12, 1e-12, err_msg=str(plan))
        tried += len(plans)
    assert tried > 4, tried
