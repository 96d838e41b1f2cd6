"""Rules of what must see one dimension whole."""

from __future__ import annotations

import pytest

from rhino_jax.ir.factors import Flow
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of


def rule(kind, reads, makes, **params):
    values = tuple(Value(shape, "float32") for shape in (*reads, *makes))
    ins = tuple(range(len(reads)))
    outs = tuple(range(len(reads), len(values)))
    op = Op(kind, ins, outs, tuple(sorted(params.items())))
    return rule_of(Program(values, ins, (op,), outs), op)


X = (4, 6)
CASES = {
    "sort": (rule("sort", [X, X], [X, X], dimension=0), "ab,ab->ab,ab {a:blocked}"),
    "sort from behind": (rule("sort", [X], [X], dimension=-1), "ab->ab {b:blocked}"),
    "top_k": (
        rule("top_k", [X], [(4, 2), (4, 2)], axis=1),
        "ab->ac,ad {b:blocked, c:blocked, d:blocked}",
    ),
    "top_k of all": (
        rule("top_k", [X], [X, X], axis=1), "ab->ab,ab {b:blocked}"
    ),
    "approx_top_k": (
        rule("approx_top_k", [X], [(4, 2), (4, 2)], reduction_dimension=-1),
        "ab->ac,ad {b:blocked, c:blocked, d:blocked}",
    ),
    "argmax": (rule("argmax", [X], [(4,)], axes=(1,)), "ab->a {b:blocked}"),
    "argmin": (rule("argmin", [X], [(6,)], axes=(0,)), "ab->b {a:blocked}"),
    "cumsum": (rule("cumsum", [X], [X], axis=1), "ab->ab {b:blocked}"),
    "reduce": (
        rule("reduce", [X, X, (), ()], [(6,), (6,)], dimensions=(0,)),
        "ab,ab,,->b,b {a:blocked}",
    ),
    "reduce_prod": (rule("reduce_prod", [X], [()], axes=(0, 1)),
                    "ab-> {a:blocked, b:blocked}"),
    "reduce_xor": (rule("reduce_xor", [X], [(4,)], axes=(1,)), "ab->a {b:blocked}"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    found, text = CASES[name]
    assert found.text == text


@pytest.mark.parametrize(
    "kind, flows",
    [
        ("cumsum", (Flow("sum", (0,)),)),
        ("cummax", (Flow("max", (0,)),)),
        ("cummin", (Flow("min", (0,)),)),
        ("cumprod", ()),
        ("cumlogsumexp", ()),
    ],
)
def test_running_sums_let_their_own_terms_through(kind, flows):
    assert rule(kind, [X], [X], axis=0).flows == flows
