"""Pallas kernels: split along those axes of their grid that only say which block it is.

A kernel runs once for each point of a grid, and maps say which block of every array it
then works on. An axis that some maps hand through as a block's number, that no map and
no line of the kernel uses otherwise, and that all results follow, is a parallel loop:
examples and heads of flash attention. All other dimensions stay whole.

Tracing reads the maps (:mod:`rhino_jax.trace.kernels`); here is what it read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import BLOCKED, Dims, Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, whole

KERNEL = "pallas_call"
BLOCKS = "blocks"
"""The parameter that tracing adds: for each operand and result, for each dimension the
axis of the grid that it follows (-1 for none) and the size of a block."""


def axis_name(axis: int) -> str:
    """The factor of one axis of the grid."""
    return f"g{axis}"


def kernel(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """``(gi)..->(gi)..``: a dimension is blocks (``g``) of some elements each."""
    blocks = op.param.get(BLOCKS)
    if blocks is None:
        return whole(reads, makes)
    factors: dict[str, Factor] = {}
    sides: list[Dims] = []
    for number, (value, dims) in enumerate(zip((*reads, *makes), blocks, strict=True)):
        found: list[tuple[str, ...]] = []
        for d, (n, (axis, size)) in enumerate(zip(value.shape, dims, strict=True)):
            inner = f"x{number}_{d}"
            factors[inner] = Factor(inner, size if axis >= 0 else n, BLOCKED)
            if axis >= 0:
                factors[axis_name(axis)] = Factor(axis_name(axis), n // size)
            found.append((axis_name(axis), inner) if axis >= 0 else (inner,))
        sides.append(tuple(found))
    count = len(reads)
    every = tuple(factors.values())
    return Rule(every, tuple(sides[:count]), tuple(sides[count:]))


RULES: Mapping[str, RuleFn] = {KERNEL: kernel}
