"""Pallas kernels over a part of their grid, run by Pallas' interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.trace import trace
from tests.lower.local.harness import alone_and_in_pairs, check_choices, one_op

MESH = Mesh.of(x=2, y=2)


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def split(op: Any, program: Any) -> set[str]:
    """Factors that may be split: axes of the grid."""
    factors = rule_of(program, op).factors
    return {f.name for f in factors if f.traits.split and f.size > 1}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jax 0.11
def test_flash_attention_on_a_gpu(device_mesh: Any) -> None:
    """Examples and heads, forward and backward, against the kernel on all of them."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    q = rand(2, 32, 4, 16)

    def step(q: Any, k: Any, v: Any) -> Any:
        out = mha(q, k, v, segment_ids=None, causal=True, interpret=True)
        return jnp.sum(out**2)

    args = [jax.ShapeDtypeStruct(q.shape, q.dtype)] * 3
    program = trace(jax.grad(step, (0, 1, 2)), args).program
    found = [split(op, program) for op in program.ops if op.kind == "pallas_call"]
    # Forward it is (queries, examples, heads), backward (examples, heads, queries).
    assert found == [{"g1", "g2"}] * 2 + [{"g0", "g1"}]
    alone, op = one_op(step, q, q, q, kind="pallas_call")
    tried = alone_and_in_pairs(rule_of(alone, op), MESH)
    given = [rand(*q.shape, seed=i) for i in range(3)]
    check_choices(alone, tried[:: len(tried) // 4], MESH, device_mesh(MESH), given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flash_attention_on_a_tpu() -> None:
    """Not run here: the kernels of both passes are split by examples and heads."""
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    def step(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(flash_attention(q, k, v, causal=True).astype(jnp.float32))

    args = [jax.ShapeDtypeStruct((2, 4, 256, 128), jnp.bfloat16)] * 3
    program = trace(jax.grad(step, (0, 1, 2)), args).program
    kernels = [op for op in program.ops if op.kind == "pallas_call"]
    assert len(kernels) == 3
    assert all(split(op, program) == {"g0", "g1"} for op in kernels)


def blocks(body: Any, grid: Any, maps: Any, shape: Any) -> Any:
    """A kernel over blocks of 4 rows and 8 columns."""
    spec = [pl.BlockSpec((4, 8), one) for one in maps]
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=spec[:-1],
        out_specs=spec[-1],
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        interpret=True,
    )


def doubled(x: Any, y: Any) -> None:
    y[...] = 2 * x[...]


def numbered(x: Any, y: Any) -> None:
    y[...] = x[...] + pl.program_id(0)


def test_what_is_a_loop_of_its_own(device_mesh: Any) -> None:
    x = rand(16, 16)

    def loops(body: Any, *maps: Any, shape: Any = (16, 16)) -> set[str]:
        program, op = one_op(blocks(body, (4, 2), maps, shape), x)
        return split(op, program)

    through = lambda i, j: (i, j)  # noqa: E731
    assert loops(doubled, through, through) == {"g0", "g1"}
    assert loops(numbered, through, through) == {"g1"}, "the kernel asks where it is"
    assert loops(doubled, lambda i, j: (3 - i, j), through) == {"g1"}, "a map computes"
    last = lambda i, j: (0, j)  # noqa: E731
    assert loops(doubled, through, last, shape=(4, 16)) == {"g1"}, "the last one stays"
    program, op = one_op(blocks(doubled, (4, 2), (through,) * 2, (16, 16)), x)
    tried = alone_and_in_pairs(rule_of(program, op), MESH)
    check_choices(program, tried[:: len(tried) // 4], MESH, device_mesh(MESH), [x])
