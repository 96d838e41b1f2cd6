"""The second lowering: the step replayed under sharding constraints.

Every op runs on global arrays, and every value is constrained to the layout that the
plan gives it; the collectives are left to XLA's partitioner. What the plan says is
then a wish: partial values, strided layouts and the time of a collective can not be
asked for. It is kept to compare with, and for programs the manual lowering can not
hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from rhino_jax import compat
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary
from rhino_jax.ir.layout import Layout, contiguous
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import WAITS, Op, Program
from rhino_jax.lower.control import CONTROL
from rhino_jax.rules import placing, rule_of

Arrays = Sequence[jax.Array]


def replay(
    program: Program, assignment: Assignment, mesh: Mesh, jax_mesh: Any, args: Arrays
) -> list[jax.Array]:
    """Run ``program`` on global arrays, every result constrained to its layout."""
    return _Replay(mesh, jax_mesh).run(program, assignment, args)


class _Replay:
    def __init__(self, mesh: Mesh, jax_mesh: Any) -> None:
        self.mesh = mesh
        self.jax_mesh = jax_mesh

    def constrain(self, x: jax.Array, layout: Layout) -> jax.Array:
        if not self.mesh.axes or not x.ndim:
            return x
        spec: list[Any] = []
        for n, dim in zip(x.shape, layout.dims, strict=True):
            names = tuple(s.axis for s in dim)
            if not names:
                spec.append(None)
            elif contiguous(n, names, self.mesh) == dim:
                spec.append(names)
            else:
                spec.append(PartitionSpec.UNCONSTRAINED)
        sharding = NamedSharding(self.jax_mesh, PartitionSpec(*spec))
        return lax.with_sharding_constraint(x, sharding)

    def run(
        self, program: Program, assignment: Assignment, args: Arrays
    ) -> list[jax.Array]:
        held = dict(zip(program.inputs, args, strict=True))
        moved: dict[int, jax.Array] = {}

        def read(value: int) -> jax.Array:
            v = program.values[value]
            if v.literal is not None:
                return compat.literal(v.literal, v.dtype, v.weak)
            return moved.get(value, held[value])

        for op, plan in zip(program.ops, assignment.ops, strict=True):
            for move in plan.before:
                if program.values[move.value].literal is None:
                    moved[move.value] = self.constrain(held[move.value], move.target)
            ins = [read(v) for v in op.operands]
            waits = [v for v in op.param.get(WAITS, ()) if v in held]
            if waits:
                ins, waited = lax.optimization_barrier((ins, [read(v) for v in waits]))
                held.update(zip(waits, waited, strict=True))
                moved.update(zip(waits, waited, strict=True))
            rule = None if op.programs else rule_of(program, op)
            _, given = boundary(program, op, plan, rule)
            with compat.as_written(op.source):
                outs = self.op(op, plan, ins)
                after = {move.value: move.target for move in plan.after}
                for value, layout, x in zip(op.results, given, outs, strict=True):
                    held[value] = self.constrain(x, after.get(value, layout))
        return [
            self.constrain(read(v), layout)
            for v, layout in zip(program.outputs, assignment.outputs, strict=True)
        ]

    def op(self, op: Op, plan: OpPlan, ins: list[jax.Array]) -> Sequence[jax.Array]:
        if op.programs:
            bodies = [
                partial(self.body, inner, done)
                for inner, done in zip(op.programs, plan.inner, strict=True)
            ]
            return CONTROL[op.kind](op, bodies, ins)
        if op.kind in placing.RULES:
            return ins
        if op.source is None:
            assert op.kind == "rematerialize", f"{op.kind} has no equation"
            return lax.optimization_barrier(ins)
        out = compat.bind(op.source, ins, {})
        return out if isinstance(out, list | tuple) else [out]

    def body(
        self, program: Program, assignment: Assignment, *args: jax.Array
    ) -> list[jax.Array]:
        return self.run(program, assignment, args)
