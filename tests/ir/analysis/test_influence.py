"""What loops and branches keep apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.ir.analysis.influence import influences, needed, reached
from rhino_jax.ir.program import Program
from rhino_jax.trace import trace
from tests.ir.analysis.steps import f32


def scanned(a: Any, b: Any, c: Any, xs: Any) -> Any:
    """b is handed on to a, c to b: after three rounds all of them reach a."""

    def body(carry: Any, x: Any) -> Any:
        a, b, c = carry
        return (b + 1.0, c * 2.0, c), (x * 2.0, a + x)

    return jax.lax.scan(body, (a, b, c), xs)


def looped(a: Any, b: Any, n: Any) -> Any:
    def body(carry: Any) -> Any:
        a, b, n = carry
        return a + 1.0, b * 2.0, n - 1.0

    return jax.lax.while_loop(lambda carry: carry[2] > 0, body, (a, b, n))


def branched(p: Any, a: Any, b: Any) -> Any:
    return jax.lax.cond(p > 0, lambda a, b: (a, b), lambda a, b: (a * 2, a), a, b)


def rematerialized(a: Any, b: Any) -> Any:
    def pair(a: Any, b: Any) -> Any:
        return jnp.sin(a), jnp.sin(b)

    return jax.vjp(jax.checkpoint(pair), a, b)[1]((a, b))


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[set[int]]]] = {
    "scan": (
        scanned,
        (f32(), f32(), f32(), f32(3)),
        [{0, 1, 2}, {1, 2}, {2}, {3}, {0, 1, 2, 3}],
    ),
    "while": (looped, (f32(), f32(), f32()), [{0, 2}, {1, 2}, {2}]),
    "cond": (branched, (f32(), f32(), f32()), [{0, 1}, {0, 1, 2}]),
    "remat": (rematerialized, (f32(), f32()), [{0}, {1}]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_output_depends_on_what_it_is_made_of(name: str) -> None:
    fun, args, wanted = CASES[name]
    program = trace(fun, args).program
    assert any(op.programs for op in program.ops)
    found = [
        {i for i, v in enumerate(program.inputs) if v in needed(program, (out,))}
        for out in program.outputs
    ]
    assert found == wanted
    assert found == [
        {i for i, v in enumerate(program.inputs) if out in reached(program, (v,))}
        for out in program.outputs
    ]


def test_an_op_without_bodies_is_one() -> None:
    program: Program = trace(lambda x: jnp.split(x, 2), (f32(4),)).program
    assert influences(program.ops[0]) == (1, 1)
