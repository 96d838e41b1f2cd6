"""From an answer of the search to a complete Assignment: every move written out.

Each op is run by the choice of its site. What it reads is brought to the layout it
wants from the nearest version at hand: where several readers share a port, first to
that. What was moved in the forward pass stays at hand if it is an activation; a weight
is moved again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.cost.reshard import route
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary
from rhino_jax.ir.depends import forward
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.steps import Move
from rhino_jax.rules import note_of, rule_of
from rhino_jax.search.domains import Meaning
from rhino_jax.search.energy import Energy
from rhino_jax.search.graph import Endpoint, Facts, Graph, Path, batch_inputs, group_of


def write(energy: Energy, facts: Facts, answer: Sequence[Meaning]) -> Assignment:
    """The Assignment in which every variable means what ``answer`` says."""
    return _Writer(energy, facts, answer).run()


@dataclass
class _Frame:
    """Versions of the values of one Program: layout -> the group it was moved for."""

    program: Program
    path: Path
    region: str
    batch: frozenset[int]
    homes: dict[int, Layout] = field(default_factory=dict)
    held: dict[int, dict[Layout, str]] = field(default_factory=dict)

    def put(self, value: int, layout: Layout) -> None:
        self.homes[value] = layout
        self.held[value] = {layout: ""}


class _Writer:
    def __init__(self, energy: Energy, facts: Facts, answer: Sequence[Meaning]) -> None:
        self.energy = energy
        self.graph: Graph = energy.graph
        self.mesh: Mesh = energy.mesh
        self.facts = facts
        self.answer = answer

    def port(self, var: int) -> Layout:
        return self.answer[var].gives[0]

    def run(self) -> Assignment:
        program, graph = self.graph.program, self.graph
        inputs = tuple(self.port(var) for var in graph.inputs)
        outputs = tuple(self.port(var) for var in graph.outputs)
        frame = _Frame(program, (), "", self.facts.batch)
        return self._program(frame, inputs, outputs)

    def _program(
        self,
        frame: _Frame,
        inputs: tuple[Layout, ...],
        outputs: tuple[Layout, ...],
    ) -> Assignment:
        program = frame.program
        for v, layout in zip(program.inputs, inputs, strict=True):
            frame.put(v, layout)
        plans = tuple(self._op(frame, i, op) for i, op in enumerate(program.ops))
        region = frame.region or "epilogue"
        final: list[Move] = []
        for v, layout in zip(program.outputs, outputs, strict=True):
            final += self._read(frame, v, layout, region)
        return Assignment(inputs, outputs, plans, tuple(final))

    def _op(self, frame: _Frame, index: int, op: Op) -> OpPlan:
        program = frame.program
        region = frame.region or self.facts.region[index]
        if op.programs:
            inner = tuple(
                self._body(frame, index, number, region)
                for number in range(len(op.programs))
            )
            fed = None if frame.path else self.facts.fed.get(index)
            staged = fed.staged if fed else None
            plan, rule = OpPlan(inner=inner, staged=staged), None
        else:
            choice = self.answer[self.graph.sites[frame.path, index]].choice
            assert choice is not None
            plan = OpPlan(choice, note=note_of(op))
            rule = rule_of(program, op)
        wanted, given = boundary(program, op, plan, rule)
        before = [
            move
            for v, layout in zip(op.operands, wanted, strict=True)
            for move in self._read(frame, v, layout, region)
        ]
        for v, layout in zip(op.results, given, strict=True):
            frame.put(v, layout)
        return replace(plan, before=tuple(before))

    def _body(self, frame: _Frame, index: int, number: int, region: str) -> Assignment:
        op = frame.program.ops[index]
        program = op.programs[number]
        body = self.graph.bodies[frame.path, index, number]
        path = (*frame.path, index, number)
        batch = self._entering(frame, op, program, number)
        inner = _Frame(program, path, region, batch)
        return self._program(
            inner,
            tuple(
                self._layout(program, v, end)
                for v, end in zip(program.inputs, body.inputs, strict=True)
            ),
            tuple(
                self._layout(program, v, end)
                for v, end in zip(program.outputs, body.outputs, strict=True)
            ),
        )

    def _layout(self, program: Program, value: int, end: Endpoint | None) -> Layout:
        if end is None:
            return Layout.replicated(len(program.values[value].shape))
        return self.answer[end.var].gives[end.index]

    def _entering(
        self, frame: _Frame, op: Op, program: Program, number: int
    ) -> frozenset[int]:
        return forward(program, batch_inputs(op, number, frame.batch))

    # ---- moves

    def _read(
        self, frame: _Frame, value: int, target: Layout, region: str
    ) -> list[Move]:
        """The moves that bring ``value`` to ``target``, by way of a shared port."""
        literal = frame.program.values[value].literal is not None
        if literal and not target.partial:
            return []
        if literal:
            rank = len(frame.program.values[value].shape)
            frame.homes.setdefault(value, Layout.replicated(rank))
            frame.held.setdefault(value, {frame.homes[value]: ""})
        group = group_of(value in frame.batch, region)
        port = self.graph.reads.get((frame.path, value, group))
        moves: list[Move] = []
        if port is not None and target != frame.homes[value]:
            moves += self._bring(frame, value, self.port(port), group)
        return [*moves, *self._bring(frame, value, target, group)]

    def _bring(
        self, frame: _Frame, value: int, target: Layout, group: str
    ) -> list[Move]:
        held, home = frame.held[value], frame.homes[value]
        if target == home or held.get(target, None) == group:
            return []
        v = frame.program.values[value]
        near = [x for x, moved in held.items() if x == home or moved == group]
        source = min(
            near,
            key=lambda x: (self.energy.move(v.shape, v.dtype, x, target), x != home),
        )
        steps = route(v.shape, v.dtype, source, target, self.mesh)
        # A weight moved, or turned around, and gathered for the backward pass: the
        # compiler may see that the forward pass gathered the same.
        again = target in held or group == "backward"
        held[target] = group
        return [Move(value, source, target, steps, again)]
