"""Where a dimension may be cut, and whether a column finds its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.ir.depends import forward
from rhino_jax.ir.layout import Split
from rhino_jax.ir.program import Program
from rhino_jax.search.boundaries import Part, digit, ends_in_a_row, parts
from rhino_jax.trace import trace
from tests.search.steps import f32

BATCH, WIDTH, HEADS, SIZE = 8, 12, 4, 6


def program_of(fun: Callable[..., Any], *weights: Any) -> tuple[Program, int]:
    """The Program of ``fun(x, *weights)`` and what its first product gives."""
    program = trace(fun, (f32(BATCH, WIDTH), *weights)).program
    first = next(op for op in program.ops if op.kind == "dot_general")
    return program, first.results[0]


def sizes(found: tuple[Part, ...]) -> list[int]:
    return [part.size for part in found]


def test_a_plain_dimension_is_one_part() -> None:
    program, value = program_of(lambda x, w: jnp.tanh(x @ w), f32(WIDTH, 24))
    assert parts(program, value, 1) == (Part(24),)


def test_a_projection_split_in_three_keeps_its_thirds() -> None:
    def fun(x: jax.Array, w: jax.Array) -> Any:
        q, k, v = jnp.split(jnp.tanh(x @ w), 3, axis=-1)
        return (q * k).reshape(BATCH, HEADS, SIZE), v

    program, value = program_of(fun, f32(WIDTH, 3 * HEADS * SIZE))
    found = parts(program, value, 1)
    assert sizes(found) == [3, HEADS, SIZE]
    assert not found[0].may_split
    assert digit(found, "t", 4) == Split("t", SIZE)


def test_a_projection_reshaped_has_every_factor() -> None:
    def fun(x: jax.Array, w: jax.Array) -> Any:
        return (x @ w).reshape(BATCH, HEADS, 3, SIZE).swapaxes(1, 2)

    program, value = program_of(fun, f32(WIDTH, HEADS * 3 * SIZE))
    assert sizes(parts(program, value, 1)) == [HEADS, 3, SIZE]
    assert digit(parts(program, value, 1), "t", 4) == Split("t", 3 * SIZE)


def test_a_dimension_that_must_be_whole_may_not_be_split() -> None:
    program, value = program_of(lambda x, w: jnp.sort(x @ w), f32(WIDTH, 24))
    (part,) = parts(program, value, 1)
    assert not part.may_split
    assert digit((part,), "t", 4) is None


def test_reading_stops_out_of_reach() -> None:
    def fun(x: jax.Array, w: jax.Array) -> Any:
        return jnp.tanh(jnp.tanh(x @ w)).reshape(BATCH, HEADS, SIZE)

    program, value = program_of(fun, f32(WIDTH, HEADS * SIZE))
    assert sizes(parts(program, value, 1, reach=3)) == [HEADS, SIZE]
    assert sizes(parts(program, value, 1, reach=2)) == [HEADS * SIZE]


@pytest.mark.parametrize(
    ("given", "size", "stride"),
    [
        ((Part(24),), 4, 6),
        ((Part(3, False), Part(16), Part(64)), 4, 256),
        ((Part(3), Part(16)), 3, 16),
        ((Part(3), Part(16)), 16, 1),
        ((Part(6, False), Part(5)), 4, None),
        ((Part(6, False),), 2, None),
    ],
)
def test_a_digit_is_the_outermost_that_fits(
    given: tuple[Part, ...], size: int, stride: int | None
) -> None:
    found = digit(given, "t", size)
    assert found == (None if stride is None else Split("t", stride))


def norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


UP, DOWN = f32(WIDTH, 24), f32(24, WIDTH)
ROWS: dict[str, tuple[bool, Callable[..., Any], tuple[Any, ...]]] = {
    "a row": (True, lambda x, a, b: jnp.tanh(x @ a) @ b, (UP, DOWN)),
    "gated": (
        True,
        lambda x, a, c, b: (jax.nn.silu(x @ a) * (x @ c)) @ b,
        (UP, UP, DOWN),
    ),
    "a norm before the row": (False, lambda x, a, b: norm(x @ a) @ b, (UP, DOWN)),
    "two activations": (False, lambda x, a: (x @ a) @ (x @ a).T, (UP,)),
    "the last layer": (True, lambda x, a: jax.nn.logsumexp(x @ a, -1), (UP,)),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_column_is_closed_by_a_row(name: str) -> None:
    expected, fun, weights = ROWS[name]
    program, value = program_of(fun, *weights)
    batch = forward(program, program.inputs[:1])
    found = ends_in_a_row(program, value, 1, Split("t", 6), 4, batch)
    assert found == expected


LOST: dict[str, Callable[..., Any]] = {
    "a scan": lambda x, a, b: jax.lax.scan(lambda c, y: (c, y @ b), 0.0, (x @ a)[None])[
        1
    ],
    "a sort": lambda x, a, b: jnp.sort(x @ a) @ b,
}


@pytest.mark.xfail(strict=True, reason="taken for a last layer, which may be reduced")
@pytest.mark.parametrize("name", LOST)
def test_an_op_that_can_not_keep_the_column_breaks_it(name: str) -> None:
    program, value = program_of(LOST[name], UP, DOWN)
    batch = forward(program, program.inputs[:1])
    assert not ends_in_a_row(program, value, 1, Split("t", 6), 4, batch)
