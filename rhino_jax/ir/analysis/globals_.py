"""Values that many segments read: they get one layout for the whole Program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rhino_jax.ir.analysis.regions import Regions
from rhino_jax.ir.analysis.segments import Segmentation
from rhino_jax.ir.program import Program

FEW = 3
"""How many segments may read a value that is no parameter before it is global."""


@dataclass(frozen=True)
class Global:
    """A value with one layout everywhere, and the segments whose forward half reads it.

    A parameter's readers are also those that read what the prologue makes of it (a
    cast, a transposed table).
    """

    value: int
    readers: tuple[int, ...]
    is_parameter: bool


def global_values(
    program: Program, regions: Regions, segmentation: Segmentation, few: int = FEW
) -> tuple[Global, ...]:
    """Parameters read by two segments or more, other values by more than ``few``.

    Tied embeddings are of the first kind; an encoder's output, masks and relative
    positions of the second. Uniform values have only one layout and are left out. In
    the order of value numbers.
    """
    parameters = {program.inputs[i] for i in regions.parameters}
    readers = _readers(program, segmentation, parameters)
    return tuple(
        Global(value, tuple(sorted(found)), value in parameters)
        for value, found in sorted(readers.items())
        if value not in regions.uniform
        and len(found) > (1 if value in parameters else few)
    )


def _readers(
    program: Program, segmentation: Segmentation, parameters: set[int]
) -> Mapping[int, set[int]]:
    found: dict[int, set[int]] = {}
    for segment in segmentation.segments:
        for index in segment.forward:
            for value in program.ops[index].operands:
                if program.values[value].literal is None:
                    found.setdefault(value, set()).add(segment.index)
    through: dict[int, set[int]] = {}
    for index in reversed(segmentation.prologue):
        op = program.ops[index]
        behind: set[int] = set()
        for value in op.results:
            behind |= found.get(value, set()) | through.get(value, set())
        for value in op.operands:
            through.setdefault(value, set()).update(behind)
    for value in parameters & through.keys():
        found.setdefault(value, set()).update(through[value])
    return found
