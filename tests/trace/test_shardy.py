"""Shardy's rules read and composed: what survives several instructions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from rhino_jax.trace.reader import read_jaxpr
from rhino_jax.trace.shardy import (
    Lowered,
    Term,
    ask,
    compose,
    parse_term_rule,
    shardy_rule,
)


def rule(text: str, *sets: str):
    return parse_term_rule(f"#sdy.op_sharding_rule<{' '.join((text, *sets))}>")


def composed(shapes, inputs, outputs, *terms):
    return compose(Lowered(tuple(shapes), inputs, outputs, terms)).text


def test_rule_of_many_factors():
    found = rule(
        "([z_1, ij], [])->([i, z_1]) {i=4, j=2, z_1=3}",
        "reduction={j}",
        "need_replication={i}",
        "permutation={z_1}",
    )
    assert found.operands == ((("z_1",), ("i", "j")), ())
    assert found.results == ((("i",), ("z_1",)),)
    assert found.sizes == {"i": 4, "j": 2, "z_1": 3}
    assert found.reduction == {"j"}
    assert found.whole == {"i", "z_1"}


def test_rule_without_factors():
    found = rule("([], [])->([])")
    assert (found.operands, found.results) == (((), ()), ((),))


@pytest.mark.parametrize("text", ["", "([i])->([i]) {i=2}, other={i}"])
def test_what_is_no_rule(text):
    with pytest.raises(AssertionError):
        rule(text, "unheard_of={i}")


MERGE = rule("([i, j])->([ij]) {i=4, j=6}")
HALVE = rule("([ij])->([i, j]) {i=2, j=12}")
SUM = rule("([i, j], [])->([i]) {i=4, j=6}", "reduction={j}")
SAME = rule("([i])->([i]) {i=4}")


def test_refined_from_both_sides():
    text = composed(
        [(4, 6), (24,), (2, 12)],
        (0,),
        (2,),
        Term("stablehlo.reshape", (0,), (1,), MERGE),
        Term("stablehlo.reshape", (1,), (2,), HALVE),
    )
    assert text == "(ab)c->a(bc)"


def reduction(zero: bool, *after: Term) -> str:
    made = 2 + len(after)
    return composed(
        [(4, 6), (), *[(4,)] * (1 + len(after))],
        (0,),
        (made,),
        Term("stablehlo.constant", (), (1,), is_zero=zero),
        Term("stablehlo.reduce", (0, 1), (2,), SUM, "sum"),
        *after,
    )


def test_sum():
    assert reduction(True) == "ab->a {b:reduction=sum}"


def test_a_sum_that_starts_elsewhere_is_not_started_by_every_shard():
    assert reduction(False) == "ab->a {b:blocked}"


def test_a_sum_that_is_used_again_is_not_left_partial():
    after = Term("stablehlo.exponential", (2,), (3,), SAME)
    assert reduction(True, after) == "ab->a {b:blocked}"


def test_the_same_factor_twice_in_one_array_is_blocked():
    square = rule("([i], [j])->([i, j]) {i=4, j=4}")
    text = composed(
        [(4,), (4, 4)], (0,), (1,), Term("stablehlo.add", (0, 0), (1,), square)
    )
    assert text == "a->aa {a:blocked}"


def test_an_instruction_without_a_rule_blocks_what_it_touches():
    text = composed(
        [(4,), (4,), (4,), (4,)],
        (0, 1),
        (2, 3),
        Term("stablehlo.custom_call", (0,), (2,)),
        Term("stablehlo.exponential", (1,), (3,), SAME),
    )
    assert text == "a,b->c,b {a:blocked, c:blocked}"


def last_op(fun, *args):
    program, _ = read_jaxpr(jax.make_jaxpr(fun)(*args))
    return program.ops[-1]


def test_calls_are_followed():
    op = last_op(lambda x: lax.cumsum(x, 1), jnp.ones((4, 6)))
    assert shardy_rule(op).text == "ab->ab {b:blocked}"


def test_a_reducer_is_known_by_its_one_instruction():
    for fun, operator in ((jnp.max, "max"), (jnp.sum, "sum"), (jnp.prod, "")):
        op = last_op(fun, jnp.ones((4, 6)))
        (reduce,) = (t for t in ask(op).terms if t.name == "stablehlo.reduce")
        assert reduce.operator == operator


def test_random_keys_are_refused():
    op = last_op(lambda key: jax.random.bits(key, (4,)), jax.random.key(0))
    with pytest.raises(AssertionError, match="reads random keys"):
        ask(op)
