"""Lifetimes against the definition, read off op by op."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.ir.analysis.liveness import BEFORE, liveness
from rhino_jax.ir.check import check
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.trace import trace
from tests.ir.analysis.steps import f32


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Up to 8 ops over inputs, literals and one another; outputs may repeat."""
    values = [
        Value((draw(st.integers(0, 5)),), draw(st.sampled_from(["int8", "float32"])))
        for _ in range(draw(st.integers(1, 4)))
    ]
    inputs = tuple(range(len(values)))
    values.append(Value((), "float32", literal=2.0))
    ops = []
    for _ in range(draw(st.integers(0, 8))):
        reads = st.integers(0, len(values) - 1)
        operands = tuple(draw(st.lists(reads, min_size=1, max_size=3)))
        results = tuple(range(len(values), len(values) + draw(st.integers(1, 2))))
        values += [Value((draw(st.integers(0, 5)),), "float32") for _ in results]
        ops.append(Op("made up", operands, results))
    outputs = draw(st.lists(st.integers(0, len(values) - 1), max_size=4))
    return check(Program(tuple(values), inputs, tuple(ops), tuple(outputs)))


def held(program: Program, donated: set[int], index: int) -> set[int]:
    """What must be in memory while op ``index`` runs, by definition."""
    there = set(program.inputs)
    for op in program.ops[: index + 1]:
        there.update(op.results)
    wanted = set(program.outputs) | set(program.ops[index].results)
    wanted |= {v for i, v in enumerate(program.inputs) if i not in donated}
    for op in program.ops[index:]:
        wanted.update(op.operands)
    return there & wanted


@given(programs(), st.sets(st.integers(0, 3)))
def test_live_sets_and_bytes_are_those_of_the_definition(
    program: Program, donated: set[int]
) -> None:
    found = liveness(program, donated)
    sets = [held(program, donated, i) for i in range(len(program.ops))]
    sizes = [sum(program.values[v].num_bytes for v in live) for live in sets]
    assert [found.live_at(i) for i in range(len(sets))] == sets
    assert list(found.bytes_at) == sizes
    if sizes:
        assert found.peak_bytes == max(sizes) == sizes[found.peak_op]


def test_what_is_left_at_the_end() -> None:
    program = trace(lambda a, b: (b, a + 1.0), (f32(3), f32(5))).program
    assert liveness(program).boundary_bytes == 4 * (3 + 5 + 3)
    assert liveness(program, {0}).boundary_bytes == 4 * (5 + 3)


def test_a_donated_input_nobody_reads_dies_at_once() -> None:
    program = trace(lambda a, b: b * 2.0, (f32(100), f32(5))).program
    assert liveness(program, {0}).peak_bytes == 4 * 10
    assert liveness(program, {0}).dies[program.inputs[0]] == BEFORE
    assert liveness(program).peak_bytes == 4 * 110


def test_a_program_without_ops() -> None:
    found = liveness(trace(lambda a: a, (f32(6),)).program)
    assert (found.peak_bytes, found.peak_op) == (24, BEFORE)


def test_bodies_come_on_top() -> None:
    """In the body two values of 8 numbers live beside the carry at once."""

    def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = jnp.sin(carry)
        b = jnp.cos(a)
        return carry + a * b, x * 2.0

    def step(carry: jax.Array, xs: jax.Array) -> object:
        return jax.lax.scan(body, carry, xs)

    program = trace(step, (f32(8), f32(5, 3))).program
    (index,) = (i for i, op in enumerate(program.ops) if op.kind == "scan")
    found = liveness(program)
    # sin, cos, and their product while it is made.
    assert found.inside == {index: 4 * 8 * 3}
    assert found.bytes_at[index] == 4 * (2 * 8 + 2 * 15) + 4 * 8 * 3
