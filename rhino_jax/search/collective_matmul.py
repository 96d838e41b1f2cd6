"""Which products gather their operand, or scatter their result, while they work.

A pass over a finished assignment: it changes no layout and no byte that is sent, only
who sends it. A product that waits for one gather over one axis may take its shards as
they come by instead; a result that is scattered at once may go around itself. Where
compilers send shards beside a product, that hides what it takes
(:mod:`rhino_jax.cost.collective_matmul`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.collective_matmul import divided, seen_seconds
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.compute import op_work
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary
from rhino_jax.ir.layout import Layout, padded_size
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.steps import (
    ALL_GATHER,
    COLLECTED,
    PASSED,
    REDUCE_SCATTER,
    Move,
    Step,
)
from rhino_jax.rules import rule_of

WORTH = 0.6
"""Of a collective's seconds, what must be hidden at least: compilers lose more on
parts of a product than is priced."""

Version = tuple[int, Layout]


def interleaved(
    program: Program, assignment: Assignment, mesh: Mesh, cluster: Cluster
) -> Assignment:
    """``assignment`` with gathers and scatters done within products, where it pays."""
    mesh = assignment.over(mesh)
    ops = tuple(
        _with_bodies(op, plan, mesh, cluster)
        for op, plan in zip(program.ops, assignment.ops, strict=True)
    )
    return _Pass(program, replace(assignment, ops=ops), mesh, cluster).done()


def _with_bodies(op: Op, plan: OpPlan, mesh: Mesh, cluster: Cluster) -> OpPlan:
    """``plan`` with its bodies done; those of pipeline stages are left alone."""
    if not plan.inner or plan.staged:
        return plan
    pairs = zip(op.programs, plan.inner, strict=True)
    inner = (interleaved(p, a, mesh, cluster) for p, a in pairs)
    return replace(plan, inner=tuple(inner))


@dataclass(frozen=True)
class _Within:
    """One step that the product ``op`` may do by itself, and the seconds it saves."""

    op: int
    move: Move
    step: Step
    gain_seconds: float


class _Pass:
    def __init__(
        self, program: Program, assignment: Assignment, mesh: Mesh, cluster: Cluster
    ) -> None:
        self.program, self.assignment = program, assignment
        self.mesh, self.cluster = mesh, cluster
        self.made = [{(m.value, m.target) for m in op.before} for op in assignment.ops]
        self.reads: dict[Version, list[tuple[int, Move | None]]] = defaultdict(list)
        for version, reader, move in self._reads():
            self.reads[version].append((reader, move))

    def done(self) -> Assignment:
        best: dict[int, _Within] = {}
        for one in (*self.gathers(), *self.scatters()):
            if one.op not in best or best[one.op].gain_seconds < one.gain_seconds:
                best[one.op] = one
        scattered = {one.move: one for one in best.values() if _scatters(one.step)}
        ops = []
        for number, plan in enumerate(self.assignment.ops):
            before = [
                part
                for move in plan.before
                for part in self.parts(move, best.get(number), scattered)
            ]
            after = plan.after
            if number in best and _scatters(best[number].step):
                one = best[number]
                first = Move(
                    one.move.value,
                    one.step.source,
                    one.step.target,
                    (one.step,),
                    within=PASSED,
                )
                after = (first, *after)
            ops.append(replace(plan, before=tuple(before), after=after))
        final = [
            part
            for move in self.assignment.final
            for part in self.parts(move, None, scattered)
        ]
        return replace(self.assignment, ops=tuple(ops), final=tuple(final))

    def parts(
        self, move: Move, at: _Within | None, scattered: dict[Move, _Within]
    ) -> Iterator[Move]:
        """``move`` without what a product does, or that apart."""
        if move in scattered:
            _, *rest = move.steps
            if rest:
                begin = rest[0].source
                yield replace(move, source=begin, steps=tuple(rest))
        elif at is not None and at.move is move:
            *rest, last = move.steps
            if rest:
                yield replace(move, target=last.source, steps=tuple(rest))
            kept = COLLECTED if self.others(move, at.op) else PASSED
            again = move.again and not rest
            yield Move(move.value, last.source, move.target, (last,), again, kept)
        else:
            yield move

    def gathers(self) -> Iterator[_Within]:
        """Last steps before a product, of what it reads once."""
        for number, (op, plan) in enumerate(self.ops()):
            if op.kind != "dot_general":
                continue
            read = list(zip(op.operands, self.layouts(op, plan)[0], strict=True))
            for move in plan.before:
                last = move.steps[-1] if move.steps else None
                direct = (move.value, move.target) in read
                once = op.operands.count(move.value) == 1 and not move.within
                if last and last.kind == ALL_GATHER and direct and once:
                    yield from self.weighed(number, move, last)

    def scatters(self) -> Iterator[_Within]:
        """Of results that nobody else wants as terms, and that are scattered first."""
        loop = set(self.assignment.loop.ops) if self.assignment.loop else set()
        for number, (op, plan) in enumerate(self.ops()):
            if op.kind != "dot_general" or plan.after:
                continue
            _, (layout,) = self.layouts(op, plan)
            readers = self.reads[op.results[0], layout]
            if len(readers) != 1:
                continue
            ((reader, move),) = readers
            if move and move.steps and _scatters(move.steps[0]):
                if (number in loop) == (reader in loop):
                    yield from self.weighed(number, move, move.steps[0])

    def weighed(self, number: int, move: Move, step: Step) -> Iterator[_Within]:
        """A step that the product ``number`` could do, if that is worth it."""
        op, plan = self.program.ops[number], self.assignment.ops[number]
        value = self.program.values[move.value]
        even = all(
            padded_size(n, dim, self.mesh) == n
            for layout in (step.source, step.target)
            for n, dim in zip(value.shape, layout.dims, strict=True)
        )
        floating = value.dtype.startswith(("float", "bfloat"))
        if len(step.axes) > 1 or not (even and floating):
            return
        rule = rule_of(self.program, op)
        if divided(op, rule, move.value, step).startswith("b"):
            return
        mesh, cluster = self.mesh, self.cluster
        given = (self.program, op, rule, plan.choice)
        seconds = op_work(*given, mesh, cluster.device).seconds
        sent = step_seconds(step, mesh, cluster)
        gain = sent - seen_seconds(*given, move.value, step, seconds, mesh, cluster)
        if gain > WORTH * sent:
            yield _Within(number, move, step, gain)

    def others(self, move: Move, number: int) -> bool:
        """Whether what ``move`` makes for op ``number`` is read by another too."""
        wanted = move.value, move.target
        return any(
            reader != number or by is not None for reader, by in self.reads[wanted]
        )

    def _reads(self) -> Iterator[tuple[Version, int, Move | None]]:
        """Every version that is read, the op that it is read for, and by what move; but
        not what an op reads that its own moves have made."""
        for number, (op, plan) in enumerate(self.ops()):
            for move in (*plan.before, *plan.after):
                yield (move.value, move.source), number, move
            wanted, _ = self.layouts(op, plan)
            for version in zip(op.operands, wanted, strict=True):
                if version not in self.made[number]:
                    yield version, number, None
        end = len(self.program.ops)
        for move in self.assignment.loop.leave if self.assignment.loop else ():
            yield (move.value, move.source), end, None
        for move in self.assignment.final:
            yield (move.value, move.source), end, move
        for version in zip(self.program.outputs, self.assignment.outputs, strict=True):
            yield version, end, None

    def ops(self) -> Iterator[tuple[Op, OpPlan]]:
        return zip(self.program.ops, self.assignment.ops, strict=True)

    def layouts(
        self, op: Op, plan: OpPlan
    ) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
        rule = None if op.programs else rule_of(self.program, op)
        return boundary(self.program, op, plan, rule)


def _scatters(step: Step) -> bool:
    return step.kind == REDUCE_SCATTER
