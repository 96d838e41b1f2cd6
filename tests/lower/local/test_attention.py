"""Attention: blocks against a softmax, shards and rings against the whole."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rhino_jax import compat
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.lower.kernels import attention as blockwise
from rhino_jax.lower.kernels.attention import Hiding, Scores
from rhino_jax.lower.local import attention as local
from rhino_jax.lower.local.shard import Shard
from rhino_jax.lower.manual import run
from rhino_jax.rules import rule_of
from rhino_jax.rules.attention import BACKWARD, FORWARD, SUMS, Attention
from tests.lower.local.harness import (
    alone_and_in_pairs,
    check_choices,
    evaluate,
    one_op,
    plan_of,
    recombine_all,
)

MESH = Mesh.of(x=2, y=2)


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- the stand-in ------------------------------------------------------------------


def plainly(
    q: Any, k: Any, v: Any, bias: Any, at: Scores, hiding: Hiding
) -> tuple[Any, Any]:
    score = jnp.einsum("bhgtd,bhud->bhgtu", q, k) * hiding.scale
    score = score if bias is None else score + bias
    seen = hiding.seen(at, False)
    if seen is None:
        seen = jnp.bool_(True)
    score = jnp.where(seen, score, -1e30)
    p = jnp.where(seen, jax.nn.softmax(score, -1), 0)
    return jnp.einsum("bhgtu,bhue->bhgte", p, v), jax.nn.logsumexp(score, -1)


MASKS = {
    "causal in a window": (Hiding(0.3, True, 5), False, None),
    "lengths and a bias": (Hiding(0.3), True, (np.array([20, 37]), np.array([9, 29]))),
}


@pytest.mark.parametrize("name", MASKS)
def test_blocks_are_a_softmax(
    name: str, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients too; 37 queries and 29 keys in blocks of 16 leave pads in both."""
    for limit in ("LONGEST", "SHORTEST"):
        monkeypatch.setattr(blockwise, limit, 16)
    hiding, biased, lengths = MASKS[name]
    q, k, v = rand(2, 2, 2, 37, 8), rand(2, 2, 29, 8, seed=1), rand(2, 2, 29, 9, seed=2)
    bias = rand(2, 1, 1, 37, 29, seed=3) if biased else None
    cotangent = rand(2, 2, 2, 37, 9, seed=4)
    at = Scores(jnp.arange(37), jnp.arange(29), bias, *(lengths or (None, None)))

    def both(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return plainly(q, k, v, bias, at, hiding)

    (want, sums), pull = jax.vjp(both, q, k, v, bias)
    wanted = pull((cotangent, jnp.zeros_like(sums)))

    def run(*args: Any) -> Any:
        out, sums = blockwise.forward(*args, at, hiding)
        given = (*args, at, hiding, sums, out, cotangent)
        return out, blockwise.backward(*given, of_bias=biased)

    out, found = jax.jit(run)(q, k, v)
    of_bias = jnp.sum(found.bias, (1, 2), keepdims=True) if biased else None
    for have, need in zip(
        (out, found.q, found.k, found.v, of_bias), (want, *wanted), strict=True
    ):
        if need is not None:
            np.testing.assert_allclose(have, need, atol=1e-12)


# ---- shards ------------------------------------------------------------------------


def step(q: Any, k: Any, v: Any, *more: Any, names: Any, **options: Any) -> Any:
    """Gradients of attention as a user asks for it; ``names`` are those of ``more``."""

    def total(q: Any, k: Any, v: Any) -> Any:
        found = jax.nn.dot_product_attention(
            *(q, k, v), implementation="cudnn", **named, **options
        )
        return jnp.sum(found.astype(jnp.float32) ** 2)

    named = dict(zip(names, more, strict=True))
    return jax.grad(total, (0, 1, 2))(q, k, v)


LENGTHS = np.array([8, 5], np.int32)
CASES: dict[str, tuple[tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    "causal": ((16, 16), {}, {"is_causal": True}),
    "window": ((16, 16), {}, {"is_causal": True, "local_window_size": (5, 0)}),
    "other keys": ((8, 16), {}, {}),
    "bias": ((8, 8), {"bias": rand(1, 4, 8, 8).astype(jnp.bfloat16)}, {}),
    "lengths": (
        (8, 8),
        {"query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS[::-1]},
        {"is_causal": True},
    ),
}
"""Lengths of queries and keys, further arrays, options."""
TRIED = 3


def only(name: str, kind: str) -> tuple[Program, Op]:
    """The Program of one op of a case, in float32."""
    (rows, columns), more, options = CASES[name]
    shapes = [(2, rows, 4, 8), (2, columns, 2, 8), (2, columns, 2, 8)]
    args = [rand(*shape).astype(jnp.bfloat16) for shape in shapes]

    def asked(*args: Any) -> Any:
        return step(*args, names=tuple(more), **options)

    with compat.cudnn_traceable():
        program, op = one_op(asked, *args, *more.values(), kind=kind)
    # JAX lets no float32 through to cuDNN's kernels; the stand-in takes any.
    wide = (
        replace(v, dtype="float32") if v.dtype == "bfloat16" else v
        for v in program.values
    )
    return replace(program, values=tuple(wide)), op


RINGS = (
    Choice.of({"s": [Split("x", 8), Split("y", 4)]}),
    Choice.of({"s": [Split("x", 2)], "h": [Split("y", 1)]}),
    Choice.of({"s": [Split("y", 4), Split("x", 2)]}),
)
"""Blocks over both axes; strides of two, so that every device has four runs of rows;
blocks over the axes in another order than that of the mesh."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_shard_run_recombine(name: str, kind: str, device_mesh: Any) -> None:
    program, op = only(name, kind)
    tried = alone_and_in_pairs(rule_of(program, op), MESH)
    if name in ("causal", "window"):
        assert {choice.on("s") for choice in tried} >= {(Split("x", 8),)}
        some = list(RINGS if name == "causal" else RINGS[1:])
    else:
        some = tried[:: max(1, len(tried) // TRIED)]
    given = operands(program)
    check_choices(program, some, MESH, device_mesh(MESH), given, rtol=1e-5)


def kernel(shard: Shard, *args: Any, mask_type: Any, is_training: bool = True) -> Any:
    """What cuDNN does: a mask by name, positions from zero."""
    about = replace(Attention.of(shard.op), causal="CAUSAL" in mask_type.name)
    here = local._Here(shard, about, args)
    rows, columns = (jnp.arange(x.shape[1]) for x in args[:2])
    if about.backward:
        return here.gradients(here.backward(args[1], args[2], rows, columns))
    return here.results(*here.forward(args[1], args[2], rows, columns))


@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_a_ring_of_kernels_that_know_no_positions(
    kind: str, device_mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not jax.__version__.startswith("0.10."):
        pytest.skip("the CPU compiler of jaxlib 0.11.2 crashes on empty arrays")

    def by_vendor(fits: bool, vendor: Any, stand_in: Any, args: Any) -> Any:
        return vendor(*args) if fits else stand_in(*args)

    program, _ = only("causal", kind)
    given = operands(program)
    expected = evaluate(program, given)
    monkeypatch.setattr(local, "_by_vendor", by_vendor)
    monkeypatch.setattr(Shard, "bind", kernel)
    found = recombine_all(program, RINGS, MESH, device_mesh(MESH), given)
    for results in found:
        for have, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
def test_a_gpu_gets_the_kernels_of_cudnn(
    kind: str, device_mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowered, not run: for all keys of others, and for the diagonal."""
    program, _ = only("causal", kind)
    narrow = (
        replace(v, dtype="bfloat16") if len(v.shape) == 4 else v for v in program.values
    )
    program = replace(program, values=tuple(narrow))
    monkeypatch.setattr(compat, "cudnn_runs", lambda: True)
    text = lowered(program, RINGS[0], "cuda", device_mesh(MESH))
    name = "fmhaSoftmaxBackward" if kind == BACKWARD else "fmhaSoftmax"
    assert len(re.findall(rf"@__cudnn\${name}\(", text)) == 2 * 2  # in the loop, behind
    assert {"NO_MASK", "CAUSAL"} <= set(re.findall(r"[A-Z]+_?[A-Z]*", text))
    assert "__cudnn" not in lowered(program, RINGS[0], "cpu", device_mesh(MESH))


def lowered(program: Program, choice: Choice, platform: str, jax_mesh: Any) -> str:
    plan = plan_of(program, choice, MESH)
    body = jax.shard_map(
        lambda *xs: run(program, plan, MESH, xs),
        mesh=jax_mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    values = (program.values[v] for v in program.inputs)
    given = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]
    traced = jax.jit(body).trace(*given)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def operands(program: Any) -> list[Any]:
    """Random arrays, sums of exponentials that keep shares small, lengths."""
    found = []
    (op,) = program.ops
    sums = op.operands[SUMS] if op.kind == BACKWARD else None
    for i, v in enumerate(program.inputs):
        value = program.values[v]
        if value.dtype == "int32":
            found.append(LENGTHS)
        else:
            drawn = rand(*value.shape, seed=i) + (6 if v == sums else 0)
            found.append(drawn.astype(value.dtype))
    return found
