"""Attention without a kernel: scores of blocks pass through memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.attention import blocks
from rhino_jax.cost.compute import op_work
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.rules.attention import FORWARD
from rhino_jax.search.recognize import recognize
from rhino_jax.trace import trace
from tests import attentions

LENGTH, HEADS = 4096, 16


@pytest.mark.parametrize(
    ("cluster", "dtype", "depth", "each"),
    [
        ("h100:1x8", jnp.bfloat16, 128, 0),
        ("h100:1x8", jnp.bfloat16, 132, 3 * 4 + 2 * 2),
        ("h100:1x8", jnp.float32, 128, 3 * 4 + 2 * 4),
        ("v5e:2x4", jnp.bfloat16, 128, 3 * 4 + 2 * 2),
    ],
)
def test_bytes_of_blocks(cluster: str, dtype: Any, depth: int, each: int) -> None:
    """None where cuDNN takes the arrays; else those of half of all pairs."""
    array = jax.ShapeDtypeStruct((1, LENGTH, HEADS, depth), dtype)
    program = recognize(trace(attentions.by_hand, [array] * 3).program).program
    (op,) = (op for op in program.ops if op.kind == FORWARD)
    about = rule_of(program, op), Choice.of({}), Mesh.of()
    device = parse_cluster(cluster).device
    queries, *_ = program.operand_values(op)
    found = blocks(op, queries, *about, device)
    assert (found.num_bytes if found else 0) == HEADS * LENGTH**2 / 2 * each
    work = op_work(program, op, *about, device)
    least = work.flops / device.flops_per_second(queries.dtype)
    moved = HEADS * LENGTH**2 / 2 * each / device.memory_bytes_per_second
    assert work.seconds > least + moved
