"""Wishes that run backward: the layout a value should have for those who read it."""

from __future__ import annotations

from collections.abc import Mapping

from rhino_jax.cost.reshard import route
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.factors import PARALLEL
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.steps import FREE
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


def pulled(
    program: Program,
    reads: Mapping[int, frozenset[Layout]],
    assignment: Assignment,
    mesh: Mesh,
) -> dict[int, Layout]:
    """Values that every reader only slices, with the slice they all want."""
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
        if steps and not target.partial and all(s.kind in FREE for s in steps):
            found[value] = target
    return found
