"""Wishes that run backward: the layout a value should have for those who read it."""

from __future__ import annotations

from collections.abc import Mapping

from rhino_jax.cost.reshard import route
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.factors import PARALLEL
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.steps import FREE, SLICE
from rhino_jax.rules import rule_of
from rhino_jax.search.follow import hint_layout


def backward_hints(
    program: Program, seeds: Mapping[int, Layout], mesh: Mesh
) -> dict[int, Layout]:
    """Layouts wished for values, carried from ``seeds`` up through light ops.

    A new parameter's layout is wished for its gradient this way. Where two wishes
    meet, the one that splits over more axes wins.
    """
    sizes = dict(mesh.shape)
    hints = dict(seeds)
    for op in reversed(program.ops):
        if op.programs or not any(v in hints for v in op.results):
            continue
        rule = rule_of(program, op)
        if any(f.kind != PARALLEL for f in rule.factors):
            continue
        for index, result in enumerate(op.results):
            if result not in hints:
                continue
            for i, value in enumerate(op.operands):
                if not program.values[value].shape:
                    continue
                wish = hint_layout(rule, hints[result], index, i, sizes)
                if wish is None or wish.problems(program.values[value].shape, mesh):
                    continue
                have = hints.get(value)
                if have is None or len(wish.split_axes) > len(have.split_axes):
                    hints[value] = wish
    return hints


def rows_of_slices(program: Program) -> dict[int, tuple[str, str]]:
    """Reshapes whose result is scanned: which factor is scanned, which is its rows.

    ``x.reshape(microbatches, rows, ...)`` cuts one dimension into both. By the value it
    gives; ops that only carry the scanned dimension along may stand before the scan.
    """
    found = {}
    for op in program.ops:
        if op.kind == "scan":
            for value in op.operands[op.param["num_consts"] + op.param["num_carry"] :]:
                cut = _cut(program, value)
                if cut is not None:
                    found[cut[0]] = cut[1:]
    return found


def _cut(program: Program, value: int) -> tuple[int, str, str] | None:
    """The value whose leading dimension came to be by cutting a larger one, if any."""
    dim = 0
    while value in program.producer:
        op = program.ops[program.producer[value]]
        if op.programs or len(op.results) != 1:
            return None
        rule = rule_of(program, op)
        names = rule.results[0][dim]
        sources = [
            (operand, d, held)
            for operand, dims in zip(op.operands, rule.operands, strict=True)
            for d, held in enumerate(dims)
            if names[:1] and names[0] in held
        ]
        if len(names) != 1 or not sources:
            return None
        operand, dim, held = sources[0]
        inner = held[held.index(names[0]) + 1 :]
        if inner and op.kind == "reshape":
            return value, names[0], inner[0]
        if len(held) != 1:
            return None
        value = operand
    return None


def pulled(
    program: Program,
    reads: Mapping[int, frozenset[Layout]],
    assignment: Assignment,
    mesh: Mesh,
) -> dict[int, Layout]:
    """Values that every reader only slices, with the slice they all want.

    It may be one term of a sum (zeros to scatter into): the slice is made, then masked.
    """
    found = {}
    homes: dict[int, Layout] = {}
    for plan in assignment.ops:
        for move in plan.before:
            homes.setdefault(move.value, move.source)
    made = program.producer
    for value, wanted in reads.items():
        if value not in made or value not in homes or len(wanted) != 1:
            continue
        (target,) = wanted
        v = program.values[value]
        steps = route(v.shape, v.dtype, homes[value], target, mesh)
        if any(s.kind == SLICE for s in steps) and all(s.kind in FREE for s in steps):
            found[value] = target.settled()
    return found
