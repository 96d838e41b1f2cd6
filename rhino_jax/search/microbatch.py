"""Gradient accumulation: a complete plan made over again with a time axis.

:mod:`rhino_jax.search.timing` plans the Program over time alone; here that plan and one
over devices become one. Time splits each shard's own rows, so no microbatch moves
between devices. Every layout of the loop gets its time digit, every move inside it is
made for one microbatch; what was planned for a sum over examples (the all-reduce or
reduce-scatter of a gradient) is done once, when the loop has ended.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.cost.reshard import route, wire_bytes
from rhino_jax.ir.assignment import Assignment, Loop, OpPlan, boundary, phases, whole
from rhino_jax.ir.factors import Choice, choice_problems
from rhino_jax.ir.layout import Layout, sorted_dim
from rhino_jax.ir.mesh import TIME, Axis, Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.steps import Move
from rhino_jax.rules import rule_of
from rhino_jax.search.subject import Subject
from rhino_jax.search.timing import Refusal, Timing, closed, timing, waiting

__all__ = ["Refusal", "Timing", "microbatched", "rows_together", "timed", "timing"]


def rows_together(subject: Subject, assignment: Assignment, mesh: Mesh) -> int:
    """Examples that lie together on one device: batch size over the data split."""
    size = subject.batch_size
    parts = [
        mesh.group_size(tuple(split.axis for split in assignment.inputs[i].dims[0]))
        for i in subject.batch_inputs
        if subject.shape(i)[:1] == (size,)
    ]
    return size // math.lcm(*parts)


def microbatched(
    subject: Subject,
    assignment: Assignment,
    mesh: Mesh,
    microbatches: int,
    owner: Sequence[int] = (),
) -> tuple[Assignment, Mesh] | Refusal:
    """``assignment`` with ``microbatches``, or every reason why not (str() prints).

    Where ops in the loop split the examples further than the inputs are, smaller
    blocks of rows are tried.

    Args:
        owner: the segment of every op, for a pipeline: sums that meet those of other
            segments (gradients of a tied parameter) are accumulated each on its own,
            and added once the loop has ended.
    """
    rows = rows_together(subject, assignment, mesh)
    answer: tuple[Assignment, Mesh] | Refusal | None = None
    for size in (rows // n for n in range(1, rows + 1) if rows % n == 0):
        if answer is not None and size % microbatches:
            continue
        found = timing(subject, size, microbatches)
        if isinstance(found, Refusal):
            return answer if isinstance(answer, Refusal) else found
        tried = timed(subject, assignment, mesh, found, owner)
        if not isinstance(tried, Refusal):
            return tried
        answer = answer or tried
    assert answer is not None
    return answer


def timed(
    subject: Subject,
    assignment: Assignment,
    mesh: Mesh,
    found: Timing,
    owner: Sequence[int] = (),
) -> tuple[Assignment, Mesh] | Refusal:
    """The Assignment over ``mesh`` plus Axis("time", found.microbatches)."""
    wide = Mesh((*mesh.axes, Axis(TIME, found.microbatches)))
    try:
        return _Writer(subject.program, assignment, found, wide, owner).run(), wide
    except Clash as clash:
        return Refusal((str(clash),))


class Clash(Exception):
    """Devices and microbatches want the same digit of a dimension."""


def _both(one: Layout, other: Layout) -> Layout:
    """A layout over devices and one over time, together."""
    dims = tuple(
        sorted_dim((*a, *b)) for a, b in zip(one.dims, other.dims, strict=True)
    )
    return Layout(dims, tuple(sorted((*one.partial, *other.partial))))


@dataclass
class Bodies:
    """Plans of ops and bodies over devices and over time made one."""

    mesh: Mesh

    def layout(self, program: Program, value: int, a: Layout, b: Layout) -> Layout:
        layout = _both(a, b)
        wrong = layout.problems(program.values[value].shape, self.mesh)
        if wrong:
            raise Clash(f"microbatches do not fit in: {'; '.join(wrong)}")
        return layout

    def move(
        self,
        program: Program,
        value: int,
        source: Layout,
        target: Layout,
        again: bool = False,
    ) -> Move:
        v = program.values[value]
        steps = route(v.shape, v.dtype, source, target, self.mesh)
        return Move(value, source, target, steps, again)

    def choice(self, program: Program, op: Op, a: Choice, b: Choice) -> Choice:
        splits = dict(a.splits)
        for name, digits in b.splits:
            splits[name] = (*splits.get(name, ()), *digits)
        both = Choice.of(splits, {**dict(a.flows), **dict(b.flows)})
        wrong = choice_problems(rule_of(program, op), both, self.mesh)
        if wrong:
            raise Clash(f"{op.kind} at {op.where}: {'; '.join(wrong)}")
        return both

    def op(
        self, program: Program, op: Op, plan: OpPlan, time: OpPlan
    ) -> tuple[OpPlan, tuple[Layout, ...]]:
        """The op's plan without moves, and its results' layouts over devices."""
        if not op.programs:
            rule = rule_of(program, op)
            choice = self.choice(program, op, plan.choice, time.choice)
            return replace(plan, choice=choice), boundary(program, op, plan, rule)[1]
        inner, ends = [], []
        for body, mine, its in zip(op.programs, plan.inner, time.inner, strict=True):
            first = _DELAYING.get(op.kind, lambda op: len(op.results))(op)
            done, end = self.body(body, mine, its, range(first, len(mine.outputs)))
            inner.append(done)
            ends.append(replace(mine, outputs=end))
        _, made = boundary(program, op, replace(plan, inner=tuple(ends)), None)
        return replace(plan, inner=tuple(inner)), made

    def body(
        self,
        program: Program,
        plan: Assignment,
        time: Assignment,
        may_wait: Iterable[int],
    ) -> tuple[Assignment, tuple[Layout, ...]]:
        """A nested Program in one, and its outputs' layouts over devices.

        Outputs (positions) that ``may_wait`` and are partial over time come as they
        are made: what was to move them is left to whoever reads them outside.
        """
        frame = _Frame(self, program)
        for v, a, b in zip(program.inputs, plan.inputs, time.inputs, strict=True):
            frame.enter(v, a, b)
        outputs = list(plan.outputs)
        waits: dict[int, int] = {}
        for i in may_wait:
            v = program.outputs[i]
            if v not in program.uses and program.outputs.count(v) == 1:
                waits[v] = i
        plans = []
        for op, mine, its in zip(program.ops, plan.ops, time.ops, strict=True):
            done, made = self.op(program, op, mine, its)
            before = list(frame.reads(op, mine, its))
            rule = None if op.programs else rule_of(program, op)
            _, given = boundary(program, op, mine, rule)
            _, turns = boundary(program, op, its, rule)
            after: list[Move] = []
            for v, home, now, turn in zip(op.results, given, made, turns, strict=True):
                frame.enter(v, now, turn)
                if v in waits and turn.partial:
                    outputs[waits[v]] = now
                    continue
                waits.pop(v, None)
                after += frame.bring(v, home, turn)
            after += frame.lifted(m for m in mine.after if m.value not in waits)
            plans.append(replace(done, before=tuple(before), after=tuple(after)))
        final = list(frame.lifted(m for m in plan.final if m.value not in waits))
        ends = []
        for v, a, b in zip(program.outputs, outputs, time.outputs, strict=True):
            final += frame.bring(v, a, b)
            ends.append(self.layout(program, v, a, b))
        inputs = tuple(
            self.layout(program, v, a, b)
            for v, a, b in zip(program.inputs, plan.inputs, time.inputs, strict=True)
        )
        merged = Assignment(inputs, tuple(ends), tuple(plans), tuple(final))
        return merged, tuple(outputs)


_DELAYING = {"scan": lambda op: op.param["num_carry"], "remat2": lambda op: 0}
"""Kinds whose bodies' outputs may come in another layout: from this position on."""


@dataclass
class _Frame:
    """The versions of values at hand, and how each is seen over time."""

    work: Bodies
    program: Program
    turns: dict[int, Layout] = field(default_factory=dict)
    held: dict[int, dict[Layout, None]] = field(default_factory=dict)

    def copy(self) -> _Frame:
        held = {v: dict(layouts) for v, layouts in self.held.items()}
        return replace(self, turns=dict(self.turns), held=held)

    def enter(self, value: int, home: Layout, turn: Layout) -> Layout:
        """A value comes in or is made: over devices as ``home``, over time ``turn``."""
        layout = self.work.layout(self.program, value, home, turn)
        self.turns[value] = turn
        self.held[value] = {layout: None}
        return layout

    def turn(self, value: int) -> Layout:
        rank = len(self.program.values[value].shape)
        return self.turns.get(value) or Layout.replicated(rank)

    def versions(self, value: int) -> dict[Layout, None]:
        """The layouts a value is at hand in; a literal is whole everywhere."""
        rank = len(self.program.values[value].shape)
        return self.held.setdefault(value, {Layout.replicated(rank): None})

    def bring(self, value: int, layout: Layout, turn: Layout) -> Iterator[Move]:
        """What it takes to have ``value`` in ``layout`` as seen over time ``turn``."""
        target = self.work.layout(self.program, value, layout, turn)
        yield from self._bring(value, target)

    def _bring(self, value: int, target: Layout) -> Iterator[Move]:
        v, held = self.program.values[value], self.versions(value)
        if target in held or (v.literal is not None and not target.partial):
            return
        mesh = self.work.mesh
        cost = {x: wire_bytes(v.shape, v.dtype, x, target, mesh) for x in held}
        source = min(held, key=lambda x: cost[x])
        held[target] = None
        yield self.work.move(self.program, value, source, target)

    def lifted(self, moves: Iterable[Move]) -> Iterator[Move]:
        """Moves over devices, of the value as it is seen over time."""
        for move in moves:
            v, turn = move.value, self.turn(move.value)
            yield from self.bring(v, move.source, turn)
            target = self.work.layout(self.program, v, move.target, turn)
            if target in self.versions(v) and not move.again:
                continue
            self.versions(v)[target] = None
            source = self.work.layout(self.program, v, move.source, turn)
            yield self.work.move(self.program, v, source, target, move.again)

    def reads(self, op: Op, plan: OpPlan, time: OpPlan) -> Iterator[Move]:
        """The moves before an op: those planned, and what the time axis adds."""
        yield from self.lifted(plan.before)
        rule = None if op.programs else rule_of(self.program, op)
        wanted, _ = boundary(self.program, op, plan, rule)
        turns, _ = boundary(self.program, op, time, rule)
        for v, layout, turn in zip(op.operands, wanted, turns, strict=True):
            yield from self.bring(v, layout, self.turn(v))
            yield from self.bring(v, layout, turn)


class _Writer:
    """The whole Program: what runs before, in and after the loop, what leaves it."""

    def __init__(
        self,
        program: Program,
        plan: Assignment,
        found: Timing,
        mesh: Mesh,
        owner: Sequence[int] = (),
    ) -> None:
        self.program, self.plan, self.owner = program, plan, owner
        self.work = Bodies(mesh)
        self.time = list(found.assignment.ops)
        self.trips = found.microbatches
        merged = {i: self._merged(i) for i in found.loop}
        loop = self._without_waiting(found.loop, merged)
        self.merged = {i: merged[i] for i in loop}
        self.before, self.loop, self.after = phases(program, loop)
        # What nothing depends on is not run, and moves nothing.
        self.plans = [
            OpPlan(inner=tuple(map(whole, op.programs))) for op in program.ops
        ]

    def _merged(self, index: int) -> tuple[OpPlan, tuple[Layout, ...]]:
        op = self.program.ops[index]
        return self.work.op(self.program, op, self.plan.ops[index], self.time[index])

    def _boundary(self, index: int, plan: OpPlan) -> tuple[tuple[Layout, ...], ...]:
        op = self.program.ops[index]
        rule = None if op.programs else rule_of(self.program, op)
        return boundary(self.program, op, plan, rule)

    def _without_waiting(
        self,
        loop: Sequence[int],
        merged: dict[int, tuple[OpPlan, tuple[Layout, ...]]],
    ) -> set[int]:
        """The loop's ops but for those that read a sum once it was moved."""
        program = self.program
        home = {
            v: layout
            for i in loop
            for v, layout, turn in zip(
                program.ops[i].results,
                merged[i][1],
                self._boundary(i, self.time[i])[1],
                strict=True,
            )
            if turn.partial
        }
        moved = {
            i
            for i in loop
            for v, layout in zip(
                program.ops[i].operands,
                self._boundary(i, self.plan.ops[i])[0],
                strict=True,
            )
            if home.get(v, layout) != layout
        }
        moved |= set(self._between_segments(loop, home))
        gone = waiting(program, self.time, loop, moved)
        for i in gone:
            idle = tuple(map(whole, program.ops[i].programs))
            self.time[i] = OpPlan(inner=idle)
        return closed(program, set(loop) - gone)

    def _between_segments(
        self, loop: Sequence[int], sums: Collection[int]
    ) -> Iterator[int]:
        """Ops of the loop that read the sums of several segments."""
        for i in loop if self.owner else ():
            made = (
                self.program.producer[v]
                for v in self.program.ops[i].operands
                if v in sums
            )
            if len({self.owner[maker] for maker in made}) > 1:
                yield i

    def run(self) -> Assignment:
        program, plan = self.program, self.plan
        outside = _Frame(self.work, program)
        for v, layout in zip(program.inputs, plan.inputs, strict=True):
            outside.enter(v, layout, Layout.replicated(layout.rank))
        for i in self.before:
            self._outside(outside, i)
        inside = outside.copy()
        inside.turns.update(self._read_as_rows())
        for i in self.loop:
            self._inside(inside, i)
        leaving = list(self._leaving())
        self._prune(leaving)
        leave = list(leaving)
        for move in leaving:
            whole_turn = Layout.replicated(move.target.rank)
            outside.enter(move.value, move.target, whole_turn)
        for move in leaving:
            leave += self._settled(outside, move.value)
        for i in self.after:
            self._outside(outside, i)
        final = list(outside.lifted(plan.final))
        for v, layout in zip(program.outputs, plan.outputs, strict=True):
            final += outside.bring(v, layout, Layout.replicated(layout.rank))
        loop = Loop(self.loop, self.trips, tuple(leave))
        return replace(plan, ops=tuple(self.plans), final=tuple(final), loop=loop)

    def _outside(self, frame: _Frame, index: int) -> None:
        op, plan = self.program.ops[index], self.plan.ops[index]
        before = tuple(frame.reads(op, plan, self.time[index]))
        for v, layout in zip(op.results, self._boundary(index, plan)[1], strict=True):
            frame.enter(v, layout, Layout.replicated(layout.rank))
        after = tuple(frame.lifted(plan.after))
        self.plans[index] = replace(plan, before=before, after=after)

    def _inside(self, frame: _Frame, index: int) -> None:
        op, plan = self.program.ops[index], self.plan.ops[index]
        done, made = self.merged[index]
        before = tuple(frame.reads(op, plan, self.time[index]))
        homes = self._boundary(index, plan)[1]
        turns = self._boundary(index, self.time[index])[1]
        after: list[Move] = []
        for v, now, home, turn in zip(op.results, made, homes, turns, strict=True):
            frame.enter(v, now, turn)
            after += frame.bring(v, home, turn)
        after += frame.lifted(plan.after)
        self.plans[index] = replace(done, before=before, after=tuple(after))

    def _read_as_rows(self) -> dict[int, Layout]:
        """Values from outside that the loop only reads as rows, and as which.

        They are cut before anything else is done to them.
        """
        made = {v for i in self.loop for v in self.program.ops[i].results}
        wants: dict[int, set[Layout]] = {}
        for i in self.loop:
            turns = self._boundary(i, self.time[i])[0]
            for v, turn in zip(self.program.ops[i].operands, turns, strict=True):
                if v not in made and self.program.values[v].literal is None:
                    wants.setdefault(v, set()).add(turn)
        alike = ((v, next(iter(x))) for v, x in wants.items() if len(x) == 1)
        return {v: turn for v, turn in alike if turn.split_axes}

    def _leaving(self) -> Iterator[Move]:
        """Every value of the loop that is read after it, brought out of time."""
        read = {v for i in self.after for v in self.program.ops[i].operands}
        read.update(self.program.outputs)
        for i in self.loop:
            turns = self._boundary(i, self.time[i])[1]
            made = self.merged[i][1]
            for v, home, turn in zip(
                self.program.ops[i].results, made, turns, strict=True
            ):
                if v in read:
                    source = self.work.layout(self.program, v, home, turn)
                    yield self.work.move(self.program, v, source, home)

    def _settled(self, frame: _Frame, value: int) -> Iterator[Move]:
        """What was planned to be done with a value as soon as it is made."""
        index = self.program.producer[value]
        plan = self.plan.ops[index]
        homes = self._boundary(index, plan)[1]
        place = self.program.ops[index].results.index(value)
        turn = frame.turn(value)
        yield from frame.bring(value, homes[place], turn)
        yield from frame.lifted(m for m in plan.after if m.value == value)

    def _prune(self, leaving: Iterable[Move]) -> None:
        """Drop moves of the loop whose result only its end needs, which has its own."""
        wanted = {(move.value, move.source) for move in leaving}

        def kept(moves: tuple[Move, ...]) -> tuple[Move, ...]:
            found = []
            for move in reversed(moves):
                if (move.value, move.target) in wanted:
                    wanted.discard((move.value, move.target))
                    wanted.add((move.value, move.source))
                    found.append(move)
            return tuple(reversed(found))

        for i in reversed(self.loop):
            plan = self.plans[i]
            after = kept(plan.after)
            reads = self._boundary(i, plan)[0]
            wanted.update(zip(self.program.ops[i].operands, reads, strict=True))
            self.plans[i] = replace(plan, before=kept(plan.before), after=after)
