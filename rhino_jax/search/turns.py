"""The time digit followed through ops and bodies: how each runs in one turn.

A turn of the accumulation loop works on one microbatch and does not know of the others:
it has its own rows of every value that carries examples, and terms of what is summed
over them. Layouts and choices here are those over the time axis alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rhino_jax.ir.analysis.batch import WHOLE
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary
from rhino_jax.ir.factors import (
    Choice,
    Rule,
    choice_problems,
    follow,
    layouts,
)
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of

Path = tuple[int, ...]
"""Where a nested Program is: op index and number of the body, outermost first."""


def is_split(layout: Layout) -> bool:
    return bool(layout.split_axes)


def whole_layout(value: Value) -> Layout:
    return Layout.replicated(len(value.shape))


def readable(now: Layout, wanted: Layout) -> bool:
    """Whether one turn can read as ``wanted`` what it has as ``now``: its own rows of
    a whole value, a whole value as a term that counts in the first turn only."""
    return now == wanted or not now.axes


class Mixed(Exception):
    """An op needs operands as no single turn has them.

    ``operands`` are positions of those that it would need settled or whole; ``where``
    is the op, if it is one of a nested Program.
    """

    def __init__(self, op: Op, operands: Iterable[int], how: str) -> None:
        super().__init__(how)
        self.op, self.operands, self.how = op, tuple(operands), how


# ---- one op, one body ---------------------------------------------------------------


@dataclass
class Walk:
    """Follows the time digit. ``hints``: layouts that all readers want, by Program."""

    mesh: Mesh
    hints: dict[Path, dict[int, Layout]] = field(default_factory=dict)

    def hint(self, path: Path, value: int) -> Layout | None:
        return self.hints.get(path, {}).get(value)

    def op(
        self,
        path: Path,
        program: Program,
        op: Op,
        given: Sequence[Layout],
        last: Collection[int] = (),
        masks: bool = True,
    ) -> OpPlan:
        """How ``op`` is carried out in one turn. Raises :class:`Mixed`.

        ``path`` leads to the op. ``last`` are operands that others' digits go before.
        ``masks``: a whole operand may count as a term in the first turn.
        """
        if op.programs:
            plan = _CONTROL[op.kind](self, path, program, op, given)
            rule = None
        else:
            rule = rule_of(program, op)
            plan = OpPlan(self.choice(path[:-1], op, rule, given, last, masks))
        wanted, _ = boundary(program, op, plan, rule)
        wrong = [
            i
            for i, (now, want) in enumerate(zip(given, wanted, strict=True))
            if not readable(now, want)
        ]
        if wrong:
            raise Mixed(op, wrong, "different examples meet")
        return plan

    def choice(
        self,
        path: Path,
        op: Op,
        rule: Rule,
        given: Sequence[Layout],
        last: Collection[int],
        masks: bool,
    ) -> Choice:
        size = self.mesh.size(TIME)
        for i in sorted(range(len(given)), key=lambda i: i in last):
            where = given[i].find(TIME)
            if where is None:
                continue
            digit = follow(rule, rule.operands[i], *where, size)
            if digit is None:
                raise Mixed(op, (i,), "examples are regrouped")
            if rule.factor(digit[0]).kind in WHOLE:
                raise Mixed(op, (i,), "examples must be seen whole")
            choice = Choice.of({digit[0]: [digit[1]]})
            if choice_problems(rule, choice, self.mesh):
                raise Mixed(op, (i,), "examples must be seen whole")
            return choice
        partial = [i for i, layout in enumerate(given) if layout.partial]
        if partial:
            return self._flow(op, rule, given, partial, masks)
        asked = [self.hint(path, v) for v in op.results]
        return self.pulled(rule, asked) or Choice()

    def _flow(
        self,
        op: Op,
        rule: Rule,
        given: Sequence[Layout],
        partial: Sequence[int],
        masks: bool,
    ) -> Choice:
        for number, flow in enumerate(rule.flows):
            fits = all(
                given[i].operator(TIME) == flow.operator
                or (masks and not given[i].axes)
                for i in flow.operands
            )
            if fits and set(partial) <= set(flow.operands):
                return Choice.of(flows={TIME: number})
        raise Mixed(op, partial, "it is not linear in a sum over examples")

    def pulled(self, rule: Rule, asked: Sequence[Layout | None]) -> Choice | None:
        """The choice that makes results as rows of one microbatch, all as asked."""
        for r, layout in enumerate(asked):
            where = layout.find(TIME) if layout else None
            if where is None:
                continue
            digit = follow(rule, rule.results[r], *where, self.mesh.size(TIME))
            if digit is None or rule.factor(digit[0]).kind in WHOLE:
                return None
            choice = Choice.of({digit[0]: [digit[1]]})
            if choice_problems(rule, choice, self.mesh):
                return None
            _, given = layouts(rule, choice)
            same = all(
                want is None or want == made
                for want, made in zip(asked, given, strict=True)
            )
            return choice if same else None
        return None

    def body(
        self,
        path: Path,
        program: Program,
        inputs: Sequence[Layout],
        outputs: Sequence[Layout] | None = None,
    ) -> Assignment:
        """A nested Program of given ``inputs``; outputs as they fall, or forced."""
        now = dict(zip(program.inputs, inputs, strict=True))
        plans = []
        for index, op in enumerate(program.ops):
            given = [now.get(v) or whole_layout(program.values[v]) for v in op.operands]
            plan = self.op((*path, index), program, op, given)
            rule = None if op.programs else rule_of(program, op)
            _, made = boundary(program, op, plan, rule)
            now.update(zip(op.results, made, strict=True))
            plans.append(plan)
        found = tuple(
            now.get(v) or whole_layout(program.values[v]) for v in program.outputs
        )
        for v, have, want in zip(program.outputs, found, outputs or found, strict=True):
            if not readable(have, want):
                made_by = program.ops[program.producer.get(v, 0)]
                raise Mixed(made_by, (), "a loop or branch changes where examples are")
        return Assignment(tuple(inputs), tuple(outputs or found), tuple(plans))

    def entering(
        self, path: Path, program: Program, given: Sequence[Layout]
    ) -> list[Layout]:
        """``given``, but whole inputs that the body only reads row by row as rows."""
        return [
            layout if layout.axes else self.hint(path, v) or layout
            for v, layout in zip(program.inputs, given, strict=True)
        ]


def _call(
    walk: Walk, path: Path, program: Program, op: Op, given: Sequence[Layout]
) -> OpPlan:
    (body,) = op.programs
    inside = (*path, 0)
    return OpPlan(inner=(walk.body(inside, body, walk.entering(inside, body, given)),))


def _cond(
    walk: Walk, path: Path, program: Program, op: Op, given: Sequence[Layout]
) -> OpPlan:
    if given[0].axes:
        raise Mixed(op, (0,), "a branch is taken by what is known of all examples")
    bodies = [
        walk.body((*path, n), body, given[1:]) for n, body in enumerate(op.programs)
    ]
    ends = [
        next((x for x in outs if x.axes), outs[0])
        for outs in zip(*(body.outputs for body in bodies), strict=True)
    ]
    return OpPlan(
        inner=tuple(
            walk.body((*path, n), body, given[1:], ends)
            for n, body in enumerate(op.programs)
        )
    )


def _scan(
    walk: Walk, path: Path, program: Program, op: Op, given: Sequence[Layout]
) -> OpPlan:
    (body,) = op.programs
    inside = (*path, 0)
    consts, count = op.param["num_consts"], op.param["num_carry"]
    first = consts + count
    along = [i for i in range(first, len(given)) if given[i].dims[0]]
    if along:
        raise Mixed(op, along, "a loop runs over examples")
    slices = [x.dropped_first() for x in given[first:]]
    entering = walk.entering(inside, body, [*given[:first], *slices])
    fixed = entering[:consts], entering[first:]

    def run(carry: Sequence[Layout]) -> Assignment:
        return walk.body(inside, body, [*fixed[0], *carry, *fixed[1]])

    carry = _settled(op, given[consts:first], run)
    done = run(carry)
    outputs = (*carry, *done.outputs[count:])
    inputs = [*fixed[0], *carry, *fixed[1]]
    return OpPlan(inner=(walk.body(inside, body, inputs, outputs),))


def _while(
    walk: Walk, path: Path, program: Program, op: Op, given: Sequence[Layout]
) -> OpPlan:
    test, body = op.programs
    split = op.param["cond_nconsts"]
    first = split + op.param["body_nconsts"]

    def run(carry: Sequence[Layout]) -> Assignment:
        return walk.body((*path, 1), body, [*given[split:first], *carry])

    carry = _settled(op, given[first:], run)
    inputs = [*given[split:first], *carry]
    tested = [Layout(())]
    return OpPlan(
        inner=(
            walk.body((*path, 0), test, [*given[:split], *carry], tested),
            walk.body((*path, 1), body, inputs, carry),
        )
    )


Run = Callable[[Sequence[Layout]], Assignment]


def _settled(op: Op, start: Sequence[Layout], run: Run) -> tuple[Layout, ...]:
    """A carry that comes out as it goes in; what starts whole becomes what comes."""
    carry = tuple(start)
    while True:
        outs = run(carry).outputs[: len(carry)]
        after = tuple(
            new if not old.axes else old for old, new in zip(carry, outs, strict=True)
        )
        if after == carry:
            return carry
        carry = after


_CONTROL = {"remat2": _call, "cond": _cond, "scan": _scan, "while": _while}


def in_time(plan: OpPlan) -> bool:
    """Whether the time axis plays a part in ``plan``."""
    return bool(plan.choice.axes) or any(
        any(x.axes for x in (*body.inputs, *body.outputs))
        or any(map(in_time, body.ops))
        for body in plan.inner
    )


# ---- what is read as rows only is made as rows --------------------------------------


@dataclass
class Demands:
    """Goes backward from what every reader wants; leaves hints for the next walk."""

    walk: Walk
    new: bool = False

    def of(self, program: Program, assignment: Assignment) -> bool:
        """Whether there are hints that were not there before."""
        self._program((), program, assignment, assignment.outputs)
        return self.new

    def _note(self, path: Path, value: int, layout: Layout) -> None:
        known = self.walk.hints.setdefault(path, {})
        if value not in known:
            known[value] = layout
            self.new = True

    def _program(
        self,
        path: Path,
        program: Program,
        assignment: Assignment,
        outputs: Sequence[Layout],
    ) -> tuple[Layout | None, ...]:
        """What is wanted of each input: None where readers do not agree."""
        wants: dict[int, set[Layout]] = {}

        def want(values: Iterable[int], found: Iterable[Layout]) -> None:
            for v, layout in zip(values, found, strict=True):
                wants.setdefault(v, set()).add(layout)

        def asked(value: int) -> Layout | None:
            found = wants.get(value, set())
            return next(iter(found)) if len(found) == 1 else None

        want(program.outputs, outputs)
        for index in reversed(range(len(program.ops))):
            op, plan = program.ops[index], assignment.ops[index]
            if not path and not op.effects and wants.keys().isdisjoint(op.results):
                continue  # nothing depends on it: it is not run
            told = [asked(v) for v in op.results]
            if op.programs:
                want(op.operands, self._inside((*path, index), program, op, plan, told))
                continue
            rule, choice = rule_of(program, op), plan.choice
            if not choice.axes and all(
                (x is not None and is_split(x)) or not wants.get(v)
                for v, x in zip(op.results, told, strict=True)
            ):
                pulled = self.walk.pulled(rule, told)
                for v, x in zip(op.results, told, strict=True):
                    if pulled and x:
                        self._note(path, v, x)
                choice = pulled or choice
            want(op.operands, layouts(rule, choice)[0])
        return tuple(asked(v) for v in program.inputs)

    def _inside(
        self,
        path: Path,
        program: Program,
        op: Op,
        plan: OpPlan,
        told: Sequence[Layout | None],
    ) -> Iterator[Layout]:
        wanted, _ = boundary(program, op, plan, None)
        if not in_time(plan):
            yield from wanted
            return
        stacked = carries = 0
        if op.kind == "scan":
            stacked = op.param["num_consts"] + op.param["num_carry"]
            carries = op.param["num_carry"]
        open_inputs: list[tuple[Layout | None, ...]] = []
        for number, (body, inner) in enumerate(
            zip(op.programs, plan.inner, strict=True)
        ):
            ends = list(inner.outputs)
            for i in range(carries, len(ends) if op.kind in _OPEN else 0):
                goal = told[i]
                if goal is not None and not ends[i].axes and goal.split_axes:
                    if op.kind != "scan":
                        ends[i] = goal
                    elif not goal.dims[0]:
                        ends[i] = goal.dropped_first()
            open_inputs.append(self._program((*path, number), body, inner, ends))
        for i, layout in enumerate(wanted):
            goal = open_inputs[0][i] if op.kind in _OPEN else None
            fixed = op.kind == "scan" and 0 <= i - op.param["num_consts"] < carries
            if goal is None or layout.axes or fixed or not is_split(goal):
                yield layout
                continue
            self._note((*path, 0), op.programs[0].inputs[i], goal)
            is_slice = op.kind == "scan" and i >= stacked
            yield goal.prepended() if is_slice else goal


_OPEN = ("scan", "remat2")
"""Ops whose bodies may read inputs, and give outputs, as rows."""
