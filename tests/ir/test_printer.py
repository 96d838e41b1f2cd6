"""Programs as text: the same on every run, for programs kept as files."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest
from hypothesis import given, settings

from rhino_jax.ir.printer import print_op, print_program
from rhino_jax.ir.program import Op, Program, Value, Where
from tests.ir.golden import DATA, STEPS, program
from tests.ir.programs import programs

F = Value((2, 3), "float32")


@pytest.mark.skipif(
    not jax.__version__.startswith("0.10."),
    reason="kept as jax 0.10 traces them; other versions trace other primitives",
)
@pytest.mark.parametrize("name", STEPS)
def test_programs_print_as_kept(name: str) -> None:
    """After a wanted change: ``python -m tests.ir.golden``, and read the difference."""
    kept = (DATA / f"{name}.txt").read_text("utf-8")
    assert print_program(program(name)) + "\n" == kept
    # Traced once more, from new functions: nothing of an earlier run is in the text.
    assert print_program(program(name)) + "\n" == kept


@settings(max_examples=60, deadline=None)
@given(programs())
def test_printing_is_a_function_of_the_program(drawn: Program) -> None:
    text = print_program(drawn)
    assert print_program(replace(drawn)) == text
    ops = sum(1 for _ in drawn.walk())
    bodies = sum(len(op.programs) for _, op in drawn.walk())
    # One line per op, and head, return and brace of every Program.
    assert len(text.splitlines()) == ops + 3 * (1 + bodies)


def test_lines_and_what_is_quiet() -> None:
    op = Op(
        "reduce_sum",
        (0,),
        (1,),
        (("axes", (0, (1,))), ("keepdims", False), ("sharding", "x"), ("z", None)),
        where=Where("/home/me/train.py", 12, "jvp(net)"),
    )
    drawn = Program((F, Value((), "bfloat16")), (0,), (op,), (1,))
    assert print_op(drawn, op) == "%1: bf16[] = reduce_sum %0 [axes=(0,(1))]"
    assert print_op(drawn, op, where=True).endswith("[axes=(0,(1))]  # train.py:12")
    scoped = replace(op, where=Where(name_stack="jvp(net)"))
    assert print_op(drawn, scoped, where=True).endswith("  # jvp(net)")


def test_literals_and_ops_without_results() -> None:
    drawn = Program((F, Value((), "float32", literal=2.5)), (0,), (), (1, 0))
    assert print_program(drawn).splitlines()[1] == "  return 2.5, %0"
    assert print_op(drawn, Op("debug_print", (1, 0), ())) == "debug_print 2.5, %0"
