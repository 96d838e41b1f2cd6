"""Which segment a forward op belongs to, and each parameter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rhino_jax.ir.analysis.cuts import Cut, forward_ops
from rhino_jax.ir.analysis.regions import FORWARD, Regions
from rhino_jax.ir.analysis.weight import heavy_values
from rhino_jax.ir.program import Program

SHARED = -1
"""The owner of what several segments use."""


@dataclass(frozen=True)
class Ownership:
    """Segments by number, or ``SHARED``.

    ``ops`` covers the forward pass up to where the backward pass begins. ``parameters``
    has an entry for each input position that one segment reads (itself, or what it is
    cast to), ``SHARED`` where several do.
    """

    ops: dict[int, int]
    parameters: dict[int, int]


def ownership(
    program: Program,
    regions: Regions,
    cuts: Sequence[Cut],
    state: Collection[int],
    heavy: Collection[str],
) -> Ownership:
    """Owners of the ops of the forward pass, and of parameters.

    Ops that make heavy values belong where they stand, between two cuts. Light ones
    belong to those who read them: casts of all parameters at the top of the step go
    to the segments of their parameters, masks that several segments read are shared.
    """
    weighty = heavy_values(program, regions, state, heavy)
    order = forward_ops(regions)
    standing = _standing(order, [cut.place for cut in cuts])
    ops: dict[int, int] = {}
    readers: dict[int, int] = {}
    for index in reversed(order):
        op = program.ops[index]
        found = {readers[v] for v in op.results if v in readers}
        light = weighty.isdisjoint(op.results) and not any(
            v in regions.batch and v in regions.uniform for v in op.results
        )
        if found and light:
            owner = found.pop() if len(found) == 1 else SHARED
        else:
            owner = standing[index]
        ops[index] = owner
        for value in op.operands:
            known = readers.setdefault(value, owner)
            if known != owner:
                readers[value] = SHARED
    parameters = {
        i: readers[program.inputs[i]]
        for i in regions.parameters
        if program.inputs[i] in readers
    }
    return Ownership(ops, parameters)


def _standing(order: Sequence[int], places: Sequence[int]) -> dict[int, int]:
    """Op -> the number of ``places`` at or before it; both ascend."""
    found = {}
    segment = 0
    for index in order:
        while segment < len(places) and places[segment] <= index:
            segment += 1
        found[index] = segment
    return found


def reading_segments(
    program: Program, regions: Regions, owners: Ownership
) -> dict[int, int]:
    """Value -> the last segment whose forward ops read it."""
    found: dict[int, int] = {}
    for index, owner in owners.ops.items():
        if regions.of[index] == FORWARD:
            for value in program.ops[index].operands:
                found[value] = max(owner, found.get(value, owner))
    return found
