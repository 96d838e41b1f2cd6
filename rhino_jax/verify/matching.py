"""Which compiled collective carries out which planned one.

A compiler merges collectives (several arrays in one instruction, or concatenated into
one), splits an all-reduce in two, pads, and changes element types. So planned and
compiled are matched array by array where sizes agree, then by sums of what is left,
then once more with every all-reduce taken as a reduce-scatter and a gather.

Equal collectives of one value become one (on every compiler, however far apart; an
optimization barrier between them prevents it on GPU and TPU, not on CPU), and GPU and
TPU turn two reduce-scatters that are added into one of the sum. A plan that counts both
is then told that one is missing: that is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.verify.collectives import HloCollective, elementary, part_wire_bytes

TOLERANCE = 0.05
TINY_BYTES = 1024
_ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_JAX_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


@dataclass(frozen=True)
class PlannedCollective:
    """One collective as the plan wrote it.

    ``axes`` are its mesh axes, ``wire_bytes`` what one device sends in one run (the
    count of ``collectives.wire_bytes``), ``count`` how often it runs in one execution,
    ``where`` the line or path that asked for it, ``dtype`` the element type on the wire
    ("float32" or "f32"; "" where not told).
    """

    kind: str
    axes: tuple[str, ...]
    wire_bytes: int
    count: int = 1
    where: str = ""
    dtype: str = ""


@dataclass
class Want:
    """What is still open of a planned collective."""

    kind: str
    key: str
    unit_bytes: float
    count: float
    dtype: str
    planned: PlannedCollective

    @property
    def total_bytes(self) -> float:
        """Open bytes of all runs."""
        return self.unit_bytes * self.count


@dataclass
class Piece:
    """What is still unexplained of one array of a compiled collective."""

    kind: str
    key: str
    unit_bytes: float
    count: float
    dtype: str
    compiled: HloCollective

    @property
    def total_bytes(self) -> float:
        """Unexplained bytes of all runs."""
        return self.unit_bytes * self.count


@dataclass
class Matched:
    """The outcome: ``changes`` counts wire bytes by what happened to them."""

    wants: list[Want]
    pieces: list[Piece]
    changes: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """(what, kind, axes key) to compiled wire bytes."""
    saved_bytes: dict[str, float] = field(default_factory=dict)
    """By axes key: planned minus compiled bytes that a change of element type makes."""


def want_of(planned: PlannedCollective, key: str) -> Want:
    """A planned collective, all open."""
    dtype = _JAX_NAMES.get(planned.dtype, planned.dtype)
    return Want(planned.kind, key, planned.wire_bytes, planned.count, dtype, planned)


def pieces_of(compiled: HloCollective, key: str) -> list[Piece]:
    """A compiled collective array by array, all unexplained."""
    return [
        Piece(
            compiled.kind,
            key,
            part_wire_bytes(compiled, part),
            compiled.trip_count,
            part.dtype,
            compiled,
        )
        for part in compiled.parts
    ]


def match(wants: Iterable[Want], pieces: Iterable[Piece]) -> Matched:
    """Explain compiled pieces by planned wants as far as it goes."""
    matched = Matched(list(wants), list(pieces))
    _by_size(matched)
    _by_sum(matched)
    matched.wants = [
        replace(want, kind=kind, unit_bytes=unit)
        for want in matched.wants
        for kind, unit in _split(want.kind, want.unit_bytes)
    ]
    matched.pieces = [
        replace(piece, kind=kind, unit_bytes=unit)
        for piece in matched.pieces
        for kind, unit in _split(piece.kind, piece.unit_bytes)
    ]
    _by_size(matched)
    _by_sum(matched)
    return matched


def _split(kind: str, unit_bytes: float) -> Sequence[tuple[str, float]]:
    shares = elementary(kind, 2)
    return [(plain, unit_bytes * share / 2) for plain, share in shares]


def _by_size(matched: Matched) -> None:
    """Pair arrays whose sizes agree: as they are, then with a changed element type."""
    groups: dict[tuple[str, str], list[Want]] = {}
    for want in matched.wants:
        groups.setdefault((want.kind, want.key), []).append(want)
    for factor_of in _FACTORS:
        for piece in matched.pieces:
            wants = groups.get((piece.kind, piece.key), [])
            near = [want for want in wants if _agrees(want, piece, factor_of)]
            near.sort(key=lambda want: abs(want.unit_bytes - piece.unit_bytes))
            for want in near:
                runs = min(want.count, piece.count)
                _explain(matched, want, piece, runs, runs)
    _drop_done(matched)


def _agrees(want: Want, piece: Piece, factor_of: Factor) -> bool:
    factor = factor_of(want.dtype, piece.dtype)
    if factor is None or not want.count:
        return False
    gap = abs(piece.unit_bytes * factor - want.unit_bytes)
    return gap <= TOLERANCE * want.unit_bytes


Factor = Callable[[str, str], float | None]
"""(planned dtype, compiled dtype) to planned bytes per compiled byte, or None."""


def _same_type(planned: str, compiled: str) -> float | None:
    return 1.0 if planned in ("", compiled) else None


def _as_it_is(planned: str, compiled: str) -> float | None:
    return 1.0


def _retyped(planned: str, compiled: str) -> float | None:
    """The ratio of two known element types."""
    if planned in _ITEM_BYTES and compiled in _ITEM_BYTES and planned != compiled:
        return _ITEM_BYTES[planned] / _ITEM_BYTES[compiled]
    return None


def _narrowed(planned: str, compiled: str) -> float | None:
    return 2.0 if not planned and compiled in ("bf16", "f16") else None


def _widened(planned: str, compiled: str) -> float | None:
    return 0.5 if not planned and compiled == "f32" else None


_FACTORS: tuple[Factor, ...] = (
    _same_type,
    _retyped,
    _as_it_is,
    _narrowed,
    _widened,
)
"""In this order: half the bytes of one matrix may be all the bytes of another."""


def _explain(
    matched: Matched,
    want: Want,
    piece: Piece,
    want_runs: float,
    piece_runs: float,
    what: tuple[str, ...] = (),
) -> None:
    if want_runs <= 0 or piece_runs <= 0:
        return
    compiled_bytes = piece.unit_bytes * piece_runs
    planned_bytes = want.unit_bytes * want_runs
    want.count -= want_runs
    piece.count -= piece_runs
    ratio = planned_bytes / compiled_bytes
    if ratio > 1.5 or ratio < 0.67:
        what += (f"{'narrowed' if ratio > 1 else 'widened'} to {piece.dtype}",)
        saved = matched.saved_bytes.get(piece.key, 0.0)
        matched.saved_bytes[piece.key] = saved + planned_bytes - compiled_bytes
    if want.planned.kind != piece.compiled.kind:
        what += (f"compiled as {piece.compiled.kind}",)
    for one in what:
        slot = (one, want.planned.kind, piece.key)
        matched.changes[slot] = matched.changes.get(slot, 0.0) + compiled_bytes


def _by_sum(matched: Matched) -> None:
    """Set sums against each other: several arrays may have been joined into one."""
    groups = dict.fromkeys((piece.kind, piece.key) for piece in matched.pieces)
    for group in groups:
        pieces = [p for p in matched.pieces if (p.kind, p.key) == group]
        wants = [w for w in matched.wants if (w.kind, w.key) == group]
        if wants:
            _settle(matched, wants, pieces)
    _drop_done(matched)


def _settle(matched: Matched, wants: list[Want], pieces: list[Piece]) -> None:
    factor = _sum_factor(wants, pieces)
    for piece in pieces:
        for want in wants:
            open_bytes = min(piece.total_bytes * factor, want.total_bytes)
            if open_bytes > 0:
                _explain(
                    matched,
                    want,
                    piece,
                    open_bytes / want.unit_bytes,
                    open_bytes / factor / piece.unit_bytes,
                    ("matched by their sum only",),
                )


def _sum_factor(wants: list[Want], pieces: list[Piece]) -> float:
    """Planned bytes per compiled byte of a group: 1, or by its change of dtype."""
    planned = sum(want.total_bytes for want in wants)
    compiled = sum(piece.total_bytes for piece in pieces)
    for factor_of in _FACTORS:
        ratios = {factor_of(w.dtype, p.dtype) for w in wants for p in pieces}
        factor = ratios.pop()
        if factor is None or ratios:
            continue
        if abs(compiled * factor - planned) <= TOLERANCE * planned:
            return factor
    return 1.0


def _drop_done(matched: Matched) -> None:
    matched.wants = [want for want in matched.wants if want.total_bytes > 0.5]
    matched.pieces = [piece for piece in matched.pieces if piece.total_bytes > 0.5]
