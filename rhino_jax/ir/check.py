"""Is this a Program? Run after every pass that makes or changes one."""

from __future__ import annotations

from rhino_jax.errors import ProgramError
from rhino_jax.ir.printer import print_op
from rhino_jax.ir.program import Program

NEIGHBOURS = 5


def check(program: Program, after: str = "") -> Program:
    """``program`` itself, once every law of the IR is seen to hold.

    Values are defined before use and once; numbers are in range; nested Programs
    hold too. Raises :class:`ProgramError` that prints the ops around the fault.
    """
    defined = set(program.inputs)
    if len(defined) != len(program.inputs):
        _fail(program, 0, "an input is listed twice", after)
    for index, op in enumerate(program.ops):
        for value in op.operands:
            if not 0 <= value < len(program.values):
                _fail(program, index, f"operand %{value} does not exist", after)
            literal = program.values[value].literal is not None
            if value not in defined and not literal:
                _fail(program, index, f"operand %{value} is not defined yet", after)
        for value in op.results:
            if not 0 <= value < len(program.values):
                _fail(program, index, f"result %{value} does not exist", after)
            if value in defined:
                _fail(program, index, f"result %{value} is defined twice", after)
            defined.add(value)
        for inner in op.programs:
            check(inner, after)
        _check_boundary(program, index, after)
    for value in program.outputs:
        literal = program.values[value].literal is not None
        if value not in defined and not literal:
            _fail(program, len(program.ops), f"output %{value} is not defined", after)
    return program


def _check_boundary(program: Program, index: int, after: str) -> None:
    """Bodies of control flow take and give what the op does."""
    op = program.ops[index]
    if op.kind == "scan":
        (body,) = op.programs
        consts, carry = op.param["num_consts"], op.param["num_carry"]
        if len(body.inputs) != len(op.operands):
            _fail(program, index, "the body of a scan takes other inputs", after)
        ins = [body.values[v] for v in body.inputs[consts : consts + carry]]
        outs = [body.values[v] for v in body.outputs[:carry]]
        for a, b in zip(ins, outs, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                _fail(program, index, f"a carry changes from {a} to {b}", after)
    elif op.kind in ("remat2", "cond"):
        skip = 1 if op.kind == "cond" else 0
        for body in op.programs:
            given = program.shapes(op.operands[skip:])
            if body.shapes(body.inputs) != given:
                _fail(program, index, "a body takes other inputs", after)
            if body.shapes(body.outputs) != program.shapes(op.results):
                _fail(program, index, "a body gives other outputs", after)


def _fail(program: Program, index: int, what: str, after: str) -> None:
    lines = []
    low, high = max(0, index - NEIGHBOURS), index + NEIGHBOURS + 1
    for number in range(low, min(high, len(program.ops))):
        mark = ">" if number == index else " "
        lines.append(f"{mark} {print_op(program, program.ops[number])}")
    when = f" after {after}" if after else ""
    raise ProgramError(f"{program.name}{when}: {what}\n" + "\n".join(lines))
