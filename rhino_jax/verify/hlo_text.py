"""HLO text as data: computations, instructions, types, device groups, source lines.

The text is what ``compiled.as_text()`` prints. Only what the readers of collectives
and of loops need is taken apart; everything else stays text.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Groups = tuple[tuple[int, ...], ...]

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_BRACKET = re.compile(r'[()"]')
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_LEAF = re.compile(r"\b([a-z]\w*)\[([\d,<=\s]*)\]")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}


@dataclass(frozen=True)
class Leaf:
    """One array of a type: element type, shape and bytes (layout padding left out)."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; ``rest`` holds its attributes as text."""

    name: str
    type_text: str
    opcode: str
    operand_text: str
    rest: str

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands, in order."""
        return tuple(_OPERAND.findall(self.operand_text))

    def attribute(self, key: str) -> str:
        """The text of a simple attribute such as ``calls=%name``; "" where absent."""
        found = re.search(rf"(?:^|[ ,]){key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Computation:
    """The instructions of one computation by name, in order, and its root's name."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


@dataclass(frozen=True)
class HloModule:
    """A parsed module: its header line, computations, entry and source lines."""

    header: str
    computations: Mapping[str, Computation]
    entry: str
    frames: Mapping[int, str]

    def count(self, key: str) -> int:
        """``num_partitions`` or ``replica_count`` of the header (1 where absent)."""
        found = re.search(rf"\b{key}=(\d+)", self.header)
        return int(found.group(1)) if found else 1


def parse_module(text: str) -> HloModule:
    """Read a whole module.

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    lines = text.splitlines()
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    body: dict[str, Instruction] = {}
    for line in lines:
        if name and line.startswith("}"):
            computations[name] = Computation(name, body, root)
            name, body, root = "", {}, ""
        elif name:
            instruction = parse_instruction(line)
            if instruction is not None:
                body[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    root = instruction.name
        elif line.endswith("{") and (found := _COMPUTATION.match(line)):
            name = found.group(2)
            if found.group(1):
                entry = name
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    header = next((line for line in lines if line.startswith("HloModule")), "")
    return HloModule(header, computations, entry, _frames(lines))


def parse_instruction(line: str) -> Instruction | None:
    """One instruction line, or None for a line that is none.

    >>> one = parse_instruction("  ROOT %y.1 = f32[4]{0} add(%a, %b), metadata={}")
    >>> one.opcode, one.operands
    ('add', ('a', 'b'))
    """
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    start = found.end()
    if line[start] == "(":
        stop = _closing(line, start)
    else:
        stop = line.find(" ", start)
    opcode = _OPCODE.match(line, stop)
    if stop < 0 or not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    return Instruction(
        found.group(2),
        line[start:stop],
        opcode.group(1),
        line[opcode.end() : close - 1],
        line[close:],
    )


def _closing(line: str, start: int) -> int:
    """One past the parenthesis that closes the one at ``start``; quotes skipped."""
    depth, quoted = 0, False
    for found in _BRACKET.finditer(line, start):
        mark = found.group()
        if mark == '"':
            quoted = quoted != (line[found.start() - 1] != "\\")
        elif not quoted:
            depth += 1 if mark == "(" else -1
            if depth == 0:
                return found.end()
    return len(line)


def leaves(type_text: str) -> tuple[Leaf, ...]:
    """Every array in a type, tuples flattened.

    >>> [leaf.size_bytes for leaf in leaves("(f32[2,3]{1,0}, /*index=1*/bf16[])")]
    [24, 2]
    """
    return tuple(
        Leaf(dtype, shape, math.ceil(math.prod(shape) * bits(dtype) / 8))
        for dtype, shape in _shapes(type_text)
    )


def _shapes(type_text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for dtype, dims in _LEAF.findall(type_text):
        yield dtype, tuple(int(n) for n in re.findall(r"\d+", dims))


@functools.cache
def bits(dtype: str) -> int:
    """Of one element; 0 for what holds none (tokens)."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 0


def elements(type_text: str) -> tuple[str, ...]:
    """The elements of a tuple type, or the type itself.

    >>> elements("((f32[2], f32[3]), f32[4]{0:T(8,128)})")
    ('(f32[2], f32[3])', 'f32[4]{0:T(8,128)}')
    """
    if not type_text.startswith("("):
        return (type_text,)
    parts, depth, start = [], 0, 1
    for place, mark in enumerate(type_text):
        depth += (mark in "([{") - (mark in ")]}")
        if (mark == "," and depth == 1) or depth == 0:
            parts.append(type_text[start:place].strip())
            start = place + 1
    return tuple(part for part in parts if part)


# ---- which devices talk to each other ------------------------------------------


def replica_groups(rest: str, everyone: int) -> Groups:
    """The device groups of a collective's attributes, in all three spellings.

    ``{{0,1},{2,3}}``; ``[2,2]<=[4]``, with ``T(1,0)`` after a reshaped and transposed
    count; ``mesh['a'=2,'b'=2] {'b'}``, with sub-axes ``'a':(1)2`` (the part of that
    size after that many) and ``device_ids``. Empty or absent means everyone.

    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4)
    ((0, 2), (1, 3))
    """
    place = rest.find("replica_groups=")
    spelled = rest[place + len("replica_groups=") :] if place >= 0 else "{}"
    if found := _IOTA.match(spelled):
        return _iota_groups(found.group())
    if found := _MESH.match(spelled):
        return _mesh_groups(*found.groups())
    explicit = _braced(spelled)
    return explicit or (tuple(range(everyone)),)


def source_target_pairs(rest: str) -> Groups:
    """The (from, to) pairs of a permute, or of a send that stands for one."""
    found = re.search(r"source_target_pairs=\"?(?=\{)", rest)
    return _braced(rest[found.end() :]) if found else ()


def slice_groups(rest: str, slice_size: int) -> Groups:
    """The device groups of a transfer between TPU slices, or its (from, to) pairs.

    Device ids are 100000 * slice + place, slices from 1; here a device is counted
    through all slices of ``slice_size`` devices, slices outermost.

    >>> slice_groups('_xla_megascale_target="{1,2}x{0:1}"', 2)
    ((0, 2), (1, 3))
    >>> slice_groups("_xla_megascale_target={{100000->200000}}", 2)
    ((0, 2),)
    """
    spelled = rest.partition("_xla_megascale_target=")[2]
    if found := re.match(r'"\{([\d,]+)\}x\{(\d+):(\d+)\}"', spelled):
        places = range(int(found.group(2)), int(found.group(3)) + 1)
        return tuple(
            tuple((part - 1) * slice_size + place for part in _numbers(found.group(1)))
            for place in places
        )
    return tuple(
        tuple((n // 100000 - 1) * slice_size + n % 100000 for n in group)
        for group in _braced(spelled.replace("->", ","))
    )


_IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"@?mesh[\[<](.*?)[\]>](?:,\s*device_ids=\(?((?:\[[\d,]+\](?:T\([\d,]+\))?)|[\d,]+)"
    r"\)?)?\s*\{(.*?)\}"
)
_BRACED = re.compile(r"\{\s*((?:\{[\d,\s]*\}\s*,?\s*)*)\}")
_SUB_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _braced(spelled: str) -> Groups:
    found = _BRACED.match(spelled)
    return _explicit_groups(found.group(1)) if found else ()


# The same few groups stand at hundreds of instructions and may list thousands of
# devices, so each spelling is expanded once.
@functools.lru_cache(256)
def _explicit_groups(spelled: str) -> Groups:
    groups = re.findall(r"\{([\d,\s]*)\}", spelled)
    return tuple(tuple(_numbers(group)) for group in groups)


@functools.lru_cache(256)
def _iota_groups(spelled: str) -> Groups:
    found = _IOTA.match(spelled)
    assert found
    rows, columns = int(found.group(1)), int(found.group(2))
    ids = _iota(found.group(3), found.group(4))
    assert len(ids) == rows * columns, spelled[:80]
    return tuple(tuple(ids[row * columns : (row + 1) * columns]) for row in range(rows))


def _iota(dims_text: str, order_text: str | None) -> list[int]:
    """0..n-1 shaped, transposed and read row by row."""
    dims = _numbers(dims_text)
    order = _numbers(order_text) if order_text else list(range(len(dims)))
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    return [
        sum(place * strides[axis] for place, axis in zip(places, order, strict=True))
        for places in itertools.product(*(range(dims[axis]) for axis in order))
    ]


@functools.lru_cache(256)
def _mesh_groups(axes_text: str, ids_text: str | None, within_text: str) -> Groups:
    """Groups that vary over some axes, or parts of axes, of a mesh in row-major order.

    Each axis is cut into (before, part, after) at its named parts, so that every group
    is a product of whole factors.
    """
    axes = {
        name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes_text)
    }
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in axes}
    wanted: list[tuple[str, int]] = []
    for name, before, size in _SUB_AXIS.findall(within_text):
        start = int(before) if before else 1
        parts[name].append((start, int(size) if size else axes[name]))
        wanted.append((name, start))
    factors: list[tuple[tuple[str, int], int]] = []
    for name, size in axes.items():
        factors += [((name, start), count) for start, count in _cut(size, parts[name])]
    sizes = [count for _, count in factors]
    inside = [[key for key, _ in factors].index(key) for key in wanted]
    outside = [place for place in range(len(sizes)) if place not in inside]
    ids = _mesh_ids(ids_text, math.prod(sizes))
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]

    def offsets(places: Sequence[int]) -> list[int]:
        return [
            sum(n * strides[place] for n, place in zip(picked, places, strict=True))
            for picked in itertools.product(*(range(sizes[place]) for place in places))
        ]

    return tuple(
        tuple(ids[base + step] for step in offsets(inside)) for base in offsets(outside)
    )


def _cut(size: int, parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """An axis as factors (how many before it, its size), the named parts among them.

    >>> _cut(12, [(2, 3)])
    [(1, 2), (2, 3), (6, 2)]
    """
    factors, done = [], 1
    for start, count in sorted(parts):
        if start > done:
            factors.append((done, start // done))
        factors.append((start, count))
        done = start * count
    if done < size or not factors:
        factors.append((done, size // done))
    return factors


def _mesh_ids(ids_text: str | None, count: int) -> list[int]:
    if not ids_text:
        return list(range(count))
    if not ids_text.startswith("["):
        return _numbers(ids_text)
    dims, _, order = ids_text.partition("T")
    return _iota(dims, order or None)


# ---- where it comes from ---------------------------------------------------------


def _frames(lines: Sequence[str]) -> dict[int, str]:
    """Stack frame id to "file:line", from the tables at the head of the module."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in lines:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif found := re.match(r"^(\d+) (.*)$", line):
            table[int(found.group(1))] = found.group(2)
        elif line.startswith(("%", "ENTRY")):
            break
    files = {key: name.strip('"') for key, name in tables.get("FileNames", {}).items()}
    places = {
        key: f"{files.get(_field(text, 'file_name_id'), '?')}:{_field(text, 'line')}"
        for key, text in tables.get("FileLocations", {}).items()
    }
    return {
        key: places.get(_field(text, "file_location_id"), "")
        for key, text in tables.get("StackFrames", {}).items()
    }


def _field(text: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", text)
    return int(found.group(1)) if found else 0


def op_name(instruction: Instruction) -> str:
    """The name stack in an instruction's metadata ("" where there is none)."""
    found = re.search(r'metadata=\{[^}]*?op_name="([^"]*)"', instruction.rest)
    return found.group(1) if found else ""


def source_line(module: HloModule, instruction: Instruction) -> str:
    """ "file:line" of an instruction, from either spelling of metadata."""
    rest = instruction.rest
    if found := re.search(r"\bstack_frame_id=(\d+)", rest):
        return module.frames.get(int(found.group(1)), "")
    found = re.search(r'source_file="([^"]*)"(?:\s+source_line=(\d+))?', rest)
    return f"{found.group(1)}:{found.group(2) or 0}" if found else ""
