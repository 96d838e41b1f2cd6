"""Who makes what: an assignment as units that read and make versions of values.

A *version* is a value in one layout. A *unit* is what can not be cut further: an op
with the moves around it, or one of the moves that end a loop or a step. Reading an
assignment in the order in which it runs tells for every version that a unit reads
which unit made it; that is all that cutting it in stages has to respect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rhino_jax.ir.assignment import Assignment, boundary, live_ops, phases
from rhino_jax.ir.factors import Rule
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TIME
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.steps import Move

RuleOf = Callable[[Program, Op], Rule]
Version = tuple[int, Layout]
"""A value, and how it lies."""

OP, LEAVE, FINAL = "op", "leave", "final"
BEFORE, LOOP, AFTER = 0, 1, 2
GIVEN = -1
"""The maker of a step's inputs."""

TOTAL, ROWS, LAST = "total", "rows", "last"
"""How a value leaves the loop: terms added up, rows put together, the last turn's."""


@dataclass(frozen=True)
class Unit:
    """One op with its moves, or one move behind the loop or the step.

    ``index`` counts ops, ``loop.leave`` or ``final``. ``phase`` is BEFORE, LOOP (once
    for every microbatch) or AFTER. ``reads`` are versions and the units that made them
    (GIVEN: inputs of the step). ``how`` a version leaves the loop, where it does.
    """

    kind: str
    index: int
    phase: int
    reads: tuple[tuple[Version, int], ...]
    makes: tuple[Version, ...]
    how: str = ""


@dataclass(frozen=True)
class Flow:
    """All units in the order in which they run, and who makes the step's outputs."""

    units: tuple[Unit, ...]
    outputs: tuple[tuple[Version, int], ...]


def leaving(move: Move) -> str:
    """How a move brings a value out of the loop; "" for one behind it."""
    if move.source.operator(TIME):
        return TOTAL
    if TIME in move.source.axes:
        return ROWS
    return "" if move.steps else LAST


def flow(
    program: Program,
    assignment: Assignment,
    turning: Collection[int],
    rule_of: RuleOf,
) -> Flow:
    """The units of ``assignment``.

    Args:
        turning: the ops that count as the loop where the assignment has none.
    """
    loop = assignment.loop
    if loop is None:
        order = _in_order(program, turning)
    else:
        before, inside, after = phases(program, loop.ops)
        order = [
            *((OP, i, BEFORE) for i in before),
            *((OP, i, LOOP) for i in inside),
            *((LEAVE, k, AFTER) for k in range(len(loop.leave))),
            *((OP, i, AFTER) for i in after),
        ]
    order += [(FINAL, k, AFTER) for k in range(len(assignment.final))]
    reading = _Reading(program, assignment, rule_of)
    for kind, index, phase in order:
        reading.unit(kind, index, phase)
    outputs = tuple(
        reading.source(version)
        for version in zip(program.outputs, assignment.outputs, strict=True)
    )
    return Flow(tuple(reading.units), outputs)


def _in_order(program: Program, turning: Collection[int]) -> list[tuple[str, int, int]]:
    """The ops of a step without a loop, as they stand."""
    before, inside, _ = phases(program, turning)
    place = {**dict.fromkeys(before, BEFORE), **dict.fromkeys(inside, LOOP)}
    return [(OP, i, place.get(i, AFTER)) for i in sorted(live_ops(program))]


@dataclass
class _Reading:
    program: Program
    assignment: Assignment
    rule_of: RuleOf
    units: list[Unit] = field(default_factory=list)
    outside: dict[Version, int] = field(default_factory=dict)
    turning: dict[Version, int] | None = None

    def __post_init__(self) -> None:
        pairs = zip(self.program.inputs, self.assignment.inputs, strict=True)
        self.outside = dict.fromkeys(pairs, GIVEN)

    def source(self, version: Version) -> tuple[Version, int]:
        """A version and who made it; what is made in the loop stays in it."""
        held = self.outside if self.turning is None else self.turning
        assert version in held, (
            f"value %{version[0]} is wanted as {version[1]}, and nobody makes it"
        )
        return version, held[version]

    def unit(self, kind: str, index: int, phase: int) -> None:
        if self.assignment.loop is not None:
            if phase == LOOP and self.turning is None:
                self.turning = dict(self.outside)
            elif phase == AFTER and kind != LEAVE and self.turning is not None:
                self.turning = None
        number = len(self.units)
        made: dict[Version, None] = {}
        reads: dict[Version, int] = {}
        for version, is_read in self._events(kind, index):
            if not is_read:
                made[version] = None
            elif version not in made and not self._is_literal(version):
                if kind == LEAVE and version in self.outside:
                    reads[version] = self.outside[version]
                else:
                    reads[version] = self.source(version)[1]
        loop = self.assignment.loop
        how = leaving(loop.leave[index]) if loop and kind == LEAVE else ""
        self.units.append(
            Unit(kind, index, phase, tuple(reads.items()), tuple(made), how)
        )
        into = [self.outside] if phase != LOOP or self.turning is None else []
        for held in [*into, *([self.turning] if self.turning is not None else [])]:
            held.update(dict.fromkeys(made, number))

    def _is_literal(self, version: Version) -> bool:
        value, layout = version
        return self.program.values[value].literal is not None and not layout.partial

    def _events(self, kind: str, index: int) -> Iterator[tuple[Version, bool]]:
        """Versions read (True) and made (False), as it goes."""
        if kind != OP:
            loop = self.assignment.loop
            moves: Sequence[Move] = self.assignment.final
            if kind == LEAVE:
                assert loop is not None
                moves = loop.leave
            yield from _of_moves([moves[index]])
            return
        op, plan = self.program.ops[index], self.assignment.ops[index]
        rule = None if op.programs else self.rule_of(self.program, op)
        wanted, given = boundary(self.program, op, plan, rule)
        yield from _of_moves(plan.before)
        yield from ((v, True) for v in zip(op.operands, wanted, strict=True))
        yield from ((v, False) for v in zip(op.results, given, strict=True))
        yield from _of_moves(plan.after)


def _of_moves(moves: Iterable[Move]) -> Iterator[tuple[Version, bool]]:
    for move in moves:
        yield (move.value, move.source), True
        yield (move.value, move.target), False
