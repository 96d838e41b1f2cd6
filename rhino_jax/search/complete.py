"""A complete plan from the layouts of inputs and outputs: follow, op by op.

This is the plan a person writes when they place the parameters and the batch: every
op follows what it reads (:mod:`rhino_jax.search.follow`), partial values are settled
where a second reader or a non-linear op wants them, and moves are written where
layouts differ. No op is weighed against one far away; that is the search's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from rhino_jax.ir.analysis.loops import accumulators
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary
from rhino_jax.ir.factors import Rule
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import STAGE, Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.staged import Staged, lifts
from rhino_jax.ir.steps import Move
from rhino_jax.rules import note_of, rule_of
from rhino_jax.search.follow import choose, rows_over
from rhino_jax.search.hints import backward_hints, pulled, rows_of_slices
from rhino_jax.search.specs import pin_of, spec_beside
from rhino_jax.search.state import Marks, State

RUNS = 4


@dataclass(frozen=True)
class Request:
    """What is given of one Program: its boundary, the mesh, and the axes' roles.

    An output that is None is given as it comes: settled, or still partial where
    ``may_stay_partial`` says so. ``added_up``: outputs that someone adds up later, so
    that it is worth to leave a sum partial for longer than its own loop. ``named`` pins
    values by name: per dimension the axes that split it. ``used``: inputs (positions)
    that are brought to another layout before their first use. ``staged``: scans (ops)
    that are pipelined.
    """

    mesh: Mesh
    data_axes: tuple[str, ...]
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout | None, ...]
    marks: tuple[Marks, ...] = ()
    hints: tuple[Layout | None, ...] = ()
    may_stay_partial: frozenset[int] = frozenset()
    added_up: frozenset[int] = frozenset()
    expert_axes: frozenset[str] = frozenset()
    named: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    used: Mapping[int, Layout] = field(default_factory=dict)
    staged: Mapping[int, Staged] = field(default_factory=dict)


@dataclass(frozen=True)
class Completed:
    """A complete Assignment, what every value was read as, and the layouts wished
    for open inputs (by position)."""

    assignment: Assignment
    reads: Mapping[int, frozenset[Layout]]
    wishes: Mapping[int, Layout]


def complete(program: Program, request: Request) -> Completed:
    """Choices and moves for every op of ``program``.

    Runs again, a few times at most, while values are found that every reader only
    slices: these are made as those slices in the next, where readers may slice more.
    """
    goals = request.hints or request.outputs
    seeds = {
        value: goal
        for value, goal in zip(program.outputs, goals, strict=True)
        if goal is not None
    }
    sliced: dict[int, Layout] = {}
    for _ in range(RUNS):
        hints = backward_hints(program, {**sliced, **seeds}, request.mesh)
        done = _Run(program, request, hints).run()
        found = pulled(program, done.reads, done.assignment, request.mesh)
        if found.items() <= sliced.items():
            break
        sliced.update(found)
    return done


class _Run:
    """One pass over one Program, in order."""

    def __init__(
        self, program: Program, request: Request, hints: Mapping[int, Layout]
    ) -> None:
        self.program = program
        self.request = request
        marks = request.marks or (Marks(),) * len(program.inputs)
        self.state = State(
            program,
            request.mesh,
            dict(zip(program.inputs, marks, strict=True)),
            hints,
            expert_axes=request.expert_axes,
            rows=rows_of_slices(program),
        )
        for i, (value, layout) in enumerate(
            zip(program.inputs, request.inputs, strict=True)
        ):
            self.state.store(value, layout, request.used.get(i, layout))
        self.reads: dict[int, set[Layout]] = {}
        self.staged = {program.ops[i].results: x for i, x in request.staged.items()}

    def run(self) -> Completed:
        plans = tuple(self._op(op) for op in self.program.ops)
        final: list[Move] = []
        outputs = []
        for i, value in enumerate(self.program.outputs):
            goal = self.request.outputs[i]
            home = self.state.home(value)
            if goal is None:
                stays = i in self.request.may_stay_partial
                goal = home if stays else self._settled_goal(value)
            final += self._read(value, goal, "final")
            outputs.append(goal)
        assignment = Assignment(
            self.request.inputs, tuple(outputs), plans, tuple(final)
        )
        reads = {v: frozenset(seen) for v, seen in self.reads.items()}
        return Completed(assignment, reads, self._wishes())

    def _wishes(self) -> Mapping[int, Layout]:
        """Wishes for open inputs, carried up from the values that were read."""
        if not self.state.wishes:
            return {}
        found = backward_hints(self.program, self.state.wishes, self.request.mesh)
        marks = self.request.marks or (Marks(),) * len(self.program.inputs)
        return {
            i: found[v].without(set(found[v].axes) - mark.open)
            for i, (v, mark) in enumerate(zip(self.program.inputs, marks, strict=True))
            if mark.open and v in found and mark.open.intersection(found[v].axes)
        }

    def _read(self, value: int, layout: Layout, region: str) -> tuple[Move, ...]:
        self.reads.setdefault(value, set()).add(layout)
        return self.state.read(value, layout, region)

    def _op(self, op: Op) -> OpPlan:
        if op.programs:
            return self._finish(op, None, CONTROL[op.kind](self, op))
        rule = rule_of(self.program, op)
        choice = choose(self.state, op, rule, self.request.data_axes)
        return self._finish(op, rule, OpPlan(choice, note=note_of(op)))

    def _finish(self, op: Op, rule: Rule | None, plan: OpPlan) -> OpPlan:
        """Write the moves of operands and results, and note what came out."""
        wanted, given = boundary(self.program, op, plan, rule)
        region = "backward" if "transpose(" in op.where.name_stack else "forward"
        for value, layout in zip(op.operands, wanted, strict=True):
            self.state.wish(value, layout)
        before = [
            move
            for value, layout in zip(op.operands, wanted, strict=True)
            for move in self._read(value, layout, region)
        ]
        self._mark_results(op)
        after = []
        for value, layout in zip(op.results, given, strict=True):
            self.state.put(value, layout)
            pin = self._pin(op, value, layout)
            if pin is not None:
                if pin != layout:
                    after.append(self.state.settle(value, pin))
            elif layout.partial and not self._may_flow_on(value, layout):
                after.append(self.state.settle(value, self._settled_goal(value)))
        return replace(plan, before=tuple(before), after=tuple(after))

    def _pin(self, op: Op, value: int, here: Layout) -> Layout | None:
        """The layout that the user fixed for what an op gives, if it lies ``here``."""
        shape, mesh = self.program.values[value].shape, self.request.mesh
        spec = pin_of(op, shape, self.request.named, mesh)
        return None if spec is None else spec_beside(spec, shape, mesh, here)

    def _mark_results(self, op: Op) -> None:
        marks = [self.state.mark(v) for v in op.operands]
        batch = any(m.batch for m in marks)
        arrays = [
            m
            for m, v in zip(marks, op.operands, strict=True)
            if self.program.values[v].shape
        ]
        keep: frozenset[str] = frozenset()
        still: frozenset[str] = frozenset()
        if arrays and not batch:
            keep = frozenset.intersection(*(m.keep for m in arrays))
            still = frozenset.intersection(*(m.open for m in arrays))
        for value in op.results:
            self.state.marks[value] = Marks(batch, keep, open=still)

    def _settled_goal(self, value: int) -> Layout:
        """Where a partial value is brought: the wished layout, or all-reduced."""
        home = self.state.home(value)
        goal = home.settled()
        hint = self.state.hints.get(value)
        if hint is None:
            return goal
        for axis, operator in home.partial:
            where = hint.find(axis)
            if where and operator == "sum":
                tried = goal.with_split(*where)
                shape = self.program.values[value].shape
                if not tried.problems(shape, self.request.mesh):
                    goal = tried
        return goal

    def _may_flow_on(self, value: int, layout: Layout) -> bool:
        """A partial value stays so when its one reader is linear in it."""
        uses = self.program.uses.get(value, ())
        is_output = value in self.program.outputs
        if is_output and not uses:
            index = self.program.outputs.index(value)
            return index in self.request.may_stay_partial
        if is_output or len(uses) != 1:
            return False
        reader = self.program.ops[uses[0]]
        if reader.programs or reader.operands.count(value) != 1:
            return False
        position = reader.operands.index(value)
        rule = rule_of(self.program, reader)
        return all(
            any(
                flow.operator == operator
                and position in flow.operands
                and self._others_may_flow(reader, flow.operands, position, axis)
                for flow in rule.flows
            )
            for axis, operator in layout.partial
        )

    def is_added_up(self, value: int) -> bool:
        """Whether ``value``, partial over data, can stay so until it is added up.

        Every op up to there is linear in it. What reaches no accumulator is better
        settled at once: whole terms take more memory than their scattered sum.
        """
        program = self.program
        while value not in program.outputs:
            term = Layout.replicated(len(program.values[value].shape))
            for axis in self._batch_axes:
                term = term.with_partial(axis, "sum")
            if not term.partial or not self._may_flow_on(value, term):
                return False
            value, *others = program.ops[program.uses[value][0]].results
            if others:
                return False
        return (
            program.outputs.count(value) == 1
            and value not in program.uses
            and program.outputs.index(value) in self.request.added_up
        )

    @cached_property
    def _batch_axes(self) -> tuple[str, ...]:
        """The data axes that split some of the batch: gradients are partial there."""
        split = {
            axis
            for value in self.program.inputs
            if self.state.mark(value).batch
            for axis in self.state.home(value).split_axes
        }
        return tuple(axis for axis in self.request.data_axes if axis in split)

    def _others_may_flow(
        self, reader: Op, operands: tuple[int, ...], position: int, axis: str
    ) -> bool:
        for i in operands:
            value = reader.operands[i]
            if i == position or self.state.mark(value).free:
                continue
            if value in self.state.homes:
                if self.state.home(value).operator(axis) is None:
                    return False
            elif self.program.values[value].literal is not None:
                return False
        return True


def _body(run: _Run, program: Program, request: Request) -> Completed:
    return complete(program, request)


def _entering(run: _Run, values: tuple[int, ...]) -> tuple[Layout, ...]:
    return tuple(run.state.home(v).settled() for v in values)


def _marks(run: _Run, values: tuple[int, ...]) -> tuple[Marks, ...]:
    return tuple(run.state.mark(v) for v in values)


def _added_up(run: _Run, op: Op) -> frozenset[int]:
    return frozenset(i for i, v in enumerate(op.results) if run.is_added_up(v))


def _call(run: _Run, op: Op) -> OpPlan:
    """Rematerialization: inputs as they come, outputs as they come."""
    (program,) = op.programs
    request = replace(
        run.request,
        used={},
        staged={},
        inputs=_entering(run, op.operands),
        outputs=(None,) * len(op.results),
        marks=_marks(run, op.operands),
        hints=tuple(run.state.hints.get(v) for v in op.results),
        may_stay_partial=frozenset(range(len(op.results))),
        added_up=_added_up(run, op),
    )
    done = _body(run, program, request)
    for i, layout in done.wishes.items():
        run.state.wish(op.operands[i], layout)
    return OpPlan(inner=(done.assignment,))


def _cond(run: _Run, op: Op) -> OpPlan:
    """Every branch gives what the first one gives."""
    inner = []
    outputs: tuple[Layout | None, ...] = (None,) * len(op.results)
    for program in op.programs:
        request = replace(
            run.request,
            used={},
            staged={},
            inputs=_entering(run, op.operands[1:]),
            outputs=outputs,
            marks=_marks(run, op.operands[1:]),
            hints=tuple(run.state.hints.get(v) for v in op.results),
            may_stay_partial=frozenset(),
            added_up=frozenset(),
        )
        done = _body(run, program, request).assignment
        outputs = tuple(done.outputs)
        inner.append(done)
    return OpPlan(inner=tuple(inner))


def _while(run: _Run, op: Op) -> OpPlan:
    split, consts = op.param["cond_nconsts"], op.param["body_nconsts"]
    carry = _entering(run, op.operands[split + consts :])
    marks = _marks(run, op.operands)
    base = replace(
        run.request,
        used={},
        staged={},
        hints=(),
        may_stay_partial=frozenset(),
        added_up=frozenset(),
    )
    test = replace(
        base,
        inputs=_entering(run, op.operands[:split]) + carry,
        outputs=(Layout.replicated(0),),
        marks=marks[:split] + marks[split + consts :],
    )
    body = replace(
        base,
        inputs=_entering(run, op.operands[split : split + consts]) + carry,
        outputs=carry,
        marks=marks[split:],
    )
    done = [
        _body(run, program, request).assignment
        for program, request in zip(op.programs, (test, body), strict=True)
    ]
    return OpPlan(inner=tuple(done))


def _scan(run: _Run, op: Op) -> OpPlan:
    """Find carries that come out as they go in, and moves that leave the loop."""
    (program,) = op.programs
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    marks = list(_marks(run, op.operands))
    staged = run.staged.get(op.results)
    lifted, _ = lifts(op, staged)
    entering = list(_entering(run, op.operands))
    for i in range(consts + carry, len(entering)):
        shape = run.program.values[op.operands[i]].shape
        entering[i] = _slice(entering[i], shape, marks[i].batch, run.request.mesh)
    if staged:
        entering = [layout.without((STAGE,)) for layout in entering]
    batch = any(m.batch for m in marks)
    sums = accumulators(program, consts, carry)
    late = frozenset(i for i in _added_up(run, op) if i >= carry)
    # A stack of scalars is settled in one collective behind the loop.
    scalars = frozenset(
        i for i, v in enumerate(program.outputs) if not program.values[v].shape
    )
    stays = late | (scalars - frozenset(range(carry)))
    for i in range(carry):
        at = consts + i
        marks[at] = replace(marks[at], batch=marks[at].batch or batch)
    hints = [run.state.hints.get(v) for v in op.results]
    stacked = tuple(
        h.dropped_first().without((STAGE,)) if h else None for h in hints[carry:]
    )
    request = replace(
        run.request,
        used={},
        staged={},
        inputs=tuple(entering),
        outputs=(None,) * len(program.outputs),
        marks=tuple(replace(m, free=i - consts in sums) for i, m in enumerate(marks)),
        hints=(*(None,) * carry, *stacked),
        may_stay_partial=sums | stays,
        added_up=sums | late,
    )
    for _ in range(4):
        done = _body(run, program, request)
        inputs = list(request.inputs)
        for i in range(carry):
            out = done.assignment.outputs[i]
            start = run.state.home(op.operands[consts + i])
            if run.state.cost(op.operands[consts + i], start, out) == 0:
                inputs[consts + i] = out
        for i in range(consts):
            inputs[i] = _hoisted(program, done, i, inputs[i])
        same = tuple(inputs) == request.inputs
        request = replace(request, inputs=tuple(inputs), marks=tuple(marks))
        if same:
            break
    forced = request.inputs[consts : consts + carry]
    terms = frozenset(i for i, x in enumerate(forced) if x.partial)
    request = replace(
        request,
        outputs=(*forced, *(None,) * (len(program.outputs) - carry)),
        hints=(*forced, *stacked),
        may_stay_partial=terms | stays,
        added_up=terms | late,
    )
    done = _body(run, program, request)
    for i, layout in done.wishes.items():
        run.state.wish(op.operands[i], lifted[i](layout))
    return OpPlan(inner=(done.assignment,), staged=staged)


def _slice(stack: Layout, shape: tuple[int, ...], batch: bool, mesh: Mesh) -> Layout:
    """How one slice of a scanned value enters the loop: the scanned dimension is whole.

    Where that dimension held the split of a batch, the slice's own rows take it.
    """
    one = stack.dropped_first()
    if not batch or not one.rank or one.dims[0]:
        return one
    rows = rows_over(shape[1], (s.axis for s in stack.dims[0]), mesh)
    return replace(one, dims=(rows, *one.dims[1:]))


def _hoisted(program: Program, done: Completed, index: int, now: Layout) -> Layout:
    """A loop constant that every reader wants elsewhere enters the loop there."""
    wanted = done.reads.get(program.inputs[index], frozenset())
    if len(wanted) == 1:
        (target,) = wanted
        return target if not target.partial else now
    return now


CONTROL = {"scan": _scan, "while": _while, "cond": _cond, "remat2": _call}
