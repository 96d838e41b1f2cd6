"""Rules of iotas, keys and draws: which generators can be drawn in parts."""

from __future__ import annotations

import pytest

from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of

FRY, RBG, URBG, OWN = "key<fry>", "key<rbg>", "key<urbg>", "key<mine>"


def text(kind, reads, makes, **params):
    values = tuple(Value(shape, dtype) for dtype, shape in (*reads, *makes))
    ins = tuple(range(len(reads)))
    outs = tuple(range(len(reads), len(values)))
    op = Op(kind, ins, outs, tuple(sorted(params.items())))
    return rule_of(Program(values, ins, (op,), outs), op).text


def bits(key, batch, shape):
    made = ("uint32", (*batch, *shape))
    return text("random_bits", [(key, batch)], [made], shape=shape, bit_width=32)


def split(key, batch, shape):
    return text("random_split", [(key, batch)], [(key, batch + shape)], shape=shape)


def fold_in(key, keys, data):
    made = (key, max(keys, data, key=len))
    return text("random_fold_in", [(key, keys), ("uint32", data)], [made])


CASES = {
    "iota": (text("iota", [], [("int32", (4, 6))], dimension=1, shape=(4, 6)),
             "->ab {b:positional}"),
    "bits": (bits(FRY, (), (4, 6)), "->ab {a:positional, b:positional}"),
    "bits of many keys": (bits(FRY, (3,), (4,)), "a->ab {b:positional}"),
    "rbg bits": (bits(RBG, (), (4, 6)), "->ab {a:blocked, b:blocked}"),
    # Drawn for a batch of rbg keys, the bits are one stream from the first key.
    "rbg bits of many keys": (bits(RBG, (3,), (4,)),
                              "a->bc {a:blocked, b:blocked, c:blocked}"),
    "unsafe rbg bits": (bits(URBG, (), (4,)), "->a {a:blocked}"),
    "bits of an unknown key": (bits(OWN, (), (4,)), "->a {a:blocked}"),
    "split": (split(FRY, (3,), (2, 4)), "a->abc {b:positional, c:positional}"),
    "rbg split": (split(RBG, (3,), (2,)), "a->ab {b:blocked}"),
    "unsafe rbg split": (split(URBG, (3,), (2,)),
                         "a->bc {a:blocked, b:blocked, c:blocked}"),
    "fold in": (fold_in(FRY, (3,), (3,)), "a,a->a"),
    "fold in one key": (fold_in(FRY, (), (3,)), ",a->a"),
    "fold in stretched": (fold_in(RBG, (3, 2), (3, 1)), "ab,a()->ab"),
    "unsafe rbg fold in": (fold_in(URBG, (), (3,)), ",a->b {a:blocked, b:blocked}"),
    "seed": (text("random_seed", [("int32", (3,))], [(URBG, (3,))]), "a->a"),
    "unknown seed": (text("random_seed", [("int32", (3,))], [(OWN, (3,))]),
                     "a->b {a:blocked, b:blocked}"),
    "wrap": (text("random_wrap", [("uint32", (3, 2))], [(FRY, (3,))]),
             "ab->a {b:blocked}"),
    "unwrap": (text("random_unwrap", [(RBG, (3,))], [("uint32", (3, 4))]),
               "a->ab {b:blocked}"),
    "clone": (text("random_clone", [(FRY, (3,))], [(FRY, (3,))]), "a->a"),
    "threefry2x32": (
        text("threefry2x32", [("uint32", ())] * 2 + [("uint32", (4,))] * 2,
             [("uint32", (4,))] * 2), ",,a,a->a,a"),
    "rng_bit_generator": (
        text("rng_bit_generator", [("uint32", (4,))],
             [("uint32", (4,)), ("uint32", (8,))]),
        "a->b,c {a:blocked, b:blocked, c:blocked}"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    found, wanted = CASES[name]
    assert found == wanted
