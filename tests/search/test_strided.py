"""A fused projection, however its user cuts it: the search splits heads inside each
third, and sends no more than moving the weight and reducing activations takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.ir.assignment import boundary
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta
from rhino_jax.sent import collectives
from tests.search.steps import f32, subject_of

MESH = Mesh.of(t=4)
TOKENS, HEADS, SIZE = 512, 4, 8
WIDTH = HEADS * SIZE
EXPERT_BYTES = 4 * 3 // 4 * (2 * WIDTH * 3 * WIDTH // 4 + 2 * 2 * TOKENS * WIDTH) + 64
"""The weight and its gradient by an all-to-all each, two all-reduces of activations,
float32 over 4 devices; and a few bytes for the loss."""


def split(qkv: Any) -> Any:
    return jnp.split(qkv, 3, axis=-1)


def sliced(qkv: Any) -> Any:
    return qkv[:, :WIDTH], qkv[:, WIDTH : 2 * WIDTH], qkv[:, 2 * WIDTH :]


def unpacked(qkv: Any) -> Any:
    q, k, v = jnp.moveaxis(qkv.reshape(TOKENS, 3, WIDTH), 1, 0)
    return q, k, v


def joined_again(qkv: Any) -> Any:
    q, k, v = split(qkv)
    return split(jnp.concatenate([v, q, k], axis=-1) * 2.0)


WAYS = {one.__name__: one for one in (split, sliced, unpacked, joined_again)}


def step_of(cut: Callable[[Any], Any]) -> Any:
    def loss_of(params: Any, x: Any) -> Any:
        parts = cut(x @ params["qkv"])
        q, k, v = (t.reshape(TOKENS, HEADS, SIZE) for t in parts)
        probs = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
        mixed = jnp.einsum("hqk,khd->qhd", probs, v).reshape(TOKENS, WIDTH)
        return jnp.mean((x + mixed @ params["out"]) ** 2)

    def step(params: Any, x: Any) -> Any:
        grads, into = jax.grad(loss_of, argnums=(0, 1))(params, x)
        return jax.tree.map(lambda p, g: p - g, params, grads), into

    return step


@pytest.mark.parametrize("way", WAYS)
def test_heads_are_split_inside_each_third(way: str) -> None:
    params = {"qkv": f32(WIDTH, 3 * WIDTH), "out": f32(WIDTH, WIDTH)}
    subject = subject_of(step_of(WAYS[way]), params, f32(TOKENS, WIDTH))
    program = subject.program
    request = Request(MESH, AlphaBeta(), replicate_heavy=False)
    assignment = search(subject, request).assignment
    product = next(
        (op, plan)
        for op, plan in zip(program.ops, assignment.ops, strict=True)
        if op.kind == "dot_general"
    )
    _, (made,) = boundary(program, *product, rule_of(program, product[0]))
    assert str(made) == f"[-,t/{WIDTH // 4}]"
    sent = sum(c.total_bytes for c in collectives(program, assignment, MESH))
    assert sent <= EXPERT_BYTES
