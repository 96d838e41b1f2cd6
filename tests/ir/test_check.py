"""Every law of a Program, broken once: it is caught, and shown where it stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rhino_jax.errors import ProgramError
from rhino_jax.ir.check import NEIGHBOURS, check
from rhino_jax.ir.program import Op, Program, Value

F, G = Value((2,), "float32"), Value((3,), "float32")


def chain(length: int) -> Program:
    """``length`` ops in a row: op n makes %n+1 of %n."""
    ops = tuple(Op("sin", (n,), (n + 1,)) for n in range(length))
    return Program((F,) * (length + 1), (0,), ops, (length,))


CHAIN = chain(20)
BODY = Program((F, F), (0,), (Op("sin", (0,), (1,)),), (1,), "body")


def with_op(index: int, op: Op) -> Program:
    return replace(CHAIN, ops=(*CHAIN.ops[:index], op, *CHAIN.ops[index + 1 :]))


def calling(
    kind: str, body: Program, operands: Any, results: Any, **params: Any
) -> Program:
    """A Program of one op that holds ``body``, over values F F F and G."""
    op = Op(kind, operands, results, tuple(sorted(params.items())), (body,))
    return Program((F, F, F, G), (0, 3), (op,), (0,), "outer")


def scan(body: Program, operands: Any, consts: int = 0, carry: int = 1) -> Program:
    return calling(
        "scan", body, operands, (1,), num_consts=consts, num_carry=carry, length=2
    )


def loop(
    body: Program, operands: Any, consts: int = 0, test: Program | None = None
) -> Program:
    params = (("body_nconsts", consts), ("cond_nconsts", 0))
    op = Op("while", operands, (1,), params, (test or TEST, body))
    return Program((F, F, F, G), (0, 3), (op,), (0,), "outer")


TEST = Program((F, Value((), "bool")), (0,), (Op("any", (0,), (1,)),), (1,), "test")
INTS = replace(BODY, values=(Value((2,), "int32"), F))
LITERAL = (*CHAIN.values[:3], Value((), "float32", literal=1.0), *CHAIN.values[4:])
GROWS = Program((F, G), (0,), (Op("pad", (0,), (1,)),), (1,), "body")
BROKEN: list[tuple[str, Program, str]] = [
    ("twice", replace(CHAIN, inputs=(0, 0)), "an input is listed twice"),
    ("late", with_op(7, Op("sin", (12,), (8,))), "operand %12 is not defined yet"),
    ("again", with_op(7, Op("sin", (7,), (3,))), "result %3 is defined twice"),
    ("input", with_op(7, Op("sin", (7,), (0,))), "result %0 is defined twice"),
    ("output", replace(CHAIN, ops=CHAIN.ops[:-1]), "output %20 is not defined"),
    ("body", calling("remat2", replace(BODY, ops=()), (0,), (1,)), "output %1 is not"),
    ("fewer", scan(BODY, (0, 0)), "the body of a scan takes other inputs"),
    ("carry", scan(GROWS, (0,)), "a carry changes from f32[2] to f32[3]"),
    ("takes", calling("remat2", BODY, (3,), (1,)), "a body takes other inputs"),
    ("count", calling("remat2", BODY, (0, 0), (1,)), "a body takes other inputs"),
    ("gives", calling("remat2", GROWS, (0,), (1,)), "a body gives other outputs"),
    ("branch", calling("cond", BODY, (3, 3), (1,)), "a body takes other inputs"),
    ("no operand", with_op(7, Op("sin", (99,), (8,))), "operand %99 does not exist"),
    ("negative", with_op(7, Op("sin", (-1,), (8,))), "operand %-1 does not exist"),
    ("no result", with_op(7, Op("sin", (7,), (99,))), "result %99 does not exist"),
    ("no input", replace(CHAIN, inputs=(0, 99)), "input %99 does not exist"),
    ("no output", replace(CHAIN, outputs=(99,)), "output %99 does not exist"),
    ("made literal", replace(CHAIN, values=LITERAL), "result %3 is a literal"),
    ("given literal", replace(CHAIN, inputs=(3,), values=LITERAL), "input %3 is a lit"),
    (
        "lost carry",
        scan(replace(BODY, outputs=()), (0,)),
        "1 carries go in, 0 come out",
    ),
    ("scanned", scan(BODY, (0,), carry=0), "the body of a scan takes other inputs"),
    ("stacked", scan(replace(BODY, outputs=(1, 1)), (0,)), "gives other outputs"),
    ("dtype", calling("remat2", INTS, (0,), (1,)), "a body takes other inputs"),
    ("while takes", loop(BODY, (3,)), "the condition of a while takes other inputs"),
    ("while grows", loop(GROWS, (0,)), "a carry changes from f32[2] to f32[3]"),
    ("while consts", loop(BODY, (0, 0), 1), "the body of a while takes other inputs"),
    ("while test", loop(BODY, (0,), test=BODY), "the condition of a while is not one"),
]


@pytest.mark.parametrize(
    ("program", "what"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_a_broken_law_is_named(program: Program, what: str) -> None:
    with pytest.raises(ProgramError) as caught:
        check(program, "some pass")
    title = str(caught.value).splitlines()[0]
    assert what in title
    assert f"{program.name} after some pass: " in title or "body after some" in title


def test_the_neighbourhood_is_shown() -> None:
    with pytest.raises(ProgramError) as caught:
        check(with_op(9, Op("sin", (15,), (10,))))
    title, *lines = str(caught.value).splitlines()
    assert title == "step: operand %15 is not defined yet"
    assert len(lines) == 2 * NEIGHBOURS + 1
    assert lines[NEIGHBOURS] == "> %10: f32[2] = sin %15"
    assert lines[0] == "  %5: f32[2] = sin %4"
    assert lines[-1] == "  %15: f32[2] = sin %14"


def test_the_neighbourhood_ends_with_the_program() -> None:
    with pytest.raises(ProgramError) as caught:
        check(replace(CHAIN, ops=CHAIN.ops[:-1]))
    lines = str(caught.value).splitlines()[1:]
    assert lines[-1] == "  %19: f32[2] = sin %18"
    assert len(lines) == NEIGHBOURS


def test_programs_that_hold_are_given_back() -> None:
    literal = Program((F, Value((), "float32", literal=1.0)), (0,), (), (1, 0, 0))
    branches = calling("cond", BODY, (3, 0), (1,))
    for program in (CHAIN, literal, scan(BODY, (0,)), loop(BODY, (0,)), branches):
        assert check(program) is program
