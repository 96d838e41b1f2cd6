"""What a plan becomes on one device: buffers, and the instructions between them.

A Program under an Assignment is unfolded into a flat list: every op on its shard,
every step of every move. A *buffer* is one version of a value (a value and its gathered
copy are two). What only renames memory (a reshape, a transpose: compilers choose the
layout so that it costs nothing) makes no buffer of its own. Bodies of remat are
unfolded in place; a body of a loop or branch is unfolded once, beside its instruction.
So are the ops that run for every microbatch: their loop's carries are the accumulators.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rhino_jax.cost.accumulation import accumulated
from rhino_jax.cost.habits import PLAIN, Habits
from rhino_jax.cost.halo import extended_bytes
from rhino_jax.cost.instructions import (
    ACCUMULATE,
    BARRIER,
    FUSED,
    OPAQUE,
    OVERWRITES,
    PARTIAL_READERS,
    REDUCING,
    REMATERIALIZE,
    ROLES,
    TAKE,
    Buffer,
    Instruction,
    RuleOf,
    Unfolded,
    carries,
    overwrites,
    renames,
    role_of,
    with_stores,
)
from rhino_jax.cost.simplify import simplified
from rhino_jax.cost.ticks import pipelined, with_totals
from rhino_jax.cost.tiles import stored_bytes, window_shapes
from rhino_jax.ir.assignment import (
    Assignment,
    OpPlan,
    boundary,
    phases,
    waited_for,
    whole,
)
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import WAITS, Op, Program, itemsize
from rhino_jax.ir.steps import ALL_GATHER, PASSED, Move

__all__ = [
    "ACCUMULATE",
    "FUSED",
    "OPAQUE",
    "PARTIAL_READERS",
    "REDUCING",
    "Buffer",
    "Instruction",
    "RuleOf",
    "Unfolded",
    "unfold",
]

IN_FLIGHT = 2
"""Shards at hand while they go around a ring: one is used, the next one comes in."""


def unfold(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    rule_of: RuleOf,
    donated: tuple[int, ...] = (),
    habits: Habits = PLAIN,
) -> Unfolded:
    """``program`` as one device carries it out. Linear in ops and moves.

    ``donated`` are positions of inputs whose memory an output of the same shape, dtype
    and layout takes over.
    """
    work = Unfolding(assignment.over(mesh), rule_of, habits)
    frame = work.enter(program, assignment)
    inputs = tuple(
        frame.put(v, layout)
        for v, layout in zip(program.inputs, assignment.inputs, strict=True)
    )
    outputs = work.run(frame, assignment)
    plain = Unfolded(
        tuple(work.buffers),
        tuple(work.instructions),
        inputs,
        outputs,
        _donations(program, assignment, donated),
        tuple(work.pinned),
    )
    return simplified(plain, habits)


def _donations(
    program: Program, assignment: Assignment, donated: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Each donated input with the first free output that looks like it, as JAX does."""
    free: dict[tuple[object, ...], list[int]] = {}
    for o, (v, layout) in enumerate(
        zip(program.outputs, assignment.outputs, strict=True)
    ):
        value = program.values[v]
        free.setdefault((value.shape, value.dtype, layout), []).append(o)
    pairs = []
    for i in donated:
        value = program.values[program.inputs[i]]
        fitting = free.get((value.shape, value.dtype, assignment.inputs[i]))
        if fitting:
            pairs.append((i, fitting.pop(0)))
    return tuple(pairs)


@dataclass
class Frame:
    """The versions of the values of one Program while it is unfolded."""

    work: Unfolding
    program: Program
    versions: dict[int, dict[Layout, int]] = field(default_factory=dict)

    def put(self, value: int, layout: Layout, buffer: int | None = None) -> int:
        if buffer is None:
            buffer = self.work.new(self.program, value, layout)
        self.versions.setdefault(value, {})[layout] = buffer
        return buffer

    def get(self, value: int, layout: Layout) -> int:
        held = self.versions.get(value, {})
        if layout not in held:
            literal = self.program.values[value].literal
            assert literal is not None, f"%{value} is not at hand as {layout}"
            return self.put(value, layout, self.work.constant(self.program, value))
        return held[layout]

    def waited(self, value: int, beside: Iterable[int]) -> tuple[int, ...]:
        """What stands behind a barrier with ``value`` when it is moved again."""
        at_hand = (v for v in beside if v in self.versions)
        anchor = waited_for(self.program, value, at_hand)
        return () if anchor is None else tuple(self.versions[anchor].values())


@dataclass
class Unfolding:
    mesh: Mesh
    rule_of: RuleOf
    habits: Habits
    buffers: list[Buffer] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    pinned: dict[int, None] = field(default_factory=dict)
    windows: frozenset[tuple[int, ...]] = frozenset()
    """Shapes of what convolutions read and write."""
    outer: int | None = None
    """The op of the outermost Program that a remat body belongs to."""

    def enter(self, program: Program, assignment: Assignment) -> Frame:
        assert len(program.ops) == len(assignment.ops), "an assignment of other ops"
        self.windows |= window_shapes(program)
        return Frame(self, program)

    def new(self, program: Program, value: int, layout: Layout) -> int:
        v = program.values[value]
        size = self.size(v.shape, v.dtype, layout)
        name = v.name or f"%{value} {v}"
        self.buffers.append(Buffer(value, size, name, itemsize(v.dtype)))
        return len(self.buffers) - 1

    def size(self, shape: tuple[int, ...], dtype: str, layout: Layout) -> int:
        of_window = shape in self.windows
        return stored_bytes(
            shape, dtype, layout, self.mesh, self.habits.size, of_window
        )

    def constant(self, program: Program, value: int) -> int:
        self.buffers.append(Buffer(value, 0, str(program.values[value])))
        return len(self.buffers) - 1

    def emit(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)

    def ops(self, frame: Frame, assignment: Assignment, indices: Iterable[int]) -> None:
        for index in indices:
            op, plan = frame.program.ops[index], assignment.ops[index]
            place = index if self.outer is None else self.outer
            for move in plan.before:
                if move.again:
                    self.pinned.update(
                        dict.fromkeys(frame.waited(move.value, op.operands))
                    )
                self.move(frame, move, place, op)
            self.op(frame, op, plan, place)
            for move in plan.after:
                self.move(frame, move, place, op)

    def run(self, frame: Frame, assignment: Assignment) -> tuple[int, ...]:
        program, loop = frame.program, assignment.loop
        outermost = self.outer is None
        if loop:
            before, _, after = phases(program, loop.ops)
            self.ops(frame, assignment, before)
            accumulated(self, frame, assignment, loop)
            self.ops(frame, assignment, after)
        else:
            self.ops(frame, assignment, range(len(program.ops)))
        end = len(program.ops) if outermost else self.outer or 0
        for move in assignment.final:
            made = program.producer.get(move.value)
            self.move(frame, move, end, None if made is None else program.ops[made])
        return tuple(
            frame.get(v, layout)
            for v, layout in zip(program.outputs, assignment.outputs, strict=True)
        )

    def move(self, frame: Frame, move: Move, place: int, op: Op | None) -> None:
        now = frame.get(move.value, move.source)
        if move.again:
            self.pinned[now] = None
        for step in move.steps:
            # A product that gathers by itself has two shards at hand.
            passed = move.within == PASSED and step.kind == ALL_GATHER
            after = self.new(
                frame.program, move.value, step.source if passed else step.target
            )
            if passed:
                self.widen(after, IN_FLIGHT)
            role = ROLES.get(step.kind, OPAQUE)
            pairs = ((now, after),) if step.kind in OVERWRITES else ()
            self.emit(
                Instruction(
                    step.kind,
                    role,
                    (now,),
                    (after,),
                    frame.program,
                    place,
                    op,
                    step=step,
                    overwrites=pairs,
                    within=move.value if move.within else None,
                )
            )
            now = after
        frame.put(move.value, move.target, now)

    def op(self, frame: Frame, op: Op, plan: OpPlan, place: int) -> None:
        program = frame.program
        rule = None if op.programs else self.rule_of(program, op)
        wanted, given = boundary(program, op, plan, rule)
        reads = tuple(
            frame.get(v, layout) for v, layout in zip(op.operands, wanted, strict=True)
        )
        if op.kind == "remat2":
            self.inline(frame, op, plan, reads, given, place)
            return
        if op.kind in (BARRIER, REMATERIALIZE):
            for v, layout, read in zip(op.results, given, reads, strict=True):
                frame.put(v, layout, read)
            waits = (frame.versions.get(v, {}) for v in op.param.get(WAITS, ()))
            held = (buffer for versions in waits for buffer in versions.values())
            self.pinned.update(dict.fromkeys((*reads, *held)))
            return
        if renames(program, op):
            frame.put(op.results[0], given[0], reads[0])
            return
        writes = tuple(
            frame.put(v, layout, self.made(program, v, layout, plan))
            for v, layout in zip(op.results, given, strict=True)
        )
        if plan.staged:
            pipelined(self, program, op, plan, reads, writes, place)
            return
        bodies = tuple(
            self.body(op, number, inner_plan)
            for number, inner_plan in enumerate(
                plan.inner if op.local is None else [whole(op.local)]
            )
        )
        trips = op.param["length"] if op.kind == "scan" else 1
        values = program.operand_values(op)
        self.emit(
            Instruction(
                op.kind,
                OPAQUE if rule is None else role_of(op, rule),
                tuple(dict.fromkeys(reads)),
                writes,
                program,
                place,
                op,
                plan,
                rule,
                None,
                bodies,
                trips,
                overwrites(op, reads, writes),
                extended_bytes(rule, plan.choice, values, self.mesh) if rule else 0,
                known=self.knows(op, plan),
            )
        )

    def knows(self, op: Op, plan: OpPlan) -> bool:
        """Whether the compiler knows the literals that an op reads."""
        hidden = self.habits.hides_literals and plan.before
        return not any(m.again and m.value in op.operands for m in hidden or ())

    def made(self, program: Program, value: int, layout: Layout, plan: OpPlan) -> int:
        """A buffer for a result: of one that the op scatters by itself, two shards."""
        for move in plan.after:
            if move.within and (move.value, move.source) == (value, layout):
                return self.widen(self.new(program, value, move.target), IN_FLIGHT)
        return self.new(program, value, layout)

    def widen(self, buffer: int, times: int) -> int:
        """``buffer``, so many times as large."""
        held = self.buffers[buffer]
        self.buffers[buffer] = replace(held, num_bytes=times * held.num_bytes)
        return buffer

    def inline(
        self,
        frame: Frame,
        op: Op,
        plan: OpPlan,
        reads: tuple[int, ...],
        given: tuple[Layout, ...],
        place: int,
    ) -> None:
        (body,), (inner,) = op.programs, plan.inner
        inside = self.enter(body, inner)
        for v, layout, read in zip(body.inputs, inner.inputs, reads, strict=True):
            inside.put(v, layout, read)
        before, self.outer = self.outer, place
        outs = self.run(inside, inner)
        self.outer = before
        for v, layout, buffer in zip(op.results, given, outs, strict=True):
            frame.put(v, layout, buffer)

    def inside(self) -> Unfolding:
        """Buffers of their own, of a body."""
        return Unfolding(self.mesh, self.rule_of, self.habits)

    def body(
        self, op: Op, number: int, assignment: Assignment, added_up: bool = False
    ) -> Unfolded:
        """A body of a loop or branch, in buffers of its own.

        ``added_up``: what it stacks may be terms, added to those of other ticks.
        """
        program = op.local or op.programs[number]
        work = self.inside()
        frame = work.enter(program, assignment)
        inputs = tuple(
            frame.put(v, layout)
            for v, layout in zip(program.inputs, assignment.inputs, strict=True)
        )
        whole = len(inputs)
        if op.kind == "scan":
            whole = op.param["num_consts"] + op.param["num_carry"]
        for position in range(whole, len(inputs)):
            # The input is the stack; what the body reads is its slice.
            value, layout = program.inputs[position], assignment.inputs[position]
            part = frame.put(value, layout)
            work.emit(
                Instruction(TAKE, FUSED, (inputs[position],), (part,), program, 0)
            )
        outputs = work.run(frame, assignment)
        same, kept = carries(op, number), len(outputs)
        if op.kind == "scan":
            kept = op.param["num_carry"]
        if added_up:
            totals = with_totals(work, program, assignment, outputs[kept:])
            outputs = (*outputs[:kept], *totals)
        instructions = with_stores(work.instructions, outputs[kept:], program)
        plain = Unfolded(
            tuple(work.buffers),
            instructions,
            inputs,
            outputs[:kept],
            same,
            tuple(work.pinned),
        )
        return simplified(plain, self.habits)
