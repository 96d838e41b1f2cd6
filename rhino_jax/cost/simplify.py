"""What compilers rewrite before they place buffers.

**Scatters into zeros that are added.** ``x + scatter(0, at, updates)`` becomes
``scatter(x, at, updates)`` (XLA's algebraic simplifier): the gradient of a cross
entropy is the softmax, changed in place where the labels are, and no array of zeros.

**Gradients of max pooling.** GPUs have no select-and-scatter. XLA's expander finds the
place of every window's maximum, in 32-bit numbers, one for each dimension, beside the
maximum in float32, and scatters there, into zeros that it makes as early. It does so
where the pooling itself runs, so all of them stand from the forward to the backward
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rhino_jax.cost.habits import Habits
from rhino_jax.cost.instructions import (
    ADDS,
    OPAQUE,
    PLACES,
    Buffer,
    Instruction,
    Unfolded,
)
from rhino_jax.ir.program import itemsize

WINDOW_GRADIENT = "select_and_scatter_add"


def simplified(unfolded: Unfolded, habits: Habits) -> Unfolded:
    """``unfolded`` as a compiler has it. Linear in its instructions."""
    unfolded = replace(unfolded, instructions=_scattered_into(unfolded))
    return _with_places(unfolded) if habits.scatters_windows else unfolded


def _scattered_into(unfolded: Unfolded) -> tuple[Instruction, ...]:
    instructions = list(unfolded.instructions)
    kept = {*unfolded.outputs, *unfolded.pinned}
    gone: set[int] = set()
    for index, one in enumerate(instructions):
        if one.kind != "scatter-add" or one.step is not None:
            continue
        (made,) = one.writes
        readers = unfolded.readers[made]
        if made in kept or len(readers) != 1 or not _zeros(unfolded, one.reads[0]):
            continue
        reader = instructions[readers[0]]
        others = [b for b in reader.reads if b != made]
        if reader.kind not in ADDS or len(others) != 1:
            continue
        (start,), (total,) = others, reader.writes
        gone.add(index)
        instructions[readers[0]] = replace(
            one,
            reads=(start, *one.reads[1:]),
            role=OPAQUE,
            writes=reader.writes,
            overwrites=((start, total),),
        )
    if not gone:
        return unfolded.instructions
    return tuple(x for i, x in enumerate(instructions) if i not in gone)


def _zeros(unfolded: Unfolded, buffer: int) -> bool:
    """Whether a buffer is a broadcast 0."""
    at = unfolded.writer[buffer]
    if at < 0 or unfolded.instructions[at].op is None:
        return False
    one = unfolded.instructions[at]
    if one.kind != "broadcast_in_dim" or one.step is not None:
        return False
    assert one.op is not None
    literal = one.program.values[one.op.operands[0]].literal
    return literal is not None and not literal


def _with_places(unfolded: Unfolded) -> Unfolded:
    gradients = [
        (i, x) for i, x in enumerate(unfolded.instructions) if x.kind == WINDOW_GRADIENT
    ]
    if not gradients:
        return unfolded
    buffers = list(unfolded.buffers)
    instructions: list[list[Instruction]] = [[x] for x in unfolded.instructions]
    for index, one in gradients:
        assert one.op is not None
        source, pooled = one.reads
        value = one.program.values[one.op.operands[0]]
        count = buffers[source].num_bytes / itemsize(value.dtype)
        size = round(4 * count * (1 + len(value.shape)))
        buffers.append(Buffer(buffers[source].value, size, f"places of {value}"))
        places, (made,) = len(buffers) - 1, one.writes
        buffers.append(replace(buffers[made], name=f"zeros of {value}"))
        first = _pooling(unfolded.instructions[:index], pooled, index)
        instructions[index] = [
            replace(
                one,
                reads=(source, places, places + 1),
                overwrites=((places + 1, made),),
            )
        ]
        find = replace(
            one,
            kind=PLACES,
            reads=(pooled,),
            writes=(places, places + 1),
            op=None,
            rule=None,
        )
        at = unfolded.instructions[first].index
        instructions[first].insert(0, replace(find, index=at))
    flat = tuple(x for group in instructions for x in group)
    return replace(unfolded, buffers=tuple(buffers), instructions=flat)


def _pooling(before: Sequence[Instruction], pooled: int, otherwise: int) -> int:
    """The first instruction that pools a buffer."""
    for index, one in enumerate(before):
        if one.kind.startswith("reduce_window") and pooled in one.reads:
            return index
    return otherwise
