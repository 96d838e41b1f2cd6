"""What stands in memory when a compiled program needs most, read off its schedule.

Optimized HLO text is in the order in which it runs, so liveness over it says which
arrays stand side by side. A fusion or an all-reduce may write over an operand that it
reads last, if that is the whole result of the instruction before: not one of a pair (a
library's product beside its scratch memory), nor what a collective under way gave.
Other products do where the text says so (``output_to_operand_aliasing``). The total is
near the compiler's, to the byte on many GPU programs; theirs is the one to quote.
Layout tiles count: ``f32[256,1000]{1,0:T(8,128)}`` takes 1024 columns. No JAX here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rhino_jax.verify.hlo_text import (
    Computation,
    HloModule,
    Instruction,
    bits,
    elements,
    op_name,
    parse_module,
    source_line,
)

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=\s]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"\((\d+(?:,\d+)*)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{(\d*)\}")
_RECOMPUTED = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+\.remat[\w.]* = ", re.MULTILINE)
_WRITTEN_OVER = re.compile(r"output_to_operand_aliasing=\{\{0?\}: \((\d+), \{\}\)")
"""The operand that an instruction's (first) result is written over."""
_CALLS = ("calls", "to_apply", "body", "condition")
_VIEWS = frozenset(
    "bitcast get-tuple-element tuple optimization-barrier domain after-all".split()
)
_UPDATES = frozenset(("dynamic-update-slice", "scatter"))
_REDUCED_IN_PLACE = frozenset(("all-reduce", "all-reduce-start"))


@dataclass(frozen=True)
class Standing:
    """One array that stands at the peak.

    Attributes:
        name: the HLO instruction that makes it.
        shape: dtype and shape as HLO writes them, layout left out.
        num_bytes: with the padding of its layout.
        op: JAX's name of the op it comes from ("" where the compiler tells none).
        source: "file:line" ("" where the compiler tells none).
    """

    name: str
    shape: str
    num_bytes: int
    op: str
    source: str


@dataclass(frozen=True)
class Busiest:
    """The moment of a program at which most stands beside its arguments."""

    temp_bytes: int
    """By this reader's count."""
    during: str
    standing: tuple[Standing, ...]
    """Largest first; what a loop's body holds among them."""


def busiest(text: str, on_chip: frozenset[int] = frozenset()) -> Busiest:
    """The busiest moment of the entry computation of an HLO module.

    Args:
        on_chip: memory spaces that are no device memory (a TPU's: 1 is VMEM, ...).

    Raises:
        ValueError: the text is no HLO module.
    """
    module = parse_module(text)
    walk = _Walk(module, _types(module), on_chip)
    entry = module.computations[module.entry]
    moment = walk.run(entry, (), _donated(module.header))
    standing = sorted(moment.standing, key=lambda one: (-one.num_bytes, one.name))
    return Busiest(moment.num_bytes, moment.during, tuple(standing))


def recomputed(text: str) -> int:
    """Instructions that XLA's own rematerialization added to save memory.

    >>> recomputed("  %fusion.3.remat = f32[8]{0} fusion(%a), kind=kLoop")
    1
    """
    return len(_RECOMPUTED.findall(text))


def array_bytes(type_text: str, on_chip: frozenset[int] = frozenset()) -> list[int]:
    """Bytes in device memory of every array of a type, its layout's tiles filled.

    >>> array_bytes("(f32[256,1000]{1,0:T(8,128)}, bf16[3,5]{0,1:T(8,128)(2,1)})")
    [1048576, 2048]
    >>> array_bytes("f32[8]{0:T(1024)S(1)}", frozenset({1}))
    [0]
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_text):
        shape = [int(n) for n in re.findall(r"\d+", dims)]
        space = _SPACE.search(layout)
        if space and int(space.group(1)) in on_chip:
            found.append(0)
            continue
        order, _, tiling = layout.partition(":T")
        minor = [int(n) for n in re.findall(r"\d+", order)] if order else []
        physical = [shape[d] for d in reversed(minor)] if minor else shape
        if tiling and (tile := _TILE.match(tiling)):
            sides = [int(n) for n in tile.group(1).split(",")]
            physical = [1] * (len(sides) - len(physical)) + physical
            kept = len(physical) - len(sides)
            physical = physical[:kept] + [
                -(-size // side) * side
                for size, side in zip(physical[kept:], sides, strict=True)
            ]
        found.append(math.ceil(math.prod(physical) * bits(dtype) / 8))
    return found


def _donated(header: str) -> Mapping[int, int]:
    """Output position -> the parameter whose memory it takes."""
    place = header.find("input_output_alias={")
    found = _ALIAS.findall(header[place:]) if place >= 0 else []
    return {int(out or 0): int(parameter) for out, parameter, _ in found}


@dataclass
class _Moment:
    num_bytes: int = 0
    during: str = ""
    standing: tuple[Standing, ...] = ()


@dataclass
class _Buffer:
    num_bytes: int
    made_by: Instruction
    shape: str
    born: int
    dies: int


Leaves = tuple[int, ...]
_OUTSIDE = -1
"""The buffer of whatever was there before: arguments, a loop's carries."""


@dataclass
class _Live:
    """Liveness in one computation."""

    buffers: list[_Buffer] = field(default_factory=list)
    at: dict[str, Leaves] = field(default_factory=dict)
    inside: dict[int, _Moment] = field(default_factory=dict)


@dataclass(frozen=True)
class _Walk:
    module: HloModule
    types: Mapping[str, str]
    on_chip: frozenset[int]

    def run(
        self, inside: Computation, given: Leaves, donated: Mapping[int, int]
    ) -> _Moment:
        live = _Live()
        for index, one in enumerate(inside.instructions.values()):
            self.step(live, index, one)
        end = len(inside.instructions)
        for position, buffer in enumerate(live.at[inside.root]):
            if buffer != _OUTSIDE:
                made = live.buffers[buffer]
                made.dies = end
                if position in donated:  # written where the argument was
                    made.num_bytes = 0
        return self.peak(live, tuple(inside.instructions.values()))

    def step(self, live: _Live, index: int, one: Instruction) -> None:
        reads = [live.at[name] for name in one.operands if name in live.at]
        for leaves in [] if one.opcode in _VIEWS else reads:
            for buffer in leaves:
                if buffer != _OUTSIDE:
                    live.buffers[buffer].dies = index
        sizes = array_bytes(one.type_text, self.on_chip)
        if one.opcode in ("parameter", "constant"):
            live.at[one.name] = (_OUTSIDE,) * len(sizes)
        elif one.opcode in _VIEWS or one.opcode.endswith("-done"):
            live.at[one.name] = self.view(one, reads, len(sizes))
        elif one.opcode == "while":
            live.inside[index] = self.loop(one)
            live.at[one.name] = reads[0]
        else:
            if one.opcode in ("call", "conditional", "async-start"):
                moments = [self.called(name) for name in self.names(one)]
                live.inside[index] = max(
                    moments, key=lambda m: m.num_bytes, default=_Moment()
                )
            live.at[one.name] = self.make(live, index, one, reads, sizes)

    def view(self, one: Instruction, reads: list[Leaves], count: int) -> Leaves:
        if one.opcode == "tuple":
            return tuple(buffer for leaves in reads for buffer in leaves)
        if not reads:
            return (_OUTSIDE,) * count
        if one.opcode == "get-tuple-element":
            found = re.search(r"index=(\d+)", one.rest)
            assert found, one
            return reads[0][self.offset(one, int(found.group(1))) :][:count]
        return reads[0][-count:]  # a -done takes the last of (operands, results, ...)

    def offset(self, one: Instruction, index: int) -> int:
        """How many arrays stand before element ``index`` of the operand's tuple."""
        type_text = self.types[one.operands[0]]
        parts = elements(type_text)[:index]
        return sum(len(_ARRAY.findall(part)) for part in parts)

    def make(
        self,
        live: _Live,
        index: int,
        one: Instruction,
        reads: list[Leaves],
        sizes: list[int],
    ) -> Leaves:
        taken = self.taken_over(one)
        free = [
            buffer
            for leaves in reads
            for buffer in leaves
            if buffer != _OUTSIDE and live.buffers[buffer].dies == index
        ]
        shared = self.shared(live, one, reads)
        shapes = [
            f"{dtype}[{dims}]" for dtype, dims, _ in _ARRAY.findall(one.type_text)
        ]
        made = []
        for position, size in enumerate(sizes):
            if taken is not None and taken < len(reads) and position == 0:
                made.append(reads[taken][0])
                continue
            if one.opcode.endswith("-start") and position == 0 and reads:
                made.append(reads[0][0])  # its operand, handed on
                continue
            same = [b for b in free if live.buffers[b].num_bytes == size and size]
            same = [b for b in same if b in shared]
            if same:
                free.remove(same[0])
                live.buffers[same[0]].dies = index - 1
            live.buffers.append(_Buffer(size, one, shapes[position], index, index))
            made.append(len(live.buffers) - 1)
        return tuple(made)

    def shared(self, live: _Live, one: Instruction, reads: list[Leaves]) -> Leaves:
        """The buffers that a result may be written over, if they are read last."""
        if one.opcode in ("fusion", *_REDUCED_IN_PLACE):
            made = (b for leaves in reads for b in leaves if b != _OUTSIDE)
            return tuple(
                b for b in made if live.buffers[b].made_by.name in one.operands
            )
        told = _WRITTEN_OVER.search(one.rest)
        return reads[int(told.group(1))] if told else ()

    def taken_over(self, one: Instruction) -> int | None:
        """The operand that is changed in place, if one is."""
        if one.opcode in _UPDATES:
            return 0
        if one.opcode != "fusion":
            return None
        fused = self.module.computations[one.attribute("calls")]
        root = fused.instructions[fused.root]
        while root.opcode in ("bitcast", "convert", "copy") and root.operands:
            root = fused.instructions[root.operands[0]]
        if root.opcode not in _UPDATES:
            return None
        first = fused.instructions[root.operands[0]]
        while first.opcode in ("bitcast", "convert") and first.operands:
            first = fused.instructions[first.operands[0]]
        if first.opcode != "parameter":
            return None
        return int(first.operand_text)

    def loop(self, one: Instruction) -> _Moment:
        body = self.module.computations[one.attribute("body")]
        count = len(_ARRAY.findall(one.type_text))
        # What the body gives on is written where the carries are.
        return self.run(body, (), {position: 0 for position in range(count)})

    def called(self, name: str) -> _Moment:
        inside = self.module.computations[name]
        count = len(_ARRAY.findall(inside.instructions[inside.root].type_text))
        return self.run(inside, (), {position: 0 for position in range(count)})

    def names(self, one: Instruction) -> list[str]:
        found = [one.attribute(key) for key in _CALLS]
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        if branches:
            found += [name.strip().lstrip("%") for name in branches.group(1).split(",")]
        return [name for name in found if name in self.module.computations]

    def peak(self, live: _Live, order: tuple[Instruction, ...]) -> _Moment:
        change = [0] * (len(order) + 2)
        for buffer in live.buffers:
            if buffer.dies >= buffer.born:
                change[buffer.born] += buffer.num_bytes
                change[buffer.dies + 1] -= buffer.num_bytes
        held = spot = top = 0
        for index in range(len(order)):
            held += change[index]
            extra = live.inside[index].num_bytes if index in live.inside else 0
            if held + extra > top:
                top, spot = held + extra, index
        if not top:
            return _Moment()
        inner = live.inside.get(spot, _Moment())
        own = tuple(self.standing(live, spot))
        during = inner.during or order[spot].name
        return _Moment(top, during, (*own, *inner.standing))

    def standing(self, live: _Live, spot: int) -> Iterator[Standing]:
        for buffer in live.buffers:
            if buffer.born <= spot <= buffer.dies and buffer.num_bytes:
                one = buffer.made_by
                yield Standing(
                    one.name,
                    buffer.shape,
                    buffer.num_bytes,
                    op_name(one),
                    source_line(self.module, one),
                )


def _types(module: HloModule) -> Mapping[str, str]:
    return {
        one.name: one.type_text
        for inside in module.computations.values()
        for one in inside.instructions.values()
    }
