"""Heavy ops, and the values that are not cheap to make again."""

from __future__ import annotations

from collections.abc import Collection

from rhino_jax.ir.analysis.influence import reached
from rhino_jax.ir.analysis.regions import Regions
from rhino_jax.ir.program import Op, Program


def is_heavy(op: Op, heavy: Collection[str]) -> bool:
    """Whether an op, or one inside it, is of a kind in ``heavy``."""
    return op.kind in heavy or any(
        is_heavy(inner, heavy) for body in op.programs for inner in body.ops
    )


def heavy_values(
    program: Program, regions: Regions, state: Collection[int], heavy: Collection[str]
) -> frozenset[int]:
    """The values that a cut must carry over.

    They depend on the batch, and on state or on a heavy op. What depends on the batch
    alone through light ops (masks, labels, token counts), on keys or constants
    (positions), or on parameters alone (casts) is cheap to make again on the other
    side. So are uniform values to hand over: they do not count. An embedded batch does:
    what looks it up again needs the table.

    ``state`` are positions of inputs; keys and integers among them weigh nothing.
    """
    inputs = (program.inputs[i] for i in state)
    floating = [v for v in inputs if "float" in program.values[v].dtype]
    made = (
        v
        for op in program.ops
        if not regions.batch.isdisjoint(op.operands) and is_heavy(op, heavy)
        for v in op.results
    )
    return (reached(program, (*floating, *made)) & regions.batch) - regions.uniform
