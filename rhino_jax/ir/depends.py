"""Which values depend on which: on the batch, on the parameters, on one input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rhino_jax.ir.program import Program


def forward(program: Program, start: Iterable[int]) -> frozenset[int]:
    """Every value that depends on one of ``start`` (itself included).

    An op with nested Programs is taken as one: each result depends on each operand.
    """
    reached = set(start)
    for op in program.ops:
        if not reached.isdisjoint(op.operands):
            reached.update(op.results)
    return frozenset(reached)


def backward(program: Program, end: Iterable[int]) -> frozenset[int]:
    """Every value that one of ``end`` depends on (itself included)."""
    needed = set(end)
    for op in reversed(program.ops):
        if not needed.isdisjoint(op.results):
            needed.update(op.operands)
    return frozenset(needed)


def parameters(program: Program, pairs: Mapping[int, int]) -> tuple[int, ...]:
    """State inputs that something other than the next state depends on.

    ``pairs`` maps input positions to the output positions that succeed them. The loss
    depends on the parameters but not on the optimizer's moments, which only meet
    their own successors and the next parameters.
    """
    state_outputs = set(pairs.values())
    others = [v for i, v in enumerate(program.outputs) if i not in state_outputs]
    needed = backward(program, others)
    return tuple(i for i in pairs if program.inputs[i] in needed)
