"""Rules of what cuts and joins dimensions: the period survives."""

from __future__ import annotations

import pytest

from rhino_jax.ir.factors import Flow
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of


def program(kind, reads, makes, dtype="float32", pad_value=None, **params):
    """The Program of one op on values of these shapes."""
    values = [Value(s, dtype) for s in (*reads, *makes)]
    if pad_value is not None:
        values[1] = Value((), dtype, literal=pad_value)
    count = len(reads)
    results = tuple(range(count, count + len(makes)))
    op = Op(kind, tuple(range(count)), results, tuple(sorted(params.items())))
    return Program(tuple(values), tuple(range(count)), (op,), results)


def slice_of(n, start, limit, stride=1):
    size = -(-(limit - start) // stride)
    strides = None if stride == 1 else (stride,)
    return program(
        "slice",
        [(n,)],
        [(size,)],
        start_indices=(start,),
        limit_indices=(limit,),
        strides=strides,
    )


def pad_of(n, low, high, interior=0, pad_value=None):
    size = n + max(n - 1, 0) * interior + low + high
    config = ((low, high, interior),)
    return program(
        "pad", [(n,), ()], [(size,)], pad_value=pad_value, padding_config=config
    )


def join_of(*sizes):
    shapes = [(5, n) for n in sizes]
    return program("concatenate", shapes, [(5, sum(sizes))], dimension=1)


CASES = {
    "slice whole": (slice_of(8, 0, 8), "a->a"),
    "slice third": (slice_of(24, 8, 16), "(ba)->a {b:blocked}"),
    "slice by period": (slice_of(24, 6, 18), "(ba)->(ca) {b:blocked, c:blocked}"),
    "slice off period": (slice_of(9, 1, 9), "a->b {a:blocked, b:blocked}"),
    "slice every other": (slice_of(12, 1, 12, 2), "(ab)->a {b:blocked}"),
    "slice steps of half": (slice_of(24, 12, 24, 3), "(bac)->a {b:blocked, c:blocked}"),
    "slice odd steps": (slice_of(7, 0, 7, 2), "a->b {a:blocked, b:blocked}"),
    "slice to nothing": (slice_of(6, 2, 2), "a->b {a:blocked, b:blocked}"),
    "slice two dims": (
        program(
            "slice",
            [(6, 9)],
            [(6, 3)],
            start_indices=(0, 3),
            limit_indices=(6, 6),
            strides=None,
        ),
        "a(cb)->ab {c:blocked}",
    ),
    "pad nothing": (pad_of(6, 0, 0), "a,->a"),
    "pad by itself": (pad_of(4, 4, 8), "a,->(ba) {b:blocked}"),
    "pad by period": (pad_of(6, 2, 0), "(ca),->(ba) {b:blocked, c:blocked}"),
    "pad by one": (pad_of(6, 1, 1), "b,->a {a:blocked, b:blocked}"),
    "pad away": (pad_of(12, -4, 0), "(ca),->(ba) {b:blocked, c:blocked}"),
    "pad between": (pad_of(6, 1, 0, 1), "a,->(ab) {b:blocked}"),
    "pad between unevenly": (pad_of(6, 1, 1, 1), "b,->a {a:blocked, b:blocked}"),
    "pad empty": (pad_of(0, 2, 2), "b,->a {a:blocked, b:blocked}"),
    "join thirds": (join_of(4, 4, 4), "ca,ca,ca->c(ba) {b:blocked}"),
    "join by period": (
        join_of(4, 6),
        "e(ba),e(ca)->e(da) {b:blocked, c:blocked, d:blocked}",
    ),
    "join primes": (join_of(2, 3), "da,db->dc {a:blocked, b:blocked, c:blocked}"),
    "join with nothing": (join_of(4, 0), "da,db->dc {a:blocked, b:blocked, c:blocked}"),
    "join one": (join_of(4), "ba->ba"),
    "stack": (
        program("stack", [(4, 6)] * 2, [(4, 2, 6)], axis=1),
        "ab,ab->acb {c:blocked}",
    ),
    "unstack": (
        program("unstack", [(2, 4)], [(4,)] * 2, axis=0),
        "ba->a,a {b:blocked}",
    ),
    "rev": (program("rev", [(4, 6)], [(4, 6)], dimensions=(1,)), "ab->ab {b:blocked}"),
    "tile": (program("tile", [(4, 6)], [(4, 18)], reps=(1, 3)), "ab->a(cb)"),
    "bitcast": (program("bitcast_convert_type", [(4,)], [(4,)]), "a->a"),
    "bitcast narrower": (
        program("bitcast_convert_type", [(4,)], [(4, 2)]),
        "a->ab {b:blocked}",
    ),
    "bitcast wider": (
        program("bitcast_convert_type", [(4, 2)], [(4,)]),
        "ab->a {b:blocked}",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    given, text = CASES[name]
    assert rule_of(given, given.ops[0]).text == text


@pytest.mark.parametrize(
    "pad_value, flows",
    [
        (0.0, (Flow("sum", (0,)),)),
        (1.0, ()),
        (float("nan"), ()),
        (None, (Flow("sum", (0, 1)),)),
    ],
)
def test_terms_are_padded_with_terms(pad_value, flows):
    given = pad_of(6, 1, 1, pad_value=pad_value)
    assert rule_of(given, given.ops[0]).flows == flows


def test_joined_terms_come_together():
    given = join_of(4, 4, 4)
    assert rule_of(given, given.ops[0]).flows == (Flow("sum", (0, 1, 2)),)


def test_unstacked_terms_are_all_terms():
    given, _ = CASES["unstack"]
    assert rule_of(given, given.ops[0]).flows == (Flow("sum", (0,), (0, 1)),)


def test_bits_of_terms_are_no_terms():
    given, _ = CASES["bitcast"]
    assert rule_of(given, given.ops[0]).flows == ()
