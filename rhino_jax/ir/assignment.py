"""How one Program is carried out on a mesh: a choice and its moves for every op.

An :class:`Assignment` is complete: reading it needs no search and no guessing. Every
value has the layout its producer's choice gives it; where an op wants an operand in
another layout, a :class:`~rhino_jax.ir.steps.Move` before the op says how it gets
there. A moved value stays at hand beside the original, so later ops may read either,
until the same move is written again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from rhino_jax.ir.depends import backward
from rhino_jax.ir.factors import Choice, Rule, layouts
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TIME, Axis, Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.staged import Staged, lifts
from rhino_jax.ir.steps import Move

FALLBACK = "fallback"


@dataclass(frozen=True)
class OpPlan:
    """What is done for one op: moves of its operands, its choice, moves of results.

    ``inner`` holds one Assignment per nested Program. ``note`` is empty for an op
    with a rule of its own, and says so when the op runs whole for want of one.
    ``staged``: of a scan whose layers are divided among pipeline stages, how; the
    moves ``handed`` then bring what its body gives to the next stage, in every tick.
    """

    choice: Choice = Choice()
    before: tuple[Move, ...] = ()
    after: tuple[Move, ...] = ()
    inner: tuple[Assignment, ...] = ()
    note: str = ""
    staged: Staged | None = None
    handed: tuple[Move, ...] = ()


def trips_of(op: Op, plan: OpPlan) -> int:
    """How often the bodies of ``op`` run; a ``while`` counts as one trip."""
    if op.kind != "scan":
        return 1
    length: int = op.param["length"]
    staged = plan.staged
    return staged.ticks * staged.turns(length) if staged else length


@dataclass(frozen=True)
class Loop:
    """The accumulation loop: some ops of a Program run once for every microbatch.

    ``ops`` are their indices. When the loop ends, the ``leave`` moves bring what is
    read after it there: over the time axis terms are summed (an all-reduce) and rows
    put together again (an all-gather), for no bytes; behind that stand moves over
    other axes. A value that is the same in every turn leaves by a move of no steps.
    """

    ops: tuple[int, ...]
    trips: int
    leave: tuple[Move, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """Layouts of a Program's inputs and outputs, and an :class:`OpPlan` per op.

    ``final`` moves bring the outputs to their layouts. Where there is a ``loop``, what
    it needs runs before it, its ops in it, and all else after it (:func:`phases`).
    """

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    ops: tuple[OpPlan, ...]
    final: tuple[Move, ...] = ()
    loop: Loop | None = None

    def over(self, mesh: Mesh) -> Mesh:
        """``mesh`` and, where there is a loop over microbatches or a pipelined one, the
        time axis that layouts here name."""
        for staged in self.staged:
            return staged.over(mesh)
        if self.loop is None or TIME in mesh.names:
            return mesh
        return Mesh((*mesh.axes, Axis(TIME, self.loop.trips)))

    @property
    def staged(self) -> tuple[Staged, ...]:
        """How scans are cut in pipeline stages, one for each that is."""
        return tuple(plan.staged for plan in self.ops if plan.staged)

    def moves(self) -> Iterator[Move]:
        """Every move of this Program in order, nested Programs excluded."""
        for op in self.ops:
            yield from op.before
            yield from op.after
        if self.loop:
            yield from self.loop.leave
        yield from self.final


def whole(program: Program) -> Assignment:
    """Every value whole, and nothing moved."""

    def places(values: tuple[int, ...]) -> tuple[Layout, ...]:
        return tuple(Layout.replicated(len(program.values[v].shape)) for v in values)

    plans = tuple(OpPlan(inner=tuple(map(whole, op.programs))) for op in program.ops)
    return Assignment(places(program.inputs), places(program.outputs), plans)


def phases(
    program: Program, loop: Collection[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Op indices before, in and after an accumulation loop of the ops ``loop``.

    Before it stands only what it needs: what it does not need would be held across it.
    Ops that nothing depends on are in no phase.
    """
    inside = set(loop)
    read = {v for i in inside for v in program.ops[i].operands}
    before = []
    for index in reversed(range(len(program.ops))):
        op = program.ops[index]
        if index not in inside and not read.isdisjoint(op.results):
            before.append(index)
            read.update(op.operands)
    ahead = set(before)
    rest = (i for i in sorted(live_ops(program)) if i not in inside | ahead)
    return tuple(reversed(before)), tuple(sorted(inside)), tuple(rest)


def live_ops(program: Program) -> frozenset[int]:
    """The ops that an output depends on, or that have effects."""
    seen = (v for op in program.ops if op.effects for v in op.operands)
    needed = backward(program, (*program.outputs, *seen))
    return frozenset(
        i
        for i, op in enumerate(program.ops)
        if op.effects or not needed.isdisjoint(op.results)
    )


def boundary(
    program: Program, op: Op, plan: OpPlan, rule: Rule | None
) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    """The layouts in which ``op`` wants its operands and gives its results.

    Control flow takes them from its bodies: a scan's stacked inputs and outputs are
    its body's with a whole leading dimension, a branch's are its branches'.
    """
    if not op.programs:
        assert rule is not None, f"no rule for {op.kind}"
        return layouts(rule, plan.choice)
    return _BOUNDARY[op.kind](program, op, plan)


Boundary = tuple[tuple[Layout, ...], tuple[Layout, ...]]


def _scan(program: Program, op: Op, plan: OpPlan) -> Boundary:
    (body,) = plan.inner
    entering, leaving = lifts(op, plan.staged)
    return (
        tuple(lift(x) for lift, x in zip(entering, body.inputs, strict=True)),
        tuple(lift(y) for lift, y in zip(leaving, body.outputs, strict=True)),
    )


def _while(program: Program, op: Op, plan: OpPlan) -> Boundary:
    cond, body = plan.inner
    split = op.param["cond_nconsts"]
    consts = op.param["body_nconsts"]
    return cond.inputs[:split] + body.inputs, body.inputs[consts:]


def _cond(program: Program, op: Op, plan: OpPlan) -> Boundary:
    first = plan.inner[0]
    return (Layout.replicated(0), *first.inputs), first.outputs


def _call(program: Program, op: Op, plan: OpPlan) -> Boundary:
    (body,) = plan.inner
    return body.inputs, body.outputs


def waited_for(program: Program, value: int, beside: Iterable[int]) -> int | None:
    """What the barrier of a move that is made again waits for, of values ``beside``.

    The largest other operand of the op that reads ``value`` (a cotangent, for a weight
    that is gathered again); None where there is no other.
    """
    others = (v for v in beside if v != value)
    return max(others, key=lambda v: program.values[v].size, default=None)


_BOUNDARY = {"scan": _scan, "while": _while, "cond": _cond, "remat2": _call}
