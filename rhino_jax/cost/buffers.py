"""What a plan becomes on one device: buffers, and the instructions between them.

A Program under an Assignment is unfolded into a flat list: every op on its shard,
every step of every move. A *buffer* is one version of a value (a value and its gathered
copy are two). What only renames memory (a reshape, a transpose: compilers choose the
layout so that it costs nothing) makes no buffer of its own. Bodies of remat are
unfolded in place; a body of a loop or branch is unfolded once, beside its instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from rhino_jax.cost.reshard import local_bytes
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary
from rhino_jax.ir.factors import PARALLEL, POSITIONAL, REDUCTION, Rule
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Where
from rhino_jax.ir.steps import ALL_REDUCE, EMBED, MASK, SLICE, Move, Step

RuleOf = Callable[[Program, Op], Rule]

FUSED, REDUCING, OPAQUE = "fused", "reducing", "opaque"
"""Roles. Compilers make a *fused* instruction part of those that read it; a *reducing*
one swallows what it reads but writes its result; an *opaque* one reads and writes."""

RENAMING = frozenset(("reshape", "squeeze", "transpose", "expand_dims", "copy_p"))
_RESIZING = frozenset(("broadcast_in_dim", "reduce_sum", "reduce_max", "reduce_min"))
"""These rename too where they neither add nor drop anything but dimensions of 1."""
BARRIER = "optimization_barrier"
STORE, TAKE = "store", "take"
"""A body's slice written to a stacked output, and read from a stacked input."""

_ROLES: Mapping[str, str] = {
    **dict.fromkeys((SLICE, MASK, EMBED, STORE, TAKE), FUSED),
    **dict.fromkeys(
        "slice pad concatenate rev tile stack unstack split gather dynamic_slice "
        "select_n iota broadcast_in_dim".split(),
        FUSED,
    ),
    **dict.fromkeys(("argmax", "argmin", "reduce_prod", "reduce"), REDUCING),
    # Elementwise by their rules, but drawn by kernels of their own.
    **dict.fromkeys(
        "random_bits random_split random_seed random_fold_in threefry2x32 "
        "rng_bit_generator rng_uniform".split(),
        OPAQUE,
    ),
    **dict.fromkeys(("dot_general", "conv_general_dilated", "ragged_dot"), OPAQUE),
}
PARTIAL_READERS = frozenset(
    (SLICE, TAKE, "slice", "gather", "dynamic_slice", "split", "unstack")
)
"""These read no more of an operand than they make."""

_OVERWRITES = frozenset((ALL_REDUCE, "dynamic_update_slice"))


@dataclass(frozen=True)
class Buffer:
    """One version of a value on one device."""

    value: int
    num_bytes: int
    name: str = ""


@dataclass(frozen=True)
class Instruction:
    """One op on its shard, or one step of a move.

    ``reads`` and ``writes`` are numbers of buffers. ``bodies`` run ``trips`` times;
    of several (branches) one. ``overwrites`` are pairs (read, written) that may be one
    memory if what is read is not needed afterwards.
    """

    kind: str
    role: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    program: Program
    index: int
    op: Op | None = None
    plan: OpPlan = field(default=OpPlan(), repr=False)
    rule: Rule | None = field(default=None, repr=False)
    step: Step | None = None
    bodies: tuple[Unfolded, ...] = field(default=(), repr=False)
    trips: int = 1
    overwrites: tuple[tuple[int, int], ...] = ()

    @property
    def where(self) -> Where:
        return self.op.where if self.op else Where()


@dataclass(frozen=True)
class Unfolded:
    """Buffers and instructions of one Program, its inputs' and outputs' buffers.

    ``same``: pairs (input, output) of positions that are one memory, one after the
    other: a loop's carries, donated inputs.
    """

    buffers: tuple[Buffer, ...]
    instructions: tuple[Instruction, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    same: tuple[tuple[int, int], ...] = ()
    pinned: tuple[int, ...] = ()
    """Buffers that a barrier reads: they are written, whatever reads them."""

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Buffer -> the instructions that read it."""
        found: list[list[int]] = [[] for _ in self.buffers]
        for index, instruction in enumerate(self.instructions):
            for buffer in dict.fromkeys(instruction.reads):
                found[buffer].append(index)
        return tuple(map(tuple, found))


def unfold(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    rule_of: RuleOf,
    donated: tuple[int, ...] = (),
) -> Unfolded:
    """``program`` as one device carries it out. Linear in ops and moves.

    ``donated`` are positions of inputs whose memory an output of the same shape, dtype
    and layout takes over.
    """
    work = _Unfolding(mesh, rule_of)
    frame = work.enter(program, assignment)
    inputs = tuple(
        frame.put(v, layout)
        for v, layout in zip(program.inputs, assignment.inputs, strict=True)
    )
    outputs = work.run(frame, assignment)
    return Unfolded(
        tuple(work.buffers),
        tuple(work.instructions),
        inputs,
        outputs,
        _donations(program, assignment, donated),
        tuple(work.pinned),
    )


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
class _Frame:
    """The versions of the values of one Program while it is unfolded."""

    work: _Unfolding
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


@dataclass
class _Unfolding:
    mesh: Mesh
    rule_of: RuleOf
    buffers: list[Buffer] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    pinned: dict[int, None] = field(default_factory=dict)
    outer: int | None = None
    """The op of the outermost Program that a remat body belongs to."""

    def enter(self, program: Program, assignment: Assignment) -> _Frame:
        assert len(program.ops) == len(assignment.ops), "an assignment of other ops"
        return _Frame(self, program)

    def new(self, program: Program, value: int, layout: Layout) -> int:
        v = program.values[value]
        size = local_bytes(v.shape, v.dtype, layout, self.mesh)
        self.buffers.append(Buffer(value, size, v.name or f"%{value} {v}"))
        return len(self.buffers) - 1

    def constant(self, program: Program, value: int) -> int:
        self.buffers.append(Buffer(value, 0, str(program.values[value])))
        return len(self.buffers) - 1

    def emit(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)

    def run(self, frame: _Frame, assignment: Assignment) -> tuple[int, ...]:
        program = frame.program
        outermost = self.outer is None
        for index, (op, plan) in enumerate(
            zip(program.ops, assignment.ops, strict=True)
        ):
            place = index if self.outer is None else self.outer
            for move in plan.before:
                self.move(frame, move, place, op)
            self.op(frame, op, plan, place)
            for move in plan.after:
                self.move(frame, move, place, op)
        end = len(program.ops) if outermost else self.outer or 0
        for move in assignment.final:
            made = program.producer.get(move.value)
            self.move(frame, move, end, None if made is None else program.ops[made])
        return tuple(
            frame.get(v, layout)
            for v, layout in zip(program.outputs, assignment.outputs, strict=True)
        )

    def move(self, frame: _Frame, move: Move, place: int, op: Op | None) -> None:
        now = frame.get(move.value, move.source)
        if move.again:
            self.pinned[now] = None
        for step in move.steps:
            after = self.new(frame.program, move.value, step.target)
            role = _ROLES.get(step.kind, OPAQUE)
            pairs = ((now, after),) if step.kind in _OVERWRITES else ()
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
                )
            )
            now = after
        frame.put(move.value, move.target, now)

    def op(self, frame: _Frame, op: Op, plan: OpPlan, place: int) -> None:
        program = frame.program
        rule = None if op.programs else self.rule_of(program, op)
        wanted, given = boundary(program, op, plan, rule)
        reads = tuple(
            frame.get(v, layout) for v, layout in zip(op.operands, wanted, strict=True)
        )
        if op.kind == "remat2":
            self.inline(frame, op, plan, reads, given, place)
            return
        if op.kind == BARRIER:
            for v, layout, read in zip(op.results, given, reads, strict=True):
                frame.put(v, layout, read)
            self.pinned.update(dict.fromkeys(reads))
            return
        if _renames(program, op):
            frame.put(op.results[0], given[0], reads[0])
            return
        writes = tuple(
            frame.put(v, layout) for v, layout in zip(op.results, given, strict=True)
        )
        bodies = tuple(
            self.body(op, number, inner_plan)
            for number, inner_plan in enumerate(plan.inner)
        )
        trips = op.param["length"] if op.kind == "scan" else 1
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
                _overwrites(op, reads, writes),
            )
        )

    def inline(
        self,
        frame: _Frame,
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

    def body(self, op: Op, number: int, assignment: Assignment) -> Unfolded:
        """A body of a loop or branch, in buffers of its own."""
        program = op.programs[number]
        work = _Unfolding(self.mesh, self.rule_of)
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
        same, kept = _carries(op, number), len(outputs)
        if op.kind == "scan":
            kept = op.param["num_carry"]
        instructions = _with_stores(work.instructions, outputs[kept:], program)
        return Unfolded(
            tuple(work.buffers),
            instructions,
            inputs,
            outputs[:kept],
            same,
            tuple(work.pinned),
        )


def _renames(program: Program, op: Op) -> bool:
    """Whether the result is the first operand's memory under another shape."""
    if op.kind in RENAMING:
        return True
    if op.kind not in _RESIZING or not program.values[op.operands[0]].shape:
        return False
    (read, *_), (made,) = program.operand_values(op), program.result_values(op)
    return read.size == made.size


def _with_stores(
    instructions: list[Instruction], stacked: tuple[int, ...], program: Program
) -> tuple[Instruction, ...]:
    """Each stacked output is written to its place as soon as it is there."""
    waiting = set(stacked)
    result: list[Instruction] = []
    made = {w for instruction in instructions for w in instruction.writes}
    for buffer in sorted(waiting - made):
        result.append(Instruction(STORE, FUSED, (buffer,), (), program, 0))
    for instruction in instructions:
        result.append(instruction)
        for buffer in instruction.writes:
            if buffer in waiting:
                place = instruction.index
                store = Instruction(STORE, FUSED, (buffer,), (), program, place)
                result.append(store)
    return tuple(result)


def _carries(op: Op, number: int) -> tuple[tuple[int, int], ...]:
    """Positions (input, output) of the carries of body ``number`` of ``op``."""
    if op.kind == "scan":
        first, count = op.param["num_consts"], op.param["num_carry"]
    elif op.kind == "while" and number == 1:
        first, count = op.param["body_nconsts"], len(op.results)
    else:
        return ()
    return tuple((first + i, i) for i in range(count))


def _overwrites(
    op: Op, reads: tuple[int, ...], writes: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if op.kind == "scan":
        first, count = op.param["num_consts"], op.param["num_carry"]
    elif op.kind == "while":
        first = op.param["cond_nconsts"] + op.param["body_nconsts"]
        count = len(writes)
    elif op.kind in _OVERWRITES or op.kind.startswith("scatter"):
        first, count = 0, 1
    else:
        return ()
    return tuple(zip(reads[first : first + count], writes[:count], strict=True))


def role_of(op: Op, rule: Rule) -> str:
    """Whether compilers fuse ``op``: by the table, else by what its rule says.

    An op without reductions whose operands' factors all stand in its results works
    element by element.
    """
    known = _ROLES.get(op.kind)
    if known:
        return known
    kinds = {factor.kind for factor in rule.factors}
    if op.kind.startswith("reduce_") and not op.kind.startswith("reduce_window"):
        return FUSED if op.kind == "reduce_precision" else REDUCING
    if kinds <= {PARALLEL, POSITIONAL} and len(rule.results) == 1:
        made = {name for dim in rule.results[0] for name in dim}
        read = {name for dims in rule.operands for dim in dims for name in dim}
        return FUSED if read <= made else OPAQUE
    return REDUCING if kinds == {REDUCTION} else OPAQUE
