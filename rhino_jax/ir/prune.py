"""A Program without what nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from rhino_jax.ir.program import WAITS, Op, Program


def pruned(program: Program) -> Program:
    """``program`` without ops that nothing depends on, in loops too.

    Inputs and outputs stay, and ops with effects; numbers of values are as before.

    >>> from rhino_jax.ir.program import Value
    >>> f = Value((2,), "float32")
    >>> ops = Op("exp", (0,), (1,)), Op("log", (0,), (2,))
    >>> len(pruned(Program((f, f, f), (0,), ops, (2,))).ops)
    1
    """
    return replace(program, ops=tuple(_live(program)[0]))


def _live(program: Program) -> tuple[list[Op], set[int]]:
    """The ops that are needed, and the values that they and the outputs read."""
    read = set(program.outputs)
    kept: list[Op] = []
    for op in reversed(program.ops):
        if not op.effects and read.isdisjoint(op.results):
            continue
        if op.programs:
            op = _INSIDE.get(op.kind, _whole)(op, read)
        read.update(op.operands)
        read.update(op.param.get(WAITS, ()))
        kept.append(op)
    return kept[::-1], read


def _whole(op: Op, read: Collection[int]) -> Op:
    return replace(op, programs=tuple(pruned(body) for body in op.programs))


def _scan(op: Op, read: Collection[int]) -> Op:
    """Stacks that nobody reads are not made; what is then not read is not handed in."""
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    keep = [i for i, v in enumerate(op.results) if i < carry or v in read]
    stays = range(consts, consts + carry)
    return _body(op, keep, stays)


def _call(op: Op, read: Collection[int]) -> Op:
    return _body(op, [i for i, v in enumerate(op.results) if v in read], ())


def _body(op: Op, keep: Sequence[int], stays: Collection[int]) -> Op:
    """``op`` with some of its results, and of its operands those that its body reads
    and those that ``stays`` says."""
    (body,) = op.programs
    outputs = tuple(body.outputs[i] for i in keep)
    ops, read = _live(replace(body, outputs=outputs))
    taken = [i for i, v in enumerate(body.inputs) if i in stays or v in read]
    inputs = tuple(body.inputs[i] for i in taken)
    params = op.params
    if "num_consts" in op.param:
        count = sum(i < op.param["num_consts"] for i in taken)
        params = tuple(sorted({**op.param, "num_consts": count}.items()))
    return replace(
        op,
        operands=tuple(op.operands[i] for i in taken),
        results=tuple(op.results[i] for i in keep),
        params=params,
        programs=(replace(body, ops=tuple(ops), inputs=inputs, outputs=outputs),),
    )


_INSIDE: Mapping[str, Callable[[Op, Collection[int]], Op]] = {
    "scan": _scan,
    "remat2": _call,
}
"""Ops whose results and operands may become fewer."""
