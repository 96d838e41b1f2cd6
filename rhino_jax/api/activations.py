"""The activations of a planned step, for its report: what heavy ops give, and how."""

from __future__ import annotations

from collections.abc import Iterator

from rhino_jax.ir.assignment import Assignment, boundary
from rhino_jax.ir.mesh import TIME
from rhino_jax.ir.program import Program
from rhino_jax.plan import Leaf
from rhino_jax.rules import rule_of
from rhino_jax.rules.attention import FORWARD

SHOWN = frozenset(
    ("dot_general", "conv_general_dilated", "ragged_dot_general", FORWARD, "name")
)
"""Matrix products, convolutions, attention, and what the user has named."""


def activations(program: Program, assignment: Assignment) -> Iterator[Leaf]:
    """The results of heavy ops of the forward pass, loops' bodies included.

    In a loop over microbatches the layout is that of the whole batch. A leaf's path is
    the user's source line, or the name that the user gave. Which ops are backward is
    read off the name stack: good enough to leave them out of a report.
    """
    for op, plan in zip(program.ops, assignment.ops, strict=True):
        backward = "transpose(" in op.where.name_stack
        if op.kind in SHOWN and not backward:
            _, layouts = boundary(program, op, plan, rule_of(program, op))
            label = op.param["name"] if op.kind == "name" else op.where
            value = program.values[op.results[0]]
            layout = layouts[0].without((TIME,))
            yield Leaf(str(label), value.shape, value.dtype, layout)
        for inner, body in zip(op.programs, plan.inner, strict=True):
            if not backward:
                yield from activations(inner, body)
