"""What compilers rewrite before they place buffers.

**Scatters that are added.** ``x + scatter(y, at, updates)`` becomes
``scatter(x + y, at, updates)`` (XLA's algebraic simplifier): with zeros for ``y`` the
gradient of a cross entropy is the softmax, changed in place where the labels are, and
no array of zeros.

**Labels on a TPU.** A scatter of at most one element to each row (a gradient at the
labels) becomes ``where(iota == label, update, zeros)``, made as it is read.

**Look-ups on a TPU**, in a loop over microbatches, are kernels of their own: the rows
are written, narrow if they are only converted, and the table is not needed any more. A
table that is gathered from other devices for it is converted before.

**Gradients of max pooling.** GPUs have no select-and-scatter. XLA's expander finds the
place of every window's maximum, in 32-bit numbers, one for each dimension, beside the
maximum in float32, and scatters there, into zeros. What is pooled is written, and the
zeros with it (they are as large: one kernel makes both), so both stand from the forward
to the backward pass.

**Zeros that are scattered into and selected.** Equal arrays are one. On a GPU the zeros
that an optimizer selects (``where(sum > 0, rsqrt(sum), 0)`` of adagrad) are those that
the gradient of a look-up is scattered into. So they are written, once for all that are
alike, and a copy of them for each scatter. Their kernel reads nothing, and was seen to
run as the backward pass begins, in programs that move something between devices: on one
device it runs table by table.

**What a loop begins with.** Accumulators begin as zeros, which a GPU writes ahead of
the loop. Who else reads equal zeros (that same optimizer) reads such an array too: one
for all that are alike, beside the accumulators while the loop runs. So does what a loop
reads of a scalar that is spread out and not known (a masked zero behind a barrier).

**What is added to a product.** cuBLAS adds a whole matrix as it multiplies
(``beta = 1``): a mask or bias for all examples is written, and as equal computations
are one, it stands from the first layer that adds it to the last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from rhino_jax.cost.habits import Habits
from rhino_jax.cost.instructions import (
    ADDS,
    CONVERTS,
    FUSED,
    NARROW,
    OPAQUE,
    PLACES,
    PRODUCTS,
    ZEROS,
    Buffer,
    Instruction,
    Unfolded,
)
from rhino_jax.ir.program import itemsize
from rhino_jax.ir.steps import ALL_GATHER, MASK

WINDOW_GRADIENT = "select_and_scatter_add"


def simplified(unfolded: Unfolded, habits: Habits) -> Unfolded:
    """``unfolded`` as a compiler has it. Linear in its instructions."""
    if habits.selects:
        unfolded = _with_selections(unfolded)
    unfolded = _scattered_into(unfolded)
    if habits.adds_whole:
        unfolded = _with_addends(_with_fills(_with_zeros(unfolded)))
    return _with_places(unfolded) if habits.scatters_windows else unfolded


def _with_selections(unfolded: Unfolded) -> Unfolded:
    """Scatters to rows as selections; a shard that they begin with is written."""
    rows = {i for i, one in enumerate(unfolded.instructions) if _to_rows(one)}
    instructions = tuple(
        replace(one, kind="select_n", role=FUSED, overwrites=()) if i in rows else one
        for i, one in enumerate(unfolded.instructions)
    )
    starts = (unfolded.instructions[i].reads[0] for i in sorted(rows))
    makers = ((b, unfolded.writer[b]) for b in starts)
    moved = (b for b, at in makers if at >= 0 and unfolded.instructions[at].step)
    pinned = (*unfolded.pinned, *moved)
    return replace(unfolded, instructions=instructions, pinned=pinned)


def _to_rows(one: Instruction) -> bool:
    """Whether an instruction scatters at most one element to each row."""
    if not one.kind.startswith("scatter") or one.op is None or one.step is not None:
        return False
    into, _, updates = one.program.operand_values(one.op)[:3]
    _, _, mapped, batching, _ = (d for _, d in one.op.param["dimension_numbers"])
    rows = math.prod(into.shape[d] for d in batching)
    return bool(batching) and updates.size == rows and len(mapped) == 1


def _scattered_into(unfolded: Unfolded) -> Unfolded:
    instructions: list[tuple[Instruction, ...]] = [(x,) for x in unfolded.instructions]
    buffers = list(unfolded.buffers)
    kept = {*unfolded.outputs, *unfolded.pinned}
    for index, one in enumerate(unfolded.instructions):
        if one.kind != "scatter-add" or one.step is not None:
            continue
        (made,) = one.writes
        readers = unfolded.readers[made]
        if made in kept or len(readers) != 1:
            continue
        reader = unfolded.instructions[readers[0]]
        others = [b for b in reader.reads if b != made]
        if reader.kind not in ADDS or len(others) != 1:
            continue
        start, (total,) = others[0], reader.writes
        added: tuple[Instruction, ...] = ()
        if not _zeros(unfolded, one.reads[0]):
            if not unfolded.buffers[start].num_bytes:
                continue
            buffers.append(replace(unfolded.buffers[total]))
            both = start, one.reads[0]
            start = len(buffers) - 1
            added = (replace(reader, reads=both, writes=(start,)),)
        scatter = replace(
            one,
            reads=(start, *one.reads[1:]),
            role=OPAQUE,
            writes=reader.writes,
            overwrites=((start, total),),
        )
        instructions[index] = ()
        instructions[readers[0]] = (*added, scatter)
    flat = tuple(x for group in instructions for x in group)
    return replace(unfolded, buffers=tuple(buffers), instructions=flat)


def looked_up(unfolded: Unfolded) -> Unfolded:
    """Look-ups as kernels of their own, of tables that are gathered as narrow as rows.

    Rows that nothing reads but a conversion to a narrower type are looked up in it.
    """
    instructions: list[tuple[Instruction, ...]] = [(x,) for x in unfolded.instructions]
    buffers = list(unfolded.buffers)
    for index, one in enumerate(unfolded.instructions):
        if one.kind != "gather" or one.step is not None:
            continue
        instructions[index] = (replace(one, role=OPAQUE),)
        (rows,) = one.writes
        reader = narrowing(unfolded, rows)
        if reader is None:
            continue
        (made,) = unfolded.instructions[reader].writes
        item_bytes = buffers[made].item_bytes
        instructions[index] = (replace(one, role=OPAQUE, writes=(made,)),)
        instructions[reader] = ()
        way = list(_gathers(unfolded, one.reads[0]))
        if not way:
            continue
        first = unfolded.instructions[way[-1]]
        (shard,) = first.reads
        narrow = narrowed(buffers[shard], item_bytes)
        buffers.append(narrow)
        for at in way:
            (whole,) = unfolded.instructions[at].writes
            buffers[whole] = narrowed(buffers[whole], item_bytes)
        convert = replace(
            first,
            kind=NARROW,
            role=OPAQUE,
            op=None,
            step=None,
            overwrites=(),
            writes=(len(buffers) - 1,),
        )
        gather = replace(first, reads=convert.writes)
        instructions[way[-1]] = convert, gather
    flat = tuple(x for group in instructions for x in group)
    return replace(unfolded, buffers=tuple(buffers), instructions=flat)


def narrowing(unfolded: Unfolded, buffer: int) -> int | None:
    """The one instruction that reads a buffer, if it converts it to a narrower type."""
    reader = unfolded.only_reader(buffer)
    if reader is None or unfolded.instructions[reader].kind not in CONVERTS:
        return None
    (made,) = unfolded.instructions[reader].writes
    narrower = unfolded.buffers[made].item_bytes < unfolded.buffers[buffer].item_bytes
    kept = buffer in unfolded.pinned or buffer in unfolded.outputs
    return reader if narrower and not kept else None


def _gathers(unfolded: Unfolded, buffer: int) -> Iterator[int]:
    """The all-gathers that a look-up's table comes from, the last first."""
    at = unfolded.writer[buffer]
    while at >= 0 and unfolded.instructions[at].kind == ALL_GATHER:
        if len(unfolded.readers[buffer]) > 1 or buffer in unfolded.pinned:
            return
        yield at
        (buffer,) = unfolded.instructions[at].reads
        at = unfolded.writer[buffer]


def narrowed(buffer: Buffer, item_bytes: float) -> Buffer:
    """``buffer`` in a type of so many bytes an element."""
    size = round(buffer.num_bytes * item_bytes / buffer.item_bytes)
    return replace(buffer, num_bytes=size, item_bytes=item_bytes)


def _zeros(unfolded: Unfolded, buffer: int) -> bool:
    """Whether a buffer is a broadcast 0, masked or not."""
    at = unfolded.writer[buffer]
    while at >= 0 and unfolded.instructions[at].kind == MASK:
        at = unfolded.writer[unfolded.instructions[at].reads[0]]
    value = unfolded.instructions[at].constant if at >= 0 else None
    return value is not None and not value


def _with_zeros(unfolded: Unfolded) -> Unfolded:
    """Zeros that are selected and scattered into: early, with a copy each."""
    if not any(one.step and one.step.wire_bytes for one in unfolded.instructions):
        return unfolded
    scatters = {
        one.reads[0]: index
        for index, one in enumerate(unfolded.instructions)
        if one.kind == "scatter-add" and _filled(unfolded, one.reads[0])
    }
    selected: dict[tuple[object, ...], list[int]] = {}
    for one in unfolded.instructions if scatters else ():
        for buffer in one.reads if one.kind == "select_n" else ():
            if _filled(unfolded, buffer):
                selected.setdefault(_alike(unfolded, buffer), []).append(buffer)
    shared = {b: i for b, i in scatters.items() if _alike(unfolded, b) in selected}
    if not shared:
        return unfolded
    early: dict[int, int] = {}  # instruction -> what it writes
    stands_for: dict[int, int] = {}
    for buffer in shared:
        zeros, *others = selected[_alike(unfolded, buffer)]
        stands_for.update(dict.fromkeys(others, zeros))
        early |= {unfolded.writer[b]: b for b in (zeros, buffer)}
    first = min(_backward_from(unfolded), *shared.values(), *early)
    instructions: list[Instruction] = []
    for index, one in enumerate(unfolded.instructions):
        if index == first:
            instructions += [
                replace(unfolded.instructions[i], index=one.index, reads=())
                for i in early
            ]
        if index not in early:
            reads = (stands_for.get(b, b) for b in one.reads)
            instructions.append(replace(one, reads=tuple(dict.fromkeys(reads))))
    pinned = (*unfolded.pinned, *early.values())
    return replace(unfolded, instructions=tuple(instructions), pinned=pinned)


def _backward_from(unfolded: Unfolded) -> int:
    """The first product that reads what an earlier one did: a saved activation."""
    read: set[int] = set()
    for index, one in enumerate(unfolded.instructions):
        if one.kind in PRODUCTS:
            if read.intersection(one.reads):
                return index
            read.update(one.reads)
    return len(unfolded.instructions)


def _filled(unfolded: Unfolded, buffer: int) -> bool:
    """Whether it is a broadcast 0, converted before or not, with nothing done to it."""
    at = unfolded.writer[buffer]
    one = unfolded.instructions[at] if at >= 0 else None
    if one is None or one.kind != "broadcast_in_dim" or not one.op or one.step:
        return False
    value = one.constant
    made = unfolded.writer[one.reads[0]] if one.reads else -1
    scalar = unfolded.instructions[made] if made >= 0 else None
    if value is None and scalar and scalar.op and scalar.kind in CONVERTS:
        value = scalar.program.values[scalar.op.operands[0]].literal
    return value is not None and not value


def _alike(unfolded: Unfolded, buffer: int) -> tuple[object, ...]:
    held = unfolded.buffers[buffer]
    value = unfolded.instructions[unfolded.writer[buffer]].program.values[held.value]
    return value.shape, held.item_bytes, held.num_bytes


def _with_fills(unfolded: Unfolded) -> Unfolded:
    """One array for all that read alike zeros, or unknown scalars, of a loop's."""
    first: dict[object, int] = {}  # what is filled -> the loop that has it
    begun: set[int] = set()
    for index, one in enumerate(unfolded.instructions):
        if one.bodies:
            starts = {before for before, _ in one.overwrites}
            begun |= starts
            for buffer in one.reads:
                zero, fill = _is_start(unfolded, buffer), _fill(unfolded, buffer)
                if buffer in starts and zero:
                    fill = _alike(unfolded, buffer)
                elif buffer in starts or _filled(unfolded, buffer):
                    continue  # zeros that a loop reads are made inside
                if fill is not None:
                    first.setdefault(fill, index)
    ahead: dict[int, list[int]] = {}  # loop -> the fills written ahead of it
    stands_for: dict[int, int] = {}
    alike: dict[object, int] = {}
    for one in unfolded.instructions if first else ():
        for buffer in one.writes if one.kind == "broadcast_in_dim" else ():
            fill = _fill(unfolded, buffer)
            if fill not in first or buffer in begun or not unfolded.readers[buffer]:
                continue
            stands_for[buffer] = alike.setdefault(fill, buffer)
            if stands_for[buffer] == buffer:
                ahead.setdefault(first[fill], []).append(buffer)
    if not stands_for:
        return unfolded
    gone = {unfolded.writer[b] for b in stands_for}
    instructions: list[Instruction] = []
    for index, one in enumerate(unfolded.instructions):
        for buffer in ahead.get(index, ()):
            fill_it = unfolded.instructions[unfolded.writer[buffer]]
            instructions.append(replace(fill_it, reads=()))
        if index not in gone:
            reads = (stands_for.get(b, b) for b in one.reads)
            instructions.append(replace(one, reads=tuple(dict.fromkeys(reads))))
    pinned = (*unfolded.pinned, *alike.values())
    return replace(unfolded, instructions=tuple(instructions), pinned=pinned)


def _fill(unfolded: Unfolded, buffer: int) -> object:
    """What a buffer is filled with, equal for equal ones: zeros, or what is not known.

    None for all else.
    """
    at = unfolded.writer[buffer]
    one = unfolded.instructions[at] if at >= 0 else None
    if _filled(unfolded, buffer):
        return _alike(unfolded, buffer)
    if one is None or one.op is None or one.kind != "broadcast_in_dim" or one.step:
        return None
    literal = one.program.values[one.op.operands[0]].literal
    made = unfolded.writer[one.reads[0]] if one.reads else -1
    if literal is None or made < 0:
        return None
    return literal, unfolded.instructions[made].step, *_alike(unfolded, buffer)


def _is_start(unfolded: Unfolded, buffer: int) -> bool:
    """Whether a loop's carry begins as zeros: the program's, or an accumulator's."""
    at = unfolded.writer[buffer]
    return _filled(unfolded, buffer) or (
        at >= 0 and unfolded.instructions[at].kind == ZEROS
    )


def _with_addends(unfolded: Unfolded) -> Unfolded:
    first: dict[object, int] = {}
    stands_for: dict[int, int] = {}
    for index, one in enumerate(unfolded.instructions):
        for addend in _addends(unfolded, index) if one.kind in ADDS else ():
            computed = _computed(unfolded, addend)
            stands_for[addend] = first.setdefault(computed, addend)
    if not stands_for:
        return unfolded
    instructions = tuple(
        replace(x, reads=tuple(dict.fromkeys(stands_for.get(b, b) for b in x.reads)))
        for x in unfolded.instructions
    )
    pinned = (*unfolded.pinned, *first.values())
    return replace(unfolded, instructions=instructions, pinned=pinned)


def _addends(unfolded: Unfolded, index: int) -> Iterator[int]:
    """What an addition computes to add to a product that nothing else reads."""
    reads = unfolded.instructions[index].reads
    for product, other in itertools.permutations(reads, 2):
        at, beside = unfolded.writer[product], unfolded.writer[other]
        if (
            min(at, beside) >= 0
            and unfolded.instructions[at].kind == "dot_general"
            and unfolded.readers[product] == (index,)
            and unfolded.instructions[beside].role == FUSED
            and unfolded.readers[other] == (index,)
            and unfolded.buffers[product].num_bytes == unfolded.buffers[other].num_bytes
        ):
            yield other


def _computed(unfolded: Unfolded, buffer: int, depth: int = 8) -> object:
    """What a buffer holds, as a value that is equal for equal computations."""
    at = unfolded.writer[buffer]
    one = unfolded.instructions[at] if at >= 0 else None
    if one is None:
        held = unfolded.buffers[buffer]
        return buffer if held.num_bytes else held.name
    if one.role != FUSED or one.op is None or one.step is not None or not depth:
        return buffer
    reads = tuple(_computed(unfolded, b, depth - 1) for b in one.reads)
    return one.kind, one.writes.index(buffer), str(one.op.params), reads


def _with_places(unfolded: Unfolded) -> Unfolded:
    gradients = [
        (i, x) for i, x in enumerate(unfolded.instructions) if x.kind == WINDOW_GRADIENT
    ]
    if not gradients:
        return unfolded
    buffers, pinned = list(unfolded.buffers), list(unfolded.pinned)
    instructions: list[list[Instruction]] = [[x] for x in unfolded.instructions]
    for index, one in gradients:
        assert one.op is not None
        source, pooled = one.reads
        value = one.program.values[one.op.operands[0]]
        count = buffers[source].num_bytes / itemsize(value.dtype)
        size = round(4 * count * (1 + len(value.shape)))
        places, zeros, (made,) = len(buffers), len(buffers) + 1, one.writes
        buffers.append(Buffer(buffers[source].value, size, f"places of {value}"))
        buffers.append(replace(buffers[made], name=f"zeros of {value}"))
        pinned += [pooled, zeros]
        find = replace(
            one,
            kind=PLACES,
            reads=(pooled,),
            writes=(places,),
            rule=None,
            extended_bytes=0,
        )
        scatter = replace(
            one, reads=(source, places, zeros), overwrites=((zeros, made),)
        )
        instructions[index] = [replace(find, op=None), scatter]
        first = max(0, unfolded.writer[pooled])
        start = replace(find, kind=ZEROS, reads=(), writes=(zeros,), op=None)
        at = unfolded.instructions[first].index
        instructions[first].append(replace(start, index=at))
    flat = tuple(x for group in instructions for x in group)
    return replace(
        unfolded, buffers=tuple(buffers), instructions=flat, pinned=tuple(pinned)
    )
