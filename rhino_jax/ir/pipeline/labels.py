"""Where each op of a Program would like to run, given the stage of every segment.

A segment's forward and backward halves run on its stage, the updates of its parameters
too. What several segments read (masks, casts of tied parameters) and what is made of
state alone (counters, step sizes) runs wherever it is read. The rest of the epilogue
runs where most of what it reads is; single numbers (a global norm) where the last
backward half ends, on the first stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.ir.analysis.regions import BACKWARD, EPILOGUE, Regions
from rhino_jax.ir.analysis.segments import (
    EPILOGUE_OWNER,
    PROLOGUE_OWNER,
    Segmentation,
)
from rhino_jax.ir.program import Program


@dataclass(frozen=True)
class Label:
    """The stage that an op would like to run on (None: wherever what it reads is).

    ``backward``: in the backward half. ``spread``: on every stage that reads it.
    """

    stage: int | None = None
    backward: bool = False
    spread: bool = False


SPREAD = Label(spread=True)


def labels(
    program: Program,
    regions: Regions,
    segmentation: Segmentation,
    stage_of: Sequence[int],
) -> tuple[Label, ...]:
    """One label an op; ``stage_of`` has the stage of every segment."""
    found: dict[int, Label] = {}
    rest = []
    for index, owner in enumerate(segmentation.owner):
        if owner == PROLOGUE_OWNER:
            found[index] = SPREAD
        elif owner == EPILOGUE_OWNER:
            rest.append(index)
        else:
            late = regions.of[index] in (BACKWARD, EPILOGUE)
            found[index] = Label(stage_of[owner], late)
    found |= _epilogue(program, regions, segmentation, stage_of, rest)
    return tuple(found[i] for i in range(len(program.ops)))


def _epilogue(
    program: Program,
    regions: Regions,
    segmentation: Segmentation,
    stage_of: Sequence[int],
    rest: Sequence[int],
) -> dict[int, Label]:
    """Labels of ops that no single segment owns."""
    homes = _homes(program, segmentation, stage_of)
    found: dict[int, Label] = {}
    waiting = []
    for index in rest:
        op = program.ops[index]
        small = all(program.values[v].size <= 1 for v in op.results)
        if small and regions.batch.isdisjoint(op.results):
            found[index] = SPREAD
        elif small and regions.uniform.issuperset(op.results):
            found[index] = Label(0, backward=True)
        else:
            stage = _largest(program, homes, op.operands)
            if stage is None:
                waiting.append(index)
                continue
            found[index] = Label(stage, backward=True)
            homes.update(dict.fromkeys(op.results, stage))
    for index in reversed(waiting):
        readers = sorted(
            found[use].stage or 0
            for v in program.ops[index].results
            for use in program.uses.get(v, ())
            if use in found and not found[use].spread
        )
        found[index] = Label(readers[0] if readers else None, backward=True)
    return found


def _homes(
    program: Program, segmentation: Segmentation, stage_of: Sequence[int]
) -> dict[int, int]:
    """The stage of what segments make, and of the inputs they read: the first one."""
    homes: dict[int, int] = {}
    for index, owner in enumerate(segmentation.owner):
        if owner >= 0:
            op, stage = program.ops[index], stage_of[owner]
            homes.update(dict.fromkeys(op.results, stage))
            for v in op.operands:
                if v not in program.producer and program.values[v].literal is None:
                    homes[v] = min(stage, homes.get(v, stage))
    return homes


def _largest(
    program: Program, homes: Mapping[int, int], values: Iterable[int]
) -> int | None:
    """Where the largest of ``values`` is; of equals the first stage."""
    placed = [(-program.values[v].size, homes[v]) for v in values if v in homes]
    return min(placed)[1] if placed else None
