"""Which results of a Program are inputs carried forward in place.

``w - 0.1 * g`` carries ``w`` forward; a prediction made from ``w`` by a matrix product
does not. What counts is a path from the input to the result on which every op keeps
elements apart: elementwise work, moves of elements, draws from a random key, and the
carries of loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rhino_jax.ir.program import Op, Program
from rhino_jax.rules import elementwise

Marks = list[int]
"""Per value, a bit set of the inputs that it carries forward."""

_COMPARED = frozenset("eq ne lt le gt ge is_finite".split())
_FIRST = frozenset(
    """
    reshape transpose squeeze expand_dims slice dynamic_slice split pad rev
    dynamic_update_slice scatter scatter-add scatter_add scatter-mul scatter_mul
    scatter-sub scatter_sub scatter-min scatter_min scatter-max scatter_max
    random_wrap random_unwrap random_split random_fold_in random_clone
    """.split()
)
"""Ops whose results carry their first operand forward, and no other."""


def carried(program: Program) -> tuple[int, ...]:
    """For each output, the inputs that it carries forward, as a bit set.

    >>> from rhino_jax.ir.program import Op, Program, Value
    >>> f = Value((2,), "float32")
    >>> [bin(m) for m in carried(
    ...     Program((f, f, f), (0, 1), (Op("sub", (0, 1), (2,)),), (2, 0)))]
    ['0b11', '0b1']
    """
    return tuple(_run(program, [1 << k for k in range(len(program.inputs))]))


def _run(program: Program, given: Sequence[int]) -> Marks:
    marks = dict(zip(program.inputs, given, strict=True))
    for op in program.ops:
        ins = [marks.get(value, 0) for value in op.operands]
        if any(ins):
            marks.update(zip(op.results, _op(program, op, ins), strict=True))
    return [marks.get(value, 0) for value in program.outputs]


def _op(program: Program, op: Op, ins: Marks) -> Marks:
    if op.kind in _CONTROL:
        return _CONTROL[op.kind](op, ins)
    if op.kind in _FIRST:
        return [ins[0]] * len(op.results)
    if op.kind == "concatenate":
        return [_union(ins)]
    if op.kind == "optimization_barrier":
        return ins
    if op.kind == "broadcast_in_dim":
        grows = (
            program.values[op.operands[0]].size != program.values[op.results[0]].size
        )
        return [0 if grows else ins[0]]
    if op.kind not in elementwise.RULES or op.kind in _COMPARED:
        return [0] * len(op.results)
    (result,) = program.result_values(op)
    start = 1 if op.kind == "select_n" else 0
    operands = zip(program.operand_values(op)[start:], ins[start:], strict=True)
    return [_union([m for v, m in operands if v.shape == result.shape])]


def _union(marks: Sequence[int]) -> int:
    found = 0
    for mark in marks:
        found |= mark
    return found


def _settled(carry: Marks, body: Callable[[Marks], Marks]) -> Marks:
    """The carry once going round the loop adds nothing to it."""
    while True:
        after = [a | b for a, b in zip(carry, body(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _scan(op: Op, ins: Marks) -> Marks:
    (body,) = op.programs
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    held, xs = ins[:consts], ins[consts + carry :]

    def once(carried: Marks) -> Marks:
        return _run(body, [*held, *carried, *xs])

    start = ins[consts : consts + carry]
    return once(_settled(start, lambda marks: once(marks)[:carry]))


def _while(op: Op, ins: Marks) -> Marks:
    first, consts = op.param["cond_nconsts"], op.param["body_nconsts"]
    held = ins[first : first + consts]
    body = op.programs[1]
    return _settled(ins[first + consts :], lambda marks: _run(body, [*held, *marks]))


def _cond(op: Op, ins: Marks) -> Marks:
    branches = [_run(body, ins[1:]) for body in op.programs]
    return [_union(marks) for marks in zip(*branches, strict=True)]


def _call(op: Op, ins: Marks) -> Marks:
    return _run(op.programs[0], ins)


_CONTROL: Mapping[str, Callable[[Op, Marks], Marks]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _call,
}
