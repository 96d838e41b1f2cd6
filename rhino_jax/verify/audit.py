"""The compiled program against the plan: wire bytes per group of mesh axes.

A plan that the compiled program does not follow is a bug; this says where.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.errors import VerifyError
from rhino_jax.verify.collectives import (
    HloCollective,
    axes_key,
    collective_axes,
    elementary,
    traffic_of,
)
from rhino_jax.verify.facts import CompiledFacts
from rhino_jax.verify.matching import (
    TINY_BYTES,
    TOLERANCE,
    Matched,
    Piece,
    PlannedCollective,
    Want,
    match,
    pieces_of,
    want_of,
)

__all__ = ["Audit", "AxisTraffic", "Finding", "PlannedCollective", "audit"]


@dataclass(frozen=True)
class AxisTraffic:
    """Wire bytes of one group of axes, per device and execution."""

    axes: str
    planned_bytes: int
    compiled_bytes: int
    retyped_bytes: int
    """Planned minus compiled bytes that a compiler's change of element type makes."""
    aligning_bytes: int
    """Compiled bytes by which the TPU compiler pads and realigns reduce-scatters."""

    @property
    def ratio(self) -> float:
        """Compiled by planned, the change of element type set right (1.0 is exact)."""
        if not self.planned_bytes:
            return float("inf") if self.compiled_bytes else 1.0
        return (self.compiled_bytes + self.retyped_bytes) / self.planned_bytes

    @property
    def ratio_unaligned(self) -> float:
        """``ratio`` without the bytes that only align."""
        if not self.planned_bytes:
            return self.ratio
        return self.ratio - self.aligning_bytes / self.planned_bytes


@dataclass(frozen=True)
class Finding:
    """A collective that one side has and the other has not."""

    kind: str
    axes: str
    total_bytes: int
    """Bytes that the other side does not account for, in all runs."""
    count: int
    source: str
    name: str = ""
    """The HLO instruction, for a compiled one."""


@dataclass(frozen=True)
class Audit:
    """What ``audit`` found. ``str()`` of it is a table."""

    rows: tuple[AxisTraffic, ...]
    extra: tuple[Finding, ...]
    """Compiled, and no planned collective explains it."""
    missing: tuple[Finding, ...]
    """Planned, and not in the compiled program."""
    tiny: tuple[Finding, ...]
    """Compiled collectives below 1 KiB a run: counted, not judged."""
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the compiled program is the plan."""
        return not self.extra and not self.missing

    def __str__(self) -> str:
        head = f"{'axes':<12} {'planned':>14} {'compiled':>14} {'ratio':>7}"
        lines = [head]
        for row in self.rows:
            lines.append(
                f"{row.axes or '-':<12} {row.planned_bytes:>14,} "
                f"{row.compiled_bytes:>14,} {row.ratio:>7.3f}"
            )
        for title, findings in (
            ("compiled but not planned", self.extra),
            ("planned but not compiled", self.missing),
            ("below 1 KiB a run", self.tiny),
        ):
            lines += [f"{title}:"] if findings else []
            lines += [f"  {_line(one)}" for one in findings]
        lines += ["notes:"] if self.notes else []
        lines += [f"  {note}" for note in self.notes]
        lines.append("the compiled program is the plan" if self.ok else "NOT the plan")
        return "\n".join(lines)


def _line(one: Finding) -> str:
    name = f" {one.name}" if one.name else ""
    return (
        f"{one.kind} over {one.axes or '-'}, {one.total_bytes:,} bytes in {one.count} "
        f"runs{name}, {one.source or 'no source line'}"
    )


def audit(
    planned: Sequence[PlannedCollective],
    facts: CompiledFacts | Iterable[HloCollective],
    mesh_shape: Mapping[str, int],
) -> Audit:
    """Compare a plan's collectives with those of the compiled program.

    Args:
        planned: the collectives that the plan wrote.
        facts: what the compiler made of the program, or its collectives.
        mesh_shape: the mesh's axes and sizes, in order.

    A difference below 5% of the bytes planned for the same kind and axes is none (a
    compiler pads). Element types are those compiled: a factor that comes from
    narrowing or widening is set right and noted. A permute by which the TPU compiler
    realigns a reduce-scatter is noted, not judged. Both branches of a conditional
    count, on both sides.

    Raises:
        VerifyError: the facts are of a program that did not compile.
    """
    if isinstance(facts, CompiledFacts):
        if not facts.ok:
            raise VerifyError(f"nothing to audit: {facts.outcome}: {facts.message}")
        compiled = facts.collectives
    else:
        compiled = tuple(facts)
    wants = [want_of(one, _key(one.axes, mesh_shape)) for one in planned]
    real = [one for one in compiled if one.total_wire_bytes and not one.part_of]
    pieces = [
        piece
        for one in real
        for piece in pieces_of(one, axes_key(collective_axes(one, mesh_shape)))
    ]
    judged = [piece for piece in pieces if piece.unit_bytes >= TINY_BYTES]
    tiny = [piece for piece in pieces if piece.unit_bytes < TINY_BYTES]
    whole = _by_name(judged)
    matched = match(wants, judged)
    return Audit(
        _rows(planned, compiled, matched, mesh_shape),
        _extra(matched.pieces, whole, planned, mesh_shape),
        _missing(matched.wants, planned, mesh_shape),
        tuple(_finding(piece, piece.total_bytes) for piece in tiny),
        _notes(compiled, matched),
    )


def _key(axes: Sequence[str], mesh_shape: Mapping[str, int]) -> str:
    """An axes key in mesh order, axes of size one left out."""
    kept = [name for name in mesh_shape if name in axes and mesh_shape[name] > 1]
    return axes_key([*kept, *(name for name in axes if name not in mesh_shape)])


def _rows(
    planned: Sequence[PlannedCollective],
    compiled: Sequence[HloCollective],
    matched: Matched,
    mesh_shape: Mapping[str, int],
) -> tuple[AxisTraffic, ...]:
    totals: dict[str, int] = {}
    for record in planned:
        key = _key(record.axes, mesh_shape)
        totals[key] = totals.get(key, 0) + record.wire_bytes * record.count
    moved = traffic_of(compiled, mesh_shape)
    aligning: dict[str, int] = {}
    for one in compiled:
        if one.aligning_bytes:
            key = axes_key(collective_axes(one, mesh_shape))
            aligning[key] = aligning.get(key, 0) + one.aligning_bytes
    return tuple(
        AxisTraffic(
            key,
            totals.get(key, 0),
            moved.get(key, 0),
            round(matched.saved_bytes.get(key, 0.0)),
            aligning.get(key, 0),
        )
        for key in sorted({*totals, *moved})
        if totals.get(key, 0) or moved.get(key, 0)
    )


Slot = tuple[str, str]


def _planned_slots(
    records: Sequence[PlannedCollective], mesh_shape: Mapping[str, int]
) -> dict[Slot, float]:
    """Planned bytes by elementary kind and axes key."""
    slots: dict[Slot, float] = {}
    for one in records:
        for kind, size in elementary(one.kind, one.wire_bytes * one.count):
            slot = (kind, _key(one.axes, mesh_shape))
            slots[slot] = slots.get(slot, 0.0) + size
    return slots


def _by_name(pieces: Iterable[Piece]) -> dict[str, float]:
    """Bytes of the pieces by the compiled collective they belong to."""
    found: dict[str, float] = {}
    for piece in pieces:
        name = piece.compiled.name
        found[name] = found.get(name, 0.0) + piece.total_bytes
    return found


def _extra(
    pieces: Sequence[Piece],
    whole: Mapping[str, float],
    records: Sequence[PlannedCollective],
    mesh_shape: Mapping[str, int],
) -> tuple[Finding, ...]:
    """Pieces of a kind and axes not planned, or beyond the tolerance of what is.

    What is left of a collective that the plan explains in part (an all-reduce where a
    reduce-scatter was planned) is held against all that was planned over its axes.
    """
    left = _by_name(pieces)
    planned = _planned_slots(records, mesh_shape)
    for (_, key), size in list(planned.items()):
        planned["", key] = planned.get(("", key), 0.0) + size

    def slot(piece: Piece) -> Slot:
        name = piece.compiled.name
        return ("" if left[name] < whole[name] - 0.5 else piece.kind, piece.key)

    beyond: dict[Slot, float] = {}
    for piece in pieces:
        beyond[slot(piece)] = beyond.get(slot(piece), 0.0) + piece.total_bytes
    found: dict[str, tuple[Piece, float]] = {}
    for piece in pieces:
        if beyond[slot(piece)] > TOLERANCE * planned.get(slot(piece), 0.0):
            _, before = found.get(piece.compiled.name, (piece, 0.0))
            found[piece.compiled.name] = (piece, before + piece.total_bytes)
    return tuple(_finding(piece, size) for piece, size in found.values())


def _finding(piece: Piece, total_bytes: float) -> Finding:
    one = piece.compiled
    return Finding(
        one.kind, piece.key, round(total_bytes), one.trip_count, one.source, one.name
    )


def _missing(
    wants: Sequence[Want],
    records: Sequence[PlannedCollective],
    mesh_shape: Mapping[str, int],
) -> tuple[Finding, ...]:
    """Open wants, tiny ones and what is within the tolerance left out."""
    slots = _planned_slots(records, mesh_shape)
    judged = [want for want in wants if want.planned.wire_bytes >= TINY_BYTES]
    short: dict[Slot, float] = {}
    for want in judged:
        slot = (want.kind, want.key)
        short[slot] = short.get(slot, 0.0) + want.total_bytes
    found: dict[int, Finding] = {}
    for want in judged:
        slot, one = (want.kind, want.key), want.planned
        if short[slot] > TOLERANCE * slots[slot]:
            before = found[id(one)].total_bytes if id(one) in found else 0
            total = before + round(want.total_bytes)
            found[id(one)] = Finding(one.kind, want.key, total, one.count, one.where)
    return tuple(found.values())


def _notes(compiled: Sequence[HloCollective], matched: Matched) -> tuple[str, ...]:
    notes = [
        f"{kind} over {key}: {round(size):,} bytes {what}"
        for (what, kind, key), size in sorted(matched.changes.items())
    ]
    padded = [one for one in compiled if one.aligning_bytes and not one.part_of]
    if padded:
        size = sum(one.aligning_bytes for one in compiled)
        notes.append(
            f"{len(padded)} reduce-scatters padded and realigned: {size:,} bytes more"
        )
    notes += [
        f"{one.kind} {one.name}: in a loop of unknown length, counted once "
        f"({one.source or 'no source line'})"
        for one in compiled
        if not one.trip_known
    ]
    return tuple(notes)
