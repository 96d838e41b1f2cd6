"""Which ops run once for every microbatch: a plan over the time axis alone.

The rows that lie together on one device are cut in blocks, one a turn of the loop: the
*time digit* of the example's number. It is followed from the batch inputs through
every op and into bodies, as any axis would be, with this difference: a turn does not
know of the others. What is summed over examples stays *partial* over time; it flows on
through linear ops, and its first other reader waits for the end of the loop. If that
reader also reads single examples, the reduction must be known before the loop starts
(a count of tokens: what depends on the batch alone is computed there, a *prologue*), or
the step can not be cut.

What does not descend from the batch, but is only read as rows of one microbatch
(dropout bits, a bias spread over the examples), is made in the loop, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.errors import problems
from rhino_jax.ir.assignment import (
    Assignment,
    OpPlan,
    boundary,
    live_ops,
    phases,
    whole,
)
from rhino_jax.ir.depends import backward, forward
from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import TIME, Axis, Mesh
from rhino_jax.ir.program import Op, Program, Value, itemsize
from rhino_jax.rules import rule_of
from rhino_jax.search.subject import Subject
from rhino_jax.search.turns import (
    Demands,
    Mixed,
    Walk,
    in_time,
    is_split,
    whole_layout,
)


@dataclass(frozen=True)
class Refusal:
    """Why a step can not be cut in microbatches: every reason; str() is the message.

    ``uneven``: another number of them may do.
    """

    reasons: tuple[str, ...]
    uneven: bool = False

    def __str__(self) -> str:
        return problems("the step can not be cut in microbatches:", self.reasons)


@dataclass(frozen=True)
class Timing:
    """``assignment``: the Program planned over the time axis alone, without moves.

    ``before``, ``loop``, ``after``: op indices by phase, each in program order.
    """

    microbatches: int
    assignment: Assignment
    before: tuple[int, ...]
    loop: tuple[int, ...]
    after: tuple[int, ...]


def timing(subject: Subject, rows: int, microbatches: int) -> Timing | Refusal:
    """How ``subject`` splits over time.

    ``rows``: examples that lie together on one device, cut in ``microbatches`` blocks.
    """
    if rows % microbatches:
        return Refusal(
            (
                f"{microbatches} microbatches do not divide the {rows} examples that "
                f"lie together on a device (batch size {subject.batch_size})",
            ),
            uneven=True,
        )
    top = _Top(subject, Split(TIME, rows // microbatches), microbatches)
    return top.run()


# ---- the whole Program --------------------------------------------------------------


@dataclass
class _Pass:
    """What following the time digit once through the Program found.

    ``seen``: how the loop sees a value (of an input or a prologue's result: its rows).
    ``late``: values that wait for the end of the loop, and the op that summed.
    ``origin``: of a value that is partial over time, that op.
    ``spoiled``: what depends on an op that can be run neither in the loop nor after.
    ``early``: ops that must be run before the loop, so that this would go through.
    """

    seen: dict[int, Layout] = field(default_factory=dict)
    plans: list[OpPlan] = field(default_factory=list)
    late: dict[int, int] = field(default_factory=dict)
    origin: dict[int, int] = field(default_factory=dict)
    spoiled: set[int] = field(default_factory=set)
    early: set[int] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)


class _Top:
    def __init__(self, subject: Subject, split: Split, microbatches: int) -> None:
        self.subject = subject
        self.program = program = subject.program
        self.walk = Walk(Mesh((Axis(TIME, microbatches),)))
        self.early: set[int] = set()
        self.live = live_ops(program)
        self.rows: dict[int, Layout] = {}
        trained = []
        for i, v in enumerate(program.inputs):
            value = program.values[v]
            is_batch = i in subject.batch_inputs
            if is_batch and value.shape[:1] == (subject.batch_size,):
                self.rows[v] = whole_layout(value).with_split(0, split)
            elif i in subject.pairs or (is_batch and value.shape):
                trained.append(v)
        floating = (v for v in trained if _is_float(program.values[v]))
        self.trained = forward(program, floating)

    def run(self) -> Timing | Refusal:
        if not self.rows:
            return Refusal(("no input has a leading dimension of the batch size",))
        self.walk.hints[()] = {}
        while True:
            found = self.follow()
            if not found.early <= self.early:
                self.early |= found.early
                continue
            if found.reasons:
                return Refusal(tuple(dict.fromkeys(found.reasons)))
            if not Demands(self.walk).of(self.program, self._assignment(found)):
                return self.timing(found)

    def follow(self) -> _Pass:
        found = _Pass(seen=dict(self.rows))
        for index, op in enumerate(self.program.ops):
            if index not in self.live:
                found.plans.append(_idle(op))
            elif index in self.early:
                self._ahead(found, index, op)
            else:
                self._op(found, index, op)
        return found

    def _given(self, found: _Pass, op: Op) -> list[Layout]:
        values = self.program.values
        return [found.seen.get(v) or whole_layout(values[v]) for v in op.operands]

    def _plan(self, index: int, op: Op, given: Sequence[Layout]) -> OpPlan:
        clean = {i for i, v in enumerate(op.operands) if v not in self.trained}
        return self.walk.op((index,), self.program, op, given, clean, masks=False)

    def _made(self, op: Op, plan: OpPlan) -> tuple[Layout, ...]:
        rule = None if op.programs else rule_of(self.program, op)
        return boundary(self.program, op, plan, rule)[1]

    def _ahead(self, found: _Pass, index: int, op: Op) -> None:
        """An op of the prologue; the loop reads its own rows of what that gives."""
        found.plans.append(_idle(op))
        try:
            made = self._made(op, self._plan(index, op, self._given(found, op)))
        except Mixed:
            return
        found.seen.update(
            (v, layout.settled()) for v, layout in zip(op.results, made, strict=True)
        )

    def _op(self, found: _Pass, index: int, op: Op) -> None:
        given = self._given(found, op)
        try:
            plan = self._turning(found, index, op, given)
        except Mixed as mixed:
            self._wait(found, index, op, given, mixed)
            return
        found.plans.append(plan)
        for v, layout in zip(op.results, self._made(op, plan), strict=True):
            found.seen[v] = layout
            if layout.partial:
                sums = [found.origin[u] for u in op.operands if u in found.origin]
                found.origin[v] = sums[0] if sums else index

    def _turning(
        self, found: _Pass, index: int, op: Op, given: Sequence[Layout]
    ) -> OpPlan:
        """``op`` in the loop. What is known before it may be read whole there: by the
        op that needs it so, or by one that has a sum over examples beside it."""
        late = [i for i, v in enumerate(op.operands) if v in found.late]
        if late:
            raise Mixed(op, late, "it reads what the end of the loop gives")
        try:
            return self._plan(index, op, given)
        except Mixed as mixed:
            rows = {i for i, layout in enumerate(given) if is_split(layout)}
            known = {i for i in rows if self._is_known(op.operands[i])}
            needed = rows.intersection(mixed.operands) if mixed.op is op else set()
            for wanted in (needed, rows):
                there = [
                    layout.without((TIME,)) if i in wanted else layout
                    for i, layout in enumerate(given)
                ]
                # With nothing of one turn left to read it would run on all examples.
                if wanted and wanted <= known and any(x.axes for x in there):
                    return self._turning(found, index, op, there)
            raise

    def _is_known(self, value: int) -> bool:
        """Whether a value is whole at hand before the loop."""
        return value in self.rows or self.program.producer.get(value) in self.early

    def _wait(
        self,
        found: _Pass,
        index: int,
        op: Op,
        given: Sequence[Layout],
        mixed: Mixed,
    ) -> None:
        """``op`` runs after the loop, or what it reads before it, or never."""
        found.plans.append(_idle(op))
        asked = [op.operands[i] for i in mixed.operands] if mixed.op is op else []
        sums = [
            found.late.get(v, found.origin.get(v))
            for v in (*asked, *op.operands)
            if v in found.late or v in found.origin
        ]
        origin = sums[0] if sums else None
        found.late.update((v, index if origin is None else origin) for v in op.results)
        if not found.spoiled.isdisjoint(op.operands):
            found.spoiled.update(op.results)
        elif any(map(is_split, given)):
            pairs = zip(op.operands, given, strict=True)
            rows = {v for v, layout in pairs if is_split(layout)}
            for values in (self._sums(found, asked), op.results, rows):
                behind = self._behind(values)
                clean = self.trained.isdisjoint(values)
                if values and clean and not behind <= self.early:
                    found.early |= behind
                    return
            found.spoiled.update(op.results)
            found.reasons.append(self._reason(op, origin, mixed))

    def _sums(self, found: _Pass, asked: Iterable[int]) -> set[int]:
        """The sums over examples that ``asked`` are, or are made of after the loop."""
        sums: set[int] = set()
        todo, seen = list(asked), set(asked)
        while todo:
            v = todo.pop()
            if v not in found.late:
                sums.add(v)
                continue
            for u in self.program.ops[self.program.producer[v]].operands:
                axes = found.seen[u].axes if u in found.seen else ()
                if u not in seen and (u in found.late or axes):
                    seen.add(u)
                    todo.append(u)
        return sums

    def _behind(self, values: Iterable[int]) -> set[int]:
        """The ops that ``values`` depend on."""
        behind = backward(self.program, values)
        return {i for i, op in enumerate(self.program.ops) if behind & set(op.results)}

    def _reason(self, op: Op, origin: int | None, mixed: Mixed) -> str:
        if origin is None or mixed.op is not op:
            inside = "" if mixed.op is op else f" in {op.kind} at {op.where}"
            return f"{mixed.op.kind} at {mixed.op.where}{inside}: {mixed.how}"
        made = self.program.ops[origin]
        return (
            f"{made.kind} at {made.where} combines the examples of all microbatches, "
            f"and {op.kind} at {op.where} reads the result beside single examples"
        )

    def _assignment(self, found: _Pass) -> Assignment:
        return replace(whole(self.program), ops=tuple(found.plans))

    def timing(self, found: _Pass) -> Timing:
        program = self.program
        plans = list(found.plans)
        loop = {i for i, plan in enumerate(plans) if in_time(plan)}
        for index in waiting(program, plans, loop, ()):
            loop.discard(index)
            plans[index] = _idle(program.ops[index])
        loop = closed(program, loop)
        return Timing(
            self.walk.mesh.size(TIME),
            replace(whole(program), ops=tuple(plans)),
            *phases(program, loop),
        )


def _is_float(value: Value) -> bool:
    return value.dtype.startswith(("float", "bfloat", "complex"))


def _idle(op: Op) -> OpPlan:
    return OpPlan(inner=tuple(map(whole, op.programs)))


def closed(program: Program, loop: Collection[int]) -> set[int]:
    """``loop`` and the ops that stand between its ops: their result feeds it again."""
    inside = set(loop)
    made = forward(program, (v for i in inside for v in program.ops[i].results))
    before, _, _ = phases(program, inside)
    return inside | {i for i in before if not made.isdisjoint(program.ops[i].operands)}


def waiting(
    program: Program,
    plans: Sequence[OpPlan],
    loop: Collection[int],
    moved: Collection[int],
) -> set[int]:
    """Ops of the loop on sums alone that are better run once, after it.

    Those that make no accumulator smaller; and those that would read a sum that was
    ``moved`` (ops), unless an op that reads examples needs them in the loop.
    """
    gone: set[int] = set()
    free: set[int] = set()

    def readers(values: Iterable[int]) -> set[int]:
        inside = {i for v in values for i in program.uses.get(v, ()) if i in loop}
        return inside - gone

    for index in sorted(loop, reverse=True):
        op, plan = program.ops[index], plans[index]
        if op.programs or plan.choice.splits or not plan.choice.flows:
            continue
        after = readers(op.results)
        if after <= free:
            free.add(index)
        if not after and _saves_nothing(program, op, readers):
            gone.add(index)
    for index in sorted(set(moved) & free - gone):
        todo = [index]
        while todo:
            now = todo.pop()
            gone.add(now)
            todo += readers(program.ops[now].results)
    return gone


def _saves_nothing(
    program: Program, op: Op, readers: Callable[[Iterable[int]], set[int]]
) -> bool:
    """Whether accumulating what ``op`` reads takes no more than what it makes."""
    made = sum(_accumulated(program.values[v]) for v in op.results)
    read = [program.values[v] for v in set(op.operands) if len(readers((v,))) == 1]
    held = sum(_accumulated(value) for value in read)
    if made == held and len(read) == 1:
        # A narrow sum that is widened next is better accumulated wide.
        wider = max(itemsize(program.values[v].dtype) for v in op.results)
        return itemsize(read[0].dtype) >= min(wider, 4.0)
    return made >= held


def _accumulated(value: Value) -> float:
    """Bytes of an accumulator: sums of narrow floating types are held in float32."""
    wide = 4.0 if _is_float(value) else 0.0
    return math.prod(value.shape) * max(itemsize(value.dtype), wide)
