"""Calls into Python: once where they have effects, in loops too; sharding asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rhino_jax as rhino

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
OPTIONS: dict[str, Any] = {"cache_dir": "", "mesh": {"x": 2, "y": 4}}


def test_effects_happen_once(capfd: Any) -> None:
    calls: list[str] = []

    def counted(x: Any) -> Any:
        calls.append("io")
        return np.sin(x)

    def step(x: Any) -> Any:
        y = io_callback(counted, X, x)
        jax.debug.callback(lambda total: calls.append("debug"), jnp.sum(y))
        pure = jax.pure_callback(np.cos, X, x)
        held, _ = jax.lax.scan(
            lambda c, _: (c + io_callback(counted, X[0], c), None), y[0], length=3
        )
        flag = io_callback(lambda x: np.bool_(True), jax.ShapeDtypeStruct((), bool), x)
        return y + pure, held, flag

    run = rhino.auto_parallel(step, **OPTIONS)
    found = run(X)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert calls.count("io") == 4 and calls.count("debug") == 1
    np.testing.assert_allclose(found[0], np.sin(X) + np.cos(X), rtol=1e-6)
    held = np.sin(X[0])
    for _ in range(3):
        held = held + np.sin(held)
    np.testing.assert_allclose(found[1], held, rtol=1e-5)
    assert bool(found[2])
    notes = run.planned(X).plan.notes
    assert sum("run by the first device" in note for note in notes) == 4


def asked(axes: tuple[Any, ...], names: tuple[str, str]) -> Any:
    mesh = jax.make_mesh((2, 4), names, axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return lambda x: jnp.sum(jax.lax.with_sharding_constraint(2 * x, sharding), 0)


def test_a_sharding_constraint_is_a_pin() -> None:
    step = asked((None, "y"), ("x", "y"))
    for options in (OPTIONS, {**OPTIONS, "recipe": "data_parallel"}):
        run = rhino.auto_parallel(step, **options)
        np.testing.assert_allclose(run(X), jax.jit(step)(X), rtol=1e-5)
    planned = rhino.auto_parallel(step, **OPTIONS).planned(X)
    (choice,) = (
        str(plan.choice)
        for op, plan in zip(
            planned.traced.program.ops, planned.plan.assignment.ops, strict=True
        )
        if op.kind == "sharding_constraint"
    )
    assert choice == "o0_1: y/1"


def test_what_it_leaves_open_is_searched() -> None:
    """The rows stay as the batch is split, by a recipe; the columns are as asked."""
    step = asked((PartitionSpec.UNCONSTRAINED, "y"), ("x", "y"))
    pins = {"x": PartitionSpec("x")}
    for more in ({"pins": pins}, {"recipe": "data_parallel", "pins": pins}):
        run = rhino.auto_parallel(step, **OPTIONS, **more)
        np.testing.assert_allclose(run(X), jax.jit(step)(X), rtol=1e-5)
        planned = run.planned(X)
        assert not planned.plan.notes
        (index,) = (
            i
            for i, op in enumerate(planned.traced.program.ops)
            if op.kind == "sharding_constraint"
        )
        done = planned.plan.assignment.ops[index]
        after = [str(move.target) for move in done.after]
        assert str(done.choice) == "o0_0: x/4; o0_1: y/1" or after == ["[x/4,y/1]"]


@pytest.mark.parametrize(
    ("axes", "names", "why"),
    [
        (("a",), ("a", "b"), "no axis 'a' in mesh (x=2, y=4)"),
        ((None, ("x", "y")), ("x", "y"), "size 4 does not divide into 8"),
    ],
)
def test_one_that_does_not_fit_is_ignored_and_said(
    axes: Any, names: Any, why: str
) -> None:
    step = asked(axes, names)
    planned = rhino.plan(step, X, **OPTIONS)
    (note,) = (n for n in planned.plan.notes if n.startswith("sharding constraint"))
    assert why in note and "ignored" in note
