"""Constants, control flow, lines and scopes: what the reader makes of a jaxpr."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rhino_jax.trace import trace
from rhino_jax.trace.reader import plain
from tests.trace.harness import check_step

X = jnp.arange(4.0) + 1
ONE, TWO = jnp.linspace(0.0, 1.0, 4), np.linspace(1.0, 2.0, 4, dtype="float32")


@jax.jit
def helper(x: Any) -> Any:
    """A jitted helper keeps its constants to itself, wherever it is called."""
    return jnp.sin(x * ONE + TWO)


@jax.jit
def other(x: Any) -> Any:
    return x * TWO - 1


@jax.custom_vjp
def custom(x: Any) -> Any:
    return helper(x)


custom.defvjp(lambda x: (helper(x), x), lambda x, g: (g * other(x),))


def scanned(x: Any) -> Any:
    def body(c: Any, k: Any) -> Any:
        return helper(c) + k, c

    return lax.scan(body, x, jnp.arange(3.0))


def looped(x: Any) -> Any:
    return lax.while_loop(
        lambda c: c.sum() + helper(c).sum() < 60, lambda c: other(c) + 1.5, x
    )


def branched(x: Any) -> Any:
    return lax.switch(x[0].astype("int32"), [helper, other, lambda c: c], x)


def rematerialized(x: Any) -> Any:
    return jax.value_and_grad(lambda c: jax.checkpoint(helper)(c).sum())(x)


def nested(x: Any) -> Any:
    def body(c: Any, _: Any) -> Any:
        return lax.cond(c[0] > 1, lambda: scanned(c)[0], lambda: looped(c)), None

    return lax.scan(jax.checkpoint(body), x, length=2)[0] + ONE


CASES: list[tuple[Callable[[Any], Any], int]] = [
    (lambda x: helper(x) + helper(2 * x) + ONE + TWO, 2),
    (custom, 2),
    (lambda x: jax.grad(lambda c: custom(c).sum())(x), 2),
    (scanned, 2),
    (looped, 2),
    (branched, 2),
    (rematerialized, 2),
    (nested, 2),
    (lambda x: lax.map(helper, jnp.stack([x, x])), 2),
    (lambda x: jax.vmap(lambda r: r * ONE)(jnp.outer(x, x)), 1),
]


@pytest.mark.parametrize(("fun", "constants"), CASES)
def test_constants_are_inputs_once(fun: Callable[[Any], Any], constants: int) -> None:
    traced = check_step(fun, (X,))
    assert len(traced.constants) == constants
    assert len(traced.program.inputs) == 1 + len(traced.constants)
    held = [id(c) for c in traced.constants]
    assert len(set(held)) == len(held)
    for value, const in zip(traced.program.inputs[1:], traced.constants, strict=True):
        assert traced.program.values[value].shape == const.shape


def test_a_constant_of_a_body_is_an_operand_of_its_op() -> None:
    program = trace(branched, (X,)).program
    (op,) = [op for op in program.ops if op.kind == "cond"]
    assert len(op.operands) == 1 + 1 + 2
    assert {len(body.inputs) for body in op.programs} == {3}


def test_a_parameter_converted_twice_is_one_array() -> None:
    def twice(w: Any, x: Any) -> Any:
        half = jnp.bfloat16
        y = x.astype(half) @ w.astype(half)  # the second reader's w is this one
        return (y @ w.astype(half).T).astype(w.dtype), w.astype(jnp.float16), y + y

    square = jnp.outer(X, X) / 8
    program = check_step(twice, (square, square)).program
    w = program.inputs[0]
    made = [op for op in program.ops if op.operands == (w,)]
    assert sorted(program.values[op.results[0]].dtype for op in made) == [
        "bfloat16",
        "float16",
    ]


def test_every_loop_and_branch_gives_what_jax_gives() -> None:
    def step(x: Any, n: Any) -> Any:
        fixed = lax.fori_loop(0, 3, lambda i, c: c * 0.5 + i, x)
        bounded = lax.while_loop(
            lambda c: (c[0] < n) & (c[1][0] < 50),
            lambda c: (c[0] + 1, c[1] * 1.5),
            (0, fixed),
        )
        _, rows = lax.scan(lambda c, r: (c + r, c * r), x[0], x, reverse=True)
        return bounded, rows, lax.cond(n > 2, jnp.sin, jnp.cos, x), jnp.cumsum(x)

    check_step(step, (X, 4))


def test_lines_and_scopes_stay_on_ops() -> None:
    def step(x: Any) -> Any:
        with jax.named_scope("outer"):
            y = jnp.tanh(x)  # the line

            @jax.jit
            def inner(z: Any) -> Any:
                with jax.named_scope("within"):
                    return jnp.exp(z)

            return lax.scan(lambda c, _: (inner(c), None), y, length=2)[0]

    lines, first = inspect.getsourcelines(step)
    program = trace(step, (X,)).program
    found = {op.kind: op.where for _, op in program.walk()}
    at = next(k for k, line in enumerate(lines) if "the line" in line)
    assert (Path(found["tanh"].file), found["tanh"].line) == (
        Path(__file__),
        first + at,
    )
    assert found["tanh"].name_stack == "outer"
    assert found["exp"].name_stack.endswith("within")


def test_weak_types_and_literals_survive() -> None:
    program = trace(lambda x, n: x * 2.5 + n, (X, 3.0)).program
    assert program.values[program.inputs[1]].weak
    literals = [v.literal for v in program.values if v.literal is not None]
    assert literals == [2.5]


def test_results_may_repeat_and_be_arguments() -> None:
    traced = check_step(lambda x, y: (x, x + y, x, 3, None), (X, X))
    assert traced.output_paths == ("0", "1", "2", "3")


def test_parameters_tell_meanings_apart_without_addresses() -> None:
    one, two = jax.make_jaxpr(jnp.sin)(X), jax.make_jaxpr(jnp.cos)(X)
    assert plain(one) == plain(jax.make_jaxpr(jnp.sin)(X))
    assert plain(one) != plain(two)
    spec = jax.sharding.PartitionSpec
    assert plain(spec("d")) != plain(spec("t"))
    assert "0x" not in plain(one) + plain(lambda: None)
    assert plain((np.float32(2), np.dtype("int8"), {"b": 1, "a": None})) == (
        2.0,
        "int8",
        (("a", None), ("b", 1)),
    )
