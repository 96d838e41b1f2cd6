"""Reading the collectives of a compiled program from its HLO text.

The text is ``compiled.as_text()`` of the CPU, GPU or TPU compiler. No JAX here.

How the TPU compiler spells things (libtpu 0.0.42, v2 to 7x): a reduce-scatter is a
``reduce-scatter``, or a fusion around an all-reduce of which each device keeps its
slice, padded to whole tiles and followed by a small nameless permute that realigns the
rows; small ones (some KiB) become a plain all-reduce and a slice. A gather that runs
under the matrix products around it is spread over several fusions, each holding a copy
of the same all-gather with one ``chain_id``. From 7x on collectives run on the
SparseCore, inside ``call-start``. Between slices they are host transfers ("megascale").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rhino_jax.verify.collectives import (
    KINDS,
    PERMUTE,
    HloCollective,
    Part,
    axes_of,
    normalized,
    traffic_of,
    wire_bytes,
)
from rhino_jax.verify.hlo_loops import (
    Binding,
    arguments,
    body_binding,
    nothing_known,
    trip_count,
)
from rhino_jax.verify.hlo_text import (
    Computation,
    Groups,
    HloModule,
    Instruction,
    elements,
    leaves,
    op_name,
    parse_module,
    replica_groups,
    slice_groups,
    source_line,
    source_target_pairs,
)

__all__ = [
    "HloCollective",
    "Part",
    "axes_of",
    "normalized",
    "read",
    "traffic",
    "traffic_of",
    "wire_bytes",
]

_NEAR = 5
"""How many steps back a source line is looked for."""

_MEGASCALE = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": PERMUTE,
}
"""What a TPU program sends through the hosts to another slice."""


def traffic(text: str, mesh_shape: Mapping[str, int]) -> dict[str, int]:
    """``traffic_of`` what ``read`` finds in the text of a module."""
    return traffic_of(read(text), mesh_shape)


def read(text: str) -> tuple[HloCollective, ...]:
    """Every collective that runs in one execution, in program order.

    Followed: loops (times their trip count), calls, conditionals (every branch),
    fusions and asynchronous wrappers. A start/done pair counts once. TPU forms: a
    gather that is spread over several fusions (one ``chain_id``) counts once, at its
    start; an all-reduce of which the fusion around it keeps only this device's slice
    is a reduce-scatter.

    Raises:
        ValueError: the text is no HLO module.
    """
    module = parse_module(text)
    return tuple(_Walk(module).computation(module.entry, _Here()))


@dataclass(frozen=True)
class _Here:
    """What is known of the computation being read: how often it runs, and where."""

    trips: int = 1
    known: bool = True
    is_async: bool = False
    branches: tuple[str, ...] = ()
    binding: Binding = nothing_known


@dataclass(frozen=True)
class _Walk:
    module: HloModule

    def computation(self, name: str, here: _Here) -> Iterator[HloCollective]:
        inside = self.module.computations[name]
        for one in inside.instructions.values():
            if kind := _kind(one):
                yield self.collective(kind, inside, one, here)
            elif one.opcode == "while":
                yield from self.loop(inside, one, here)
            elif one.opcode == "conditional":
                for number, branch in enumerate(_branches(one)):
                    bound = arguments(
                        self.module, inside, one, here.binding, 1 + number
                    )
                    path = (*here.branches, f"{one.name}#{number}")
                    yield from self.computation(
                        branch, replace(here, branches=path, binding=bound)
                    )
            elif called := _called(one):
                if reduce := self.scattered(one):
                    yield self.fused_scatter(one, reduce, here)
                    continue
                bound = arguments(self.module, inside, one, here.binding)
                within = replace(
                    here,
                    binding=bound,
                    is_async=here.is_async or one.opcode.endswith("-start"),
                )
                for each in called:
                    yield from self.computation(each, within)

    def loop(
        self, inside: Computation, one: Instruction, here: _Here
    ) -> Iterator[HloCollective]:
        turns = trip_count(self.module, inside, one, here.binding)
        within = replace(
            here,
            trips=here.trips * (1 if turns is None else turns),
            known=here.known and turns is not None,
            binding=body_binding(self.module, inside, one, here.binding),
        )
        for part in ("condition", "body"):
            yield from self.computation(one.attribute(part), within)

    def collective(
        self, kind: str, inside: Computation, one: Instruction, here: _Here
    ) -> HloCollective:
        parts = _parts(inside, one)
        operand_bytes = sum(part.size_bytes for part in parts)
        in_pieces = _flag(one) is not None or one.opcode != kind
        groups = self.groups(kind, one)
        return HloCollective(
            kind=kind,
            name=one.name,
            dtype=_dtypes(parts),
            operand_bytes=operand_bytes,
            result_bytes=_result_bytes(
                kind, one, operand_bytes, max(map(len, groups), default=1)
            ),
            groups=groups,
            trip_count=here.trips,
            trip_known=here.known,
            computation=inside.name,
            source=self.source(inside, one),
            is_async=here.is_async or in_pieces,
            parts=parts,
            branches=here.branches,
            part_of=self.realigns(inside, one) if kind == PERMUTE else "",
        )

    def groups(self, kind: str, one: Instruction) -> Groups:
        if one.opcode == "send" and "_xla_megascale_target=" in one.rest:
            return slice_groups(one.rest, self.module.count("num_partitions"))
        if kind == PERMUTE:
            return source_target_pairs(one.rest)
        across = "channel_id=" in one.rest or "use_global_device_ids=true" in one.rest
        replicas = self.module.count("replica_count")
        partitions = self.module.count("num_partitions") if across else 1
        return replica_groups(one.rest, replicas * partitions)

    def source(self, inside: Computation, one: Instruction) -> str:
        """Its own line and name; else the line of the function it reduces with; else
        "near" the line of what it takes."""
        if own := self.own_source(one):
            return own
        reducer = self.module.computations.get(one.attribute("to_apply"))
        if reducer is not None:
            root = reducer.instructions[reducer.root]
            if line := source_line(self.module, root):
                return line
        for _ in range(_NEAR):
            taken = inside.instructions.get(one.operands[0]) if one.operands else None
            if taken is None:
                break
            if near := self.own_source(taken):
                return f"near {near}"
            one = taken
        return ""

    def own_source(self, one: Instruction) -> str:
        """The line and name in an instruction's own metadata."""
        line, name = source_line(self.module, one), op_name(one)
        return " ".join(filter(None, (line, f"({name})" if name else "")))

    def scattered(self, caller: Instruction) -> Instruction | None:
        """The all-reduce in a fusion that keeps only this device's slice of it."""
        if caller.opcode not in ("fusion", "fusion-start"):
            return None
        inside = self.module.computations[caller.attribute("calls")]
        reduces = [
            one for one in inside.instructions.values() if one.opcode == "all-reduce"
        ]
        if len(reduces) != 1:
            return None
        size = max(map(len, self.groups("all-reduce", reduces[0])), default=1)
        uses = list(_uses(inside, reduces[0].name))
        whole_bytes = _bytes(reduces[0].type_text)
        kept_bytes = sum(_bytes(use.type_text) for use in uses)
        sliced = bool(uses) and all(use.opcode == "dynamic-slice" for use in uses)
        return reduces[0] if sliced and kept_bytes * size <= whole_bytes else None

    def fused_scatter(
        self, fusion: Instruction, reduce: Instruction, here: _Here
    ) -> HloCollective:
        inside = self.module.computations[fusion.attribute("calls")]
        moved = _parts(inside, reduce)
        parts = tuple(
            Part(leaf.dtype, leaf.size_bytes)
            for name in reduce.operands
            for leaf in leaves(_before_padding(inside, name).type_text)
        )
        return HloCollective(
            kind="reduce-scatter",
            name=fusion.name,
            dtype=_dtypes(moved),
            operand_bytes=sum(part.size_bytes for part in moved),
            result_bytes=sum(
                _bytes(use.type_text) for use in _uses(inside, reduce.name)
            ),
            groups=self.groups("all-reduce", reduce),
            trip_count=here.trips,
            trip_known=here.known,
            computation=inside.name,
            source=self.own_source(fusion) or self.source(inside, reduce),
            is_async=here.is_async or fusion.opcode.endswith("-start"),
            parts=parts,
            branches=here.branches,
        )

    def realigns(self, inside: Computation, permute: Instruction) -> str:
        """The fused reduce-scatter whose rows a nameless permute moves, or ""."""
        if op_name(permute):
            return ""
        one = inside.instructions[permute.operands[0]]
        while one.opcode in _LIGHT and one.operands:
            if self.scattered(one):
                return one.name
            one = inside.instructions[one.operands[0]]
        return ""


_LIGHT = ("slice", "bitcast", "copy", "get-tuple-element", "fusion", "dynamic-slice")
"""What may stand between a fused reduce-scatter and the permute that realigns it."""


def _kind(one: Instruction) -> str:
    """The kind of a collective that starts here; "" for anything else."""
    opcode = one.opcode.removesuffix("-start")
    if opcode == "send":
        megascale = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
        if megascale:
            return _MEGASCALE.get(megascale.group(1), PERMUTE)
        return PERMUTE if "source_target_pairs=" in one.rest else ""
    if opcode not in KINDS:
        return ""
    flag = _flag(one)
    return "" if flag is not None and flag >= 0 else opcode


def _flag(one: Instruction) -> int | None:
    """For a TPU collective spread over fusions: -1 where it starts, else later."""
    found = re.search(r'"flag_start":\s*"(-?\d+)"', one.rest)
    return int(found.group(1)) if found else None


def _called(one: Instruction) -> tuple[str, ...]:
    """The computations an instruction runs once (none that it reduces with)."""
    if one.opcode.removesuffix("-start") in ("fusion", "async", "call"):
        return (one.attribute("calls") or one.attribute("to_apply"),)
    if found := re.search(r"called_computations=\{([^}]*)\}", one.rest):
        return tuple(re.findall(r"%([\w.\-]+)", found.group(1)))
    return ()


def _branches(one: Instruction) -> tuple[str, ...]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", one.rest):
        return tuple(re.findall(r"%([\w.\-]+)", found.group(1)))
    return one.attribute("true_computation"), one.attribute("false_computation")


def _parts(inside: Computation, one: Instruction) -> tuple[Part, ...]:
    """The arrays that a collective takes: its operands as they are defined."""
    data_first = one.opcode.removesuffix("-start") in ("ragged-all-to-all", "send")
    taken = one.operands[:1] if data_first else one.operands
    return tuple(
        Part(leaf.dtype, leaf.size_bytes)
        for name in taken
        for leaf in leaves(inside.instructions[name].type_text)
    )


def _before_padding(inside: Computation, name: str) -> Instruction:
    """What a padded operand of a fused reduce-scatter was."""
    one = inside.instructions[name]
    while one.opcode in ("pad", "bitcast", "copy", "reshape", "transpose"):
        one = inside.instructions[one.operands[0]]
    return one if one.opcode == "parameter" else inside.instructions[name]


def _result_bytes(kind: str, one: Instruction, operand_bytes: int, size: int) -> int:
    """Bytes that come out: a start's type holds operands, results and flags."""
    if one.opcode == "send":
        changed_bytes = {
            "all-gather": operand_bytes * size,
            "reduce-scatter": operand_bytes // size,
        }
        return changed_bytes.get(kind, operand_bytes)
    result = one.type_text
    if one.opcode.endswith("-start") and kind != "all-reduce":
        result = elements(one.type_text)[1]
    return _bytes(result)


def _bytes(type_text: str) -> int:
    return sum(leaf.size_bytes for leaf in leaves(type_text))


def _dtypes(parts: tuple[Part, ...]) -> str:
    return "+".join(sorted({part.dtype for part in parts}))


def _uses(inside: Computation, name: str) -> Iterator[Instruction]:
    """What uses a value, seen through the elements of a tuple and bitcasts."""
    for one in inside.instructions.values():
        if name in one.operands:
            if one.opcode in ("get-tuple-element", "bitcast"):
                yield from _uses(inside, one.name)
            else:
                yield one
