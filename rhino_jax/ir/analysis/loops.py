"""Loop pairs: a forward scan and the reverse scan that differentiation made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rhino_jax.ir.program import Op, Program


@dataclass(frozen=True)
class Saved:
    """A value that the forward loop stacks and the backward loop reads.

    ``result`` is the position among the forward scan's results, ``operands`` those
    among the backward scan's operands. ``num_bytes`` are those of the whole stack;
    ``of_batch`` says whether it depends on the batch: what does not (cast weights,
    masks) is kept once, not for every microbatch.
    """

    value: int
    result: int
    operands: tuple[int, ...]
    num_bytes: int
    of_batch: bool


@dataclass(frozen=True)
class LoopPair:
    """Two scans of equal ``length`` (the layer dimension) in opposite directions.

    ``forward`` and ``backward`` are op indices.
    """

    forward: int
    backward: int
    length: int
    saved: tuple[Saved, ...]

    @property
    def saved_bytes(self) -> int:
        return sum(saved.num_bytes for saved in self.saved)


def loop_pairs(program: Program, batch: frozenset[int]) -> tuple[LoopPair, ...]:
    """The loop pairs among the ops of ``program``, in the order of their forward scans.

    ``batch`` are the values that depend on the batch. Pairs inside bodies are found by
    calling this on the bodies.
    """
    return tuple(
        LoopPair(index, later, op.param["length"], saved)
        for index, op in enumerate(program.ops)
        if op.kind == "scan"
        for later in _readers(program, op)
        if later > index
        and program.ops[later].kind == "scan"
        and _mirrored(op, program.ops[later])
        and (saved := tuple(_saved(program, op, program.ops[later], batch)))
    )


def _readers(program: Program, op: Op) -> list[int]:
    stacked = op.results[op.param["num_carry"] :]
    return sorted({use for v in stacked for use in program.uses.get(v, ())})


def _mirrored(one: Op, other: Op) -> bool:
    return (
        one.param["length"] == other.param["length"]
        and one.param["reverse"] != other.param["reverse"]
    )


def _saved(
    program: Program, forward: Op, backward: Op, batch: frozenset[int]
) -> Iterator[Saved]:
    first = backward.param["num_consts"] + backward.param["num_carry"]
    for result in range(forward.param["num_carry"], len(forward.results)):
        value = forward.results[result]
        operands = tuple(
            i
            for i in range(first, len(backward.operands))
            if backward.operands[i] == value
        )
        if operands:
            num_bytes = program.values[value].num_bytes
            yield Saved(value, result, operands, num_bytes, value in batch)


def accumulators(program: Program, consts: int, carry: int) -> frozenset[int]:
    """Carries that the body only adds something to: they may stay partial."""
    found = set()
    for i in range(carry):
        value, out = program.inputs[consts + i], program.outputs[i]
        uses = program.uses.get(value, ())
        if len(uses) != 1 or program.outputs.count(out) != 1:
            continue
        op = program.ops[uses[0]]
        adds = op.kind in ("add", "add_any") and op.operands.count(value) == 1
        if adds and op.results == (out,) and out not in program.uses:
            found.add(i)
    return frozenset(found)


def kept(program: Program, consts: int, carry: int) -> frozenset[int]:
    """Carries that the body hands on as they are."""
    entering = program.inputs[consts : consts + carry]
    pairs = zip(entering, program.outputs[:carry], strict=True)
    return frozenset(i for i, (before, after) in enumerate(pairs) if before == after)


def passed(program: Program, consts: int, carry: int) -> tuple[int, ...]:
    """Carries that change from turn to turn, other than by a sum."""
    others = accumulators(program, consts, carry) | kept(program, consts, carry)
    return tuple(i for i in range(carry) if i not in others)
