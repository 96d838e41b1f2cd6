"""The rule of attention: what is split, what is a term, what goes around."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax import compat
from rhino_jax.ir.factors import Rule
from rhino_jax.rules import rule_of
from rhino_jax.rules.attention import BACKWARD, FORWARD, attention, shardable
from rhino_jax.trace import trace

TRAIN = jax.nn.dot_product_attention


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def rules(*arrays: Any, **options: Any) -> dict[str, Rule]:
    """By kind of op, of a differentiated step that asks for cuDNN."""

    def step(q: Any, k: Any, v: Any, *bias: Any) -> Any:
        def total(q: Any, k: Any, v: Any, *bias: Any) -> Any:
            found = TRAIN(q, k, v, *bias, implementation="cudnn", **options)
            return jnp.sum(found.astype(jnp.float32))

        return jax.grad(total, range(3 + len(bias)))(q, k, v, *bias)

    program = trace(step, arrays).program
    kinds = (FORWARD, BACKWARD)
    return {op.kind: rule_of(program, op) for op in program.ops if op.kind in kinds}


def split(rule: Rule) -> dict[str, tuple[str, str]]:
    """Kind and operator of every factor of more than one element that may be split."""
    return {
        f.name: (f.kind, f.operator)
        for f in rule.factors
        if f.traits.split and f.size > 1
    }


def test_a_sequence_is_a_ring() -> None:
    found = rules(shaped(2, 64, 4, 8), *[shaped(2, 64, 2, 8)] * 2, is_causal=True)
    assert split(found[FORWARD]) == {
        "b": ("parallel", ""),
        "h": ("parallel", ""),
        "g": ("parallel", ""),
        "s": ("ring", ""),
    }
    assert split(found[BACKWARD]) == {
        "b": ("parallel", ""),
        "h": ("parallel", ""),
        "g": ("reduction", "sum"),
        "s": ("ring", ""),
    }
    assert found[FORWARD].factor("s").handed == (1, 2)
    assert found[BACKWARD].factor("s").returned == (1, 2)


def test_of_other_keys_there_is_no_ring() -> None:
    found = rules(shaped(2, 32, 4, 8), *[shaped(2, 64, 4, 8)] * 2)
    assert split(found[FORWARD])["t"] == ("positional", "")
    assert "u" not in split(found[FORWARD])
    assert split(found[BACKWARD])["t"] == ("positional", "sum")
    assert split(found[BACKWARD])["u"] == ("positional", "sum")


def test_a_bias_for_all_gets_terms() -> None:
    """One bias for all examples and heads: its gradient is a sum over both."""
    found = rules(*[shaped(2, 32, 4, 8)] * 3, shaped(1, 1, 32, 32))
    backward = split(found[BACKWARD])
    assert backward["b"] == ("parallel", "sum") == backward["h"]
    assert split(found[FORWARD])["b"] == ("parallel", "")


@pytest.mark.parametrize("lack", ["dropout", "pages"])
def test_what_no_shard_can_do_is_whole(lack: str) -> None:
    arrays = [shaped(2, 64, 4, 8)] * 3
    with compat.cudnn_traceable():
        program = trace(lambda *a: TRAIN(*a, implementation="cudnn"), arrays).program
    (op,) = (op for op in program.ops if op.kind == FORWARD)
    reads, makes = list(program.operand_values(op)), program.result_values(op)
    assert shardable(op, reads)
    if lack == "dropout":
        op = type(op)(op.kind, (), (), (*op.params, ("dropout_rate", 0.1)))
    else:
        reads[-1] = reads[0]
    assert not shardable(op, reads)
    assert not split(attention(op, reads, makes))
