"""Dominators against their definition: take a value away, and see what is cut off."""

from __future__ import annotations

import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.ir.analysis.dominance import dominators, uniform_values
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.trace import trace
from tests.ir.analysis.steps import f32


@st.composite
def programs(draw: st.DrawFn) -> Program:
    inputs = tuple(range(draw(st.integers(1, 3))))
    ops = []
    for result in range(len(inputs), len(inputs) + draw(st.integers(1, 14))):
        reads = st.lists(st.integers(0, result - 1), min_size=1, max_size=2)
        ops.append(Op("made up", tuple(draw(reads)), (result,)))
    values = (Value((2,), "float32"),) * (len(inputs) + len(ops))
    return Program(values, inputs, tuple(ops), (len(values) - 1,))


def reachable(program: Program, sources: list[int], without: int | None) -> set[int]:
    found = {v for v in sources if v != without}
    for op in program.ops:
        if found.intersection(op.operands):
            found.update(v for v in op.results if v != without)
    return found


@given(programs(), st.integers(1, 3))
def test_dominators_are_those_whose_loss_cuts_a_value_off(
    program: Program, count: int
) -> None:
    sources = list(program.inputs[:count])
    found = dominators(program, sources, frozenset())
    everything = reachable(program, sources, None)
    assert set(found.above) == everything
    cut_off = {v: everything - reachable(program, sources, v) for v in everything}
    for value in everything:
        wanted = {v for v in everything if value in cut_off[v]}
        chain = list(found.chain(value))
        assert set(chain) == wanted
        # Nearest first: each is cut off by all that come after it.
        assert chain == sorted(chain, key=lambda v: len(cut_off[v]))


def test_scalars_join_nothing_that_arrays_keep_apart() -> None:
    """Two arrays, each scaled by the norm of both."""

    def step(x: object, y: object) -> object:
        x, y = jnp.sin(x), jnp.sin(y)
        norm = jnp.sqrt(jnp.sum(x * x) + jnp.sum(y * y))
        return jnp.where(norm > 1.0, x / norm, x), y / norm

    program = trace(step, (f32(4), f32(6))).program
    found = dominators(program, program.inputs, uniform_values(program))
    assert program.inputs[0] in found.chain(program.outputs[0])
    assert program.inputs[1] in found.chain(program.outputs[1])
    strict = dominators(program, program.inputs, frozenset())
    assert program.inputs[0] not in strict.chain(program.outputs[0])


def test_uniform_values_are_scalars_spread_out() -> None:
    def step(x: object) -> object:
        return jnp.full((3,), jnp.sum(x)) * 2.0, jnp.arange(3) + 1, x * 2.0

    program = trace(step, (f32(3),)).program
    uniform = uniform_values(program)
    assert [v in uniform for v in program.outputs] == [True, False, False]
