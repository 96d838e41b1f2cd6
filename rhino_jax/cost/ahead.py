"""What a TPU's compiler makes ready ahead of a loop over microbatches.

Where rows are looked up and only then converted to a narrower type, it converts the
whole table ahead of the loop, or the shard of it that every turn gathers. A batch of
which every turn converts its part is converted whole. And where the batch is among the
two dimensions that fill tiles (images, rows of a few features), the parts lie across
them: the whole is laid out anew, one part a row of each tile.

Read off programs compiled for v5e and v5p (libtpu 0.0.42). ``habits.tables_ahead``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rhino_jax.cost.instructions import (
    CONVERT,
    NARROW,
    OPAQUE,
    Buffer,
    Instruction,
    Unfolded,
)
from rhino_jax.cost.simplify import narrowed, narrowing
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TIME
from rhino_jax.ir.steps import SLICE, changed_dim

if TYPE_CHECKING:
    from rhino_jax.cost.buffers import Frame, Unfolding

ROW_BYTES = 4
"""Of a lane: elements that are narrower are stored in pairs or fours of rows."""
LAY_OUT = "lay_out"
COPIES = {CONVERT: "converted", LAY_OUT: "laid out anew"}
Given = list[tuple[int, Layout]]
"""What a turn reads of the outside: values and their layouts, as its first inputs."""


def tables_ahead(
    work: Unfolding, frame: Frame, body: Unfolded, used: Given, place: int
) -> tuple[Unfolded, list[int]]:
    """Narrow copies of what every turn looks rows up in, whole or yet to be gathered.

    And the body, which reads them.
    """
    given = dict(zip(body.inputs, used, strict=False))
    narrow: dict[int, float] = {}
    ahead = []
    for one in body.instructions:
        if one.kind not in ("gather", NARROW) or one.reads[0] not in given or one.step:
            continue
        (made,) = one.writes
        if body.buffers[made].item_bytes < body.buffers[one.reads[0]].item_bytes:
            narrow[one.reads[0]] = body.buffers[made].item_bytes
            ahead += [one] if one.kind == NARROW else []
    copies = []
    for table, item_bytes in narrow.items():
        value, layout = given[table]
        read = frame.versions[value][layout]
        converted = narrowed(replace(work.buffers[read], value=value), item_bytes)
        copies.append(_copy(work, frame, read, converted, CONVERT, place))
    left = tuple(x for x in body.instructions if x not in ahead)
    inputs = (*body.inputs, *(b for one in ahead for b in one.writes))
    return replace(body, instructions=left, inputs=inputs), copies


def batches_ahead(
    work: Unfolding, frame: Frame, body: Unfolded, used: Given, place: int
) -> tuple[Unfolded, list[int]]:
    """Copies of what every turn takes its part of: converted, laid out anew, or both.

    And the body, which takes its parts of the last copy of each.
    """
    given = dict(zip(body.inputs, used, strict=False))
    instructions = list(body.instructions)
    buffers, inputs, copies = list(body.buffers), list(body.inputs), list[int]()
    kept, gone = {*body.outputs, *body.pinned}, set[int]()
    for index, one in enumerate(body.instructions):
        if one.step is None or one.kind != SLICE or one.step.axes != (TIME,):
            continue
        if one.reads[0] not in given:
            continue
        value, layout = given[one.reads[0]]
        read = at_hand = frame.versions[value][layout]
        (part,) = one.writes
        converter = narrowing(body, part)
        if converter is not None and kept.isdisjoint(
            body.instructions[converter].writes
        ):
            gone.add(converter)
            (part,) = body.instructions[converter].writes
            converted = narrowed(work.buffers[read], buffers[part].item_bytes)
            at_hand = _copy(work, frame, read, converted, CONVERT, place)
            copies.append(at_hand)
        if _lies_across(work, frame, one, value, layout):
            pad = ROW_BYTES / min(ROW_BYTES, buffers[part].item_bytes)
            padded = round(pad * buffers[part].num_bytes)
            buffers[part] = replace(buffers[part], num_bytes=padded)
            held = work.buffers[at_hand]
            at_hand = _copy(work, frame, at_hand, held, LAY_OUT, place)
            copies.append(at_hand)
        if at_hand == read:
            continue
        buffers.append(work.buffers[at_hand])
        inputs.append(len(buffers) - 1)
        instructions[index] = replace(
            one, role=OPAQUE, reads=(inputs[-1],), writes=(part,)
        )
    left = tuple(x for index, x in enumerate(instructions) if index not in gone)
    return (
        replace(body, buffers=tuple(buffers), instructions=left, inputs=tuple(inputs)),
        copies,
    )


def _copy(
    work: Unfolding, frame: Frame, read: int, like: Buffer, kind: str, place: int
) -> int:
    """A buffer ``like`` another, made of ``read`` by a kernel of its own."""
    work.buffers.append(replace(like, name=f"{like.name}, {COPIES[kind]}"))
    made = len(work.buffers) - 1
    work.emit(Instruction(kind, OPAQUE, (read,), (made,), frame.program, place))
    return made


def _lies_across(
    work: Unfolding, frame: Frame, one: Instruction, value: int, layout: Layout
) -> bool:
    """Whether tiles are filled along the dimension that turns take their parts of."""
    assert one.step is not None
    whole = frame.program.values[value]
    shape = layout.local_shape(whole.shape, work.mesh)
    dim = changed_dim(one.step)
    apart = shape[:dim] + shape[dim + 1 :]
    held = work.buffers[frame.versions[value][layout]]
    size = work.habits.size(apart, held.item_bytes, True)
    return shape[dim] * size > held.num_bytes
