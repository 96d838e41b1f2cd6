"""Is this a Program? Run after every pass that makes or changes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from rhino_jax.errors import ProgramError
from rhino_jax.ir.printer import print_op
from rhino_jax.ir.program import Op, Program, Value

NEIGHBOURS = 5


def check(program: Program, after: str = "") -> Program:
    """``program`` itself, once every law of the IR is seen to hold.

    Values are defined before use and once, literals by nobody; numbers are in range;
    bodies take and give what their op does, and hold too. Raises
    :class:`ProgramError` that prints the ops around the fault.
    """
    for index, what in _faults(program, after):
        _fail(program, index, what, after)
    return program


def _faults(program: Program, after: str) -> Iterator[tuple[int, str]]:
    """What breaks a law, by the op where it shows."""
    defined = set(program.inputs)
    if len(defined) != len(program.inputs):
        yield 0, "an input is listed twice"
    for value in program.inputs:
        if not _exists(program, value):
            yield 0, f"input %{value} does not exist"
        if _is_literal(program, value):
            yield 0, f"input %{value} is a literal"
    for index, op in enumerate(program.ops):
        yield from ((index, w) for w in _unread(program, op.operands, defined))
        for value in op.results:
            if not _exists(program, value):
                yield index, f"result %{value} does not exist"
            if _is_literal(program, value):
                yield index, f"result %{value} is a literal"
            if value in defined:
                yield index, f"result %{value} is defined twice"
            defined.add(value)
        for inner in op.programs:
            check(inner, after)
        if op.kind in _BOUNDARY:
            yield from ((index, what) for what in _BOUNDARY[op.kind](program, op))
    for what in _unread(program, program.outputs, defined, "output"):
        yield len(program.ops), what


def _unread(
    program: Program, values: Sequence[int], defined: set[int], role: str = "operand"
) -> Iterator[str]:
    for value in values:
        if not _exists(program, value):
            yield f"{role} %{value} does not exist"
        elif value not in defined and not _is_literal(program, value):
            yield f"{role} %{value} is not defined{' yet' * (role == 'operand')}"


def _exists(program: Program, value: int) -> bool:
    return 0 <= value < len(program.values)


def _is_literal(program: Program, value: int) -> bool:
    return _exists(program, value) and program.values[value].literal is not None


Types = list[tuple[tuple[int, ...], str]]


def _types(program: Program, values: Sequence[int]) -> Types:
    held = [program.values[v] for v in values]
    return [(v.shape, v.dtype) for v in held]


def _stacked(types: Types, length: int) -> Types:
    return [((length, *shape), dtype) for shape, dtype in types]


def _scan(program: Program, op: Op) -> Iterator[str]:
    (body,) = op.programs
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    takes, gives = _types(body, body.inputs), _types(body, body.outputs)
    length = op.param["length"]
    kept, whole = takes[consts : consts + carry], consts + carry
    yield from _carry(kept, gives[:carry])
    if takes[:whole] + _stacked(takes[whole:], length) != _types(program, op.operands):
        yield "the body of a scan takes other inputs"
    if gives[:carry] + _stacked(gives[carry:], length) != _types(program, op.results):
        yield "the body of a scan gives other outputs"


def _while(program: Program, op: Op) -> Iterator[str]:
    test, body = op.programs
    split, consts = op.param["cond_nconsts"], op.param["body_nconsts"]
    given = _types(program, op.operands)
    carry = given[split + consts :]
    if _types(test, test.inputs) != given[:split] + carry:
        yield "the condition of a while takes other inputs"
    if _types(test, test.outputs) != [((), "bool")]:
        yield "the condition of a while is not one bool"
    if _types(body, body.inputs) != given[split : split + consts] + carry:
        yield "the body of a while takes other inputs"
    yield from _carry(carry, _types(body, body.outputs))
    if _types(program, op.results) != carry:
        yield "a while gives other outputs"


def _carry(before: Types, after: Types) -> Iterator[str]:
    if len(before) != len(after):
        yield f"{len(before)} carries go in, {len(after)} come out"
    for a, b in zip(before, after, strict=False):
        if a != b:
            yield f"a carry changes from {Value(*a)} to {Value(*b)}"


def _call(program: Program, op: Op) -> Iterator[str]:
    given = op.operands[1 if op.kind == "cond" else 0 :]
    for body in op.programs:
        if _types(body, body.inputs) != _types(program, given):
            yield "a body takes other inputs"
        if _types(body, body.outputs) != _types(program, op.results):
            yield "a body gives other outputs"


_BOUNDARY: Mapping[str, Callable[[Program, Op], Iterator[str]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _call,
    "remat2": _call,
}


def _fail(program: Program, index: int, what: str, after: str) -> None:
    every = [v for op in program.ops for v in (*op.operands, *op.results)]
    missing = max(every, default=-1) + 1 - len(program.values)
    shown = replace(program, values=program.values + (Value((), "?"),) * missing)
    lines = []
    low, high = max(0, index - NEIGHBOURS), index + NEIGHBOURS + 1
    for number in range(low, min(high, len(program.ops))):
        mark = ">" if number == index else " "
        lines.append(f"{mark} {print_op(shown, program.ops[number])}")
    when = f" after {after}" if after else ""
    raise ProgramError(f"{program.name}{when}: {what}\n" + "\n".join(lines))
