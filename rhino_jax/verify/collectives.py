"""The collectives a compiled program runs: their bytes on the wire, their mesh axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rhino_jax.verify.hlo_text import Groups

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
PERMUTE = "collective-permute"
UNKNOWN_AXES = ("unknown",)


@dataclass(frozen=True)
class Part:
    """One array of a collective, before it moves: combined collectives have many."""

    dtype: str
    size_bytes: int


@dataclass(frozen=True)
class HloCollective:
    """One collective instruction of a compiled program.

    Bytes are those one device holds, for one run of the instruction; it runs
    ``trip_count`` times in one execution of the program (once, with ``trip_known``
    False, where a loop around it has no constant count).
    """

    kind: str
    """One of KINDS."""
    name: str
    dtype: str
    """Element type on the wire, as compiled; "bf16+f32" where a combined one mixes."""
    operand_bytes: int
    result_bytes: int
    groups: Groups
    """Device groups; (from, to) pairs for a permute."""
    trip_count: int
    trip_known: bool
    computation: str
    source: str
    """The user's "file:line" and the name stack, where the compiler kept them."""
    is_async: bool
    parts: tuple[Part, ...]
    """The arrays it takes, without what the compiler pads them with."""
    branches: tuple[str, ...] = ()
    """The branches of conditionals it is in ("name#number"), outermost first."""
    part_of: str = ""
    """For a permute by which a compiler realigns a reduce-scatter: that one's name."""

    @property
    def is_permute(self) -> bool:
        """Whether ``groups`` are (from, to) pairs."""
        return self.kind == PERMUTE

    @property
    def group_size(self) -> int:
        """How many devices take part in one exchange (2 for a permute that moves)."""
        if self.is_permute:
            return 2 if any(a != b for a, b in self.groups) else 1
        return max(map(len, self.groups), default=1)

    @property
    def total_wire_bytes(self) -> int:
        """Wire bytes of all runs in one execution, per device."""
        return wire_bytes(self) * self.trip_count

    @property
    def aligning_bytes(self) -> int:
        """Of those, the padding and realigning that a compiler added by itself."""
        if self.part_of:
            return self.total_wire_bytes
        taken_bytes = sum(part.size_bytes for part in self.parts)
        if self.operand_bytes == taken_bytes:
            return 0
        asked = sum(part_wire_bytes(self, part) for part in self.parts)
        return self.total_wire_bytes - asked * self.trip_count


def wire_bytes(collective: HloCollective) -> int:
    """Bytes one device sends (and receives) in one run, by the ring's count.

    all-gather: result·(n-1)/n; all-reduce: 2·operand·(n-1)/n; reduce-scatter and
    all-to-all: operand·(n-1)/n; permute and broadcast: operand. The same formulas as
    the planner's, from Thakur, Rabenseifner, Gropp, "Optimization of collective
    communication operations in MPICH" (2005).
    """
    whole = {"all-gather": collective.result_bytes}
    return _on_wire(
        collective.kind,
        whole.get(collective.kind, collective.operand_bytes),
        collective.group_size,
    )


def part_wire_bytes(collective: HloCollective, part: Part) -> int:
    """The share of one array in the wire bytes of its collective."""
    size = collective.group_size
    gathers = collective.kind == "all-gather"
    whole_bytes = part.size_bytes * size if gathers else part.size_bytes
    return _on_wire(collective.kind, whole_bytes, size)


def _on_wire(kind: str, whole_bytes: int, size: int) -> int:
    if size <= 1:
        return 0
    if kind in (PERMUTE, "collective-broadcast"):
        return whole_bytes
    twice = 2 if kind == "all-reduce" else 1
    return twice * whole_bytes * (size - 1) // size


def axes_of(
    groups: Groups, mesh_shape: Mapping[str, int], pairs: bool = False
) -> tuple[str, ...]:
    """The mesh axes along which the groups (or a permute's pairs) vary.

    A device id is its row-major place in the mesh, whose axes ``mesh_shape`` lists in
    order. Groups that are no product of whole axes give ("unknown",); groups of one
    device give ().

    >>> axes_of(((0, 4), (1, 5), (2, 6), (3, 7)), {"d": 2, "t": 4})
    ('d',)
    >>> axes_of(((0, 1), (1, 2), (2, 3)), {"d": 2, "t": 4}, pairs=True)
    ('t',)
    """
    return _axes_of(groups, tuple(mesh_shape), tuple(mesh_shape.values()), pairs)


@functools.lru_cache(1024)
def _axes_of(
    groups: Groups, names: tuple[str, ...], sizes: tuple[int, ...], pairs: bool
) -> tuple[str, ...]:
    total = math.prod(sizes)
    if any(not 0 <= device < total for group in groups for device in group):
        return UNKNOWN_AXES

    def place(device: int) -> tuple[int, ...]:
        spots = []
        for size in reversed(sizes):
            device, spot = divmod(device, size)
            spots.append(spot)
        return tuple(reversed(spots))

    varying: set[frozenset[int]] = set()
    for group in groups:
        spots = [place(device) for device in group]
        moving = frozenset(
            axis
            for axis, seen in enumerate(zip(*spots, strict=True))
            if len({*seen}) > 1
        )
        if not pairs and len({*group}) != math.prod(sizes[axis] for axis in moving):
            return UNKNOWN_AXES
        varying.add(moving)
    if not pairs and len(varying) > 1:
        return UNKNOWN_AXES
    moved = frozenset[int]().union(*varying)
    return tuple(name for axis, name in enumerate(names) if axis in moved)


def collective_axes(
    collective: HloCollective, mesh_shape: Mapping[str, int]
) -> tuple[str, ...]:
    """``axes_of`` for a collective, its kind considered."""
    return axes_of(collective.groups, mesh_shape, pairs=collective.is_permute)


def axes_key(axes: Iterable[str]) -> str:
    """The key of an axis group: "d", or "d,t"."""
    return ",".join(axes)


def traffic_of(
    collectives: Iterable[HloCollective], mesh_shape: Mapping[str, int]
) -> dict[str, int]:
    """Wire bytes a device and an execution, by axis group.

    Both branches of a conditional count, so under one this is an upper bound. What
    moves nothing (groups of one device) is left out.
    """
    totals: dict[str, int] = {}
    for one in collectives:
        if moved_bytes := one.total_wire_bytes:
            key = axes_key(collective_axes(one, mesh_shape))
            totals[key] = totals.get(key, 0) + moved_bytes
    return totals


def normalized(rows: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Wire bytes by elementary kind: an all-reduce is a reduce-scatter and a gather.

    >>> normalized([("all-reduce", 8), ("all-gather", 4)])
    {'reduce-scatter': 4, 'all-gather': 8}
    """
    totals: dict[str, int] = {}
    for kind, size_bytes in rows:
        for plain, share_bytes in elementary(kind, size_bytes):
            totals[plain] = totals.get(plain, 0) + share_bytes
    return totals


def elementary(kind: str, size_bytes: int) -> tuple[tuple[str, int], ...]:
    """The wire bytes of one collective as (kind, bytes): an all-reduce gives two."""
    if kind != "all-reduce":
        return ((kind, size_bytes),)
    half_bytes = size_bytes // 2
    return (("reduce-scatter", size_bytes - half_bytes), ("all-gather", half_bytes))
