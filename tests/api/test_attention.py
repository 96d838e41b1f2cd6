"""A step with attention, decorated: its sequence around a ring, its heads split."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from rhino_jax import compat
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.model import predict
from rhino_jax.ir.mesh import Mesh
from rhino_jax.options import make_options
from rhino_jax.plan import make_plan
from rhino_jax.rules import rule_of
from rhino_jax.rules.attention import BACKWARD, FORWARD
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta

ROWS, WIDTH, DEPTH, VOCAB = 64, 16, 8, 32
MESH = {"x": 4, "y": 2}


def params_of(heads: int) -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    make = partial(jax.random.normal, dtype=jnp.float64)
    return {
        "embed": make(next(keys), (VOCAB, WIDTH)),
        "query": make(next(keys), (WIDTH, heads, DEPTH)) / 4,
        "key": make(next(keys), (WIDTH, heads, DEPTH)) / 4,
        "value": make(next(keys), (WIDTH, heads, DEPTH)) / 4,
        "out": make(next(keys), (heads, DEPTH, WIDTH)) / 4,
    }


def plain_attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def fused_attention(q: Any, k: Any, v: Any) -> Any:
    """What ``implementation="cudnn"`` asks for, in a dtype that cuDNN has not."""
    kernel, none = compat.cudnn.cudnn_attention, jnp.zeros(0, q.dtype)
    causal, scale = kernel.MaskType.CAUSAL, DEPTH**-0.5
    fixed = (scale, 42, 0.0, (False, False), causal, 0, None, compat.CUDNN_VERSION)
    found: Any = kernel._dot_product_attention(q, k, v, *[none] * 7, *fixed, False)
    return found


def train_step(attend: Any, params: Any, tokens: Any) -> Any:
    def loss_of(params: Any) -> Any:
        x = params["embed"][tokens[:, :-1]]
        heads = (jnp.einsum("bsd,dnh->bsnh", x, params[n]) for n in HEADS)
        x = x + jnp.einsum("bsnh,nhd->bsd", attend(*heads), params["out"])
        logits = jax.nn.log_softmax(x @ params["embed"].T)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), loss


HEADS = ("query", "key", "value")


@pytest.mark.parametrize(("heads", "kinds"), [(1, {"collective-permute"}), (8, set())])
def test_a_found_plan_is_the_undecorated_step(
    heads: int, kinds: set[str], x64: None
) -> None:
    """Searched where a product may not be done twice, so that all is split.

    The sums of exponentials are float32 by the kernel's own rule: so near it is.
    """
    params = params_of(heads)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, ROWS + 1), np.int32)
    step = partial(train_step, fused_attention)
    traced = traced_bare(step, (params, tokens), {}, make_options(donate=False))
    mesh = Mesh.of(**MESH)
    request = Request(mesh, AlphaBeta(), replicate_heavy=False)
    found = search(subject_of(traced), request)
    paths = traced.input_paths, traced.output_paths
    plan = make_plan(traced.program, found.assignment, mesh, *paths)
    sent = {c.kind for c in plan.collectives if c.where.startswith("test_attention")}
    for op, done in zip(traced.program.ops, plan.assignment.ops, strict=True):
        if op.kind in (FORWARD, BACKWARD):
            assert set(done.choice.axes) == set(MESH), done.choice
    assert kinds <= sent
    cluster = parse_cluster("h100:1x8")
    predicted = predict(traced.program, found.assignment, mesh, cluster, rule_of)
    assert [(c.kind, c.axes, c.count) for c in predicted.collectives] == [
        (c.kind, c.axes, c.count) for c in plan.collectives
    ]
    decorated = rhino.auto_parallel(plan=plan, mesh=MESH, donate=False)(step)
    got, loss = decorated(params, tokens)
    undecorated = jax.jit(partial(train_step, plain_attention))
    want, expected = undecorated(params, tokens)
    # On float64 operands JAX's own attention makes its softmax in float32.
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, value in want.items():
        change = np.max(np.abs(value - params[name]))
        np.testing.assert_allclose(got[name], value, atol=1e-5 * change, err_msg=name)
