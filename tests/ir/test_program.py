"""Programs as data: who uses what, sizes, and a hash that is the same everywhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from rhino_jax.ir.check import check
from rhino_jax.ir.program import Op, Program, Value, Where, itemsize, short_dtype
from tests.ir.golden import STEPS, program
from tests.ir.programs import programs

F = Value((2, 3), "float32")
SMALL = Program(
    (F, F, F, Value((), "float32", literal=2.0)),
    (0,),
    (Op("add", (0, 0), (1,)), Op("mul", (1, 3), (2,), (("axes", (0,)),))),
    (2, 0),
)


def test_uses_and_producers() -> None:
    assert SMALL.uses == {0: (0,), 1: (1,), 3: (1,)}
    assert SMALL.producer == {1: 0, 2: 1}
    assert SMALL.shapes((0, 3)) == ((2, 3), ())
    assert SMALL.result_values(SMALL.ops[1]) == (F,)
    assert SMALL.ops[1].param == {"axes": (0,)}


def test_walk_is_outer_before_inner() -> None:
    outer = Program((F, F), (0,), (Op("remat2", (0,), (1,), (), (SMALL,)),), (1,))
    assert [op.kind for _, op in outer.walk()] == ["remat2", "add", "mul"]


@pytest.mark.parametrize(
    ("value", "text", "size", "num_bytes"),
    [
        (F, "f32[2,3]", 6, 24),
        (Value((3,), "int4"), "i4[3]", 3, 2),
        (Value((), "bool"), "bool[]", 1, 1),
        (Value((4,), "key<fry>"), "key<fry>[4]", 4, 32),
        (Value((2,), "key<rbg>"), "key<rbg>[2]", 2, 32),
        (Value((), "float32", literal=2.5), "2.5", 1, 4),
        (Value((0, 3), "float8_e4m3fn"), "f8_e4m3fn[0,3]", 0, 0),
    ],
)
def test_values(value: Value, text: str, size: int, num_bytes: int) -> None:
    assert (str(value), value.size, value.num_bytes) == (text, size, num_bytes)


def test_dtypes() -> None:
    assert [short_dtype(d) for d in ("bfloat16", "uint8", "complex64")] == [
        "bf16",
        "u8",
        "c64",
    ]
    with pytest.raises(AssertionError, match="no size known"):
        itemsize("strange")


def changed(**fields: object) -> Program:
    """``SMALL`` with the second op changed."""
    return replace(SMALL, ops=(SMALL.ops[0], replace(SMALL.ops[1], **fields)))


DIFFERENT: list[Program] = [
    changed(kind="div"),
    changed(operands=(3, 1)),
    changed(params=(("axes", (1,)),)),
    changed(effects=("IOEffect",)),
    changed(programs=(SMALL,)),
    replace(SMALL, outputs=(0, 2)),
    replace(SMALL, values=(*SMALL.values[:3], Value((), "float32", literal=2))),
    replace(SMALL, values=(*SMALL.values[:3], Value((), "float32", literal=True))),
    replace(SMALL, values=(*SMALL.values[:3], Value((), "float64", literal=2.0))),
]


def test_the_hash_sees_every_difference_of_meaning() -> None:
    digests = {SMALL.digest, *(other.digest for other in DIFFERENT)}
    assert len(digests) == 1 + len(DIFFERENT)


def test_the_hash_sees_no_names_and_no_lines() -> None:
    moved = changed(where=Where("train.py", 3, "jvp"), source=object())
    named = tuple(replace(v, name=f"v{i}") for i, v in enumerate(SMALL.values))
    assert moved.digest == SMALL.digest
    assert replace(SMALL, name="other", values=named).digest == SMALL.digest


@settings(max_examples=60, deadline=None)
@given(programs(), programs())
def test_hashes_agree_where_programs_do(one: Program, two: Program) -> None:
    assert check(one) is one
    assert replace(one).digest == one.digest

    def plain(p: Program) -> Program:
        """Without weak types, which change no result, nor the name."""
        values = tuple(replace(v, weak=False) for v in p.values)
        ops = tuple(
            replace(op, programs=tuple(map(plain, op.programs))) for op in p.ops
        )
        return Program(values, p.inputs, ops, p.outputs)

    assert (one.digest == two.digest) == (repr(plain(one)) == repr(plain(two)))


def test_hashes_and_text_are_the_same_in_another_process() -> None:
    code = (
        "from tests.ir.golden import STEPS, program\n"
        "from rhino_jax.ir.printer import print_program\n"
        "for name in STEPS:\n"
        "    p = program(name)\n"
        "    print(p.digest, hash(name) and len(print_program(p)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    found = [line.split()[0] for line in done.stdout.splitlines()]
    assert found == [program(name).digest for name in STEPS]
