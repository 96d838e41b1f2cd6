"""What is expected of a plan's memory once it is compiled.

:mod:`rhino_jax.cost.memory` says what stands as the program is written. A compiler adds
gaps between buffers (:mod:`rhino_jax.cost.placement`), and recomputes by itself where
its limit is passed (:mod:`rhino_jax.cost.recompute`).
"""

from __future__ import annotations

from dataclasses import dataclass

from rhino_jax.cost.habits import Habits
from rhino_jax.cost.memory import Held, Memory
from rhino_jax.cost.placement import peak_bytes, placed_bytes
from rhino_jax.cost.recompute import recomputed

DOUBTFUL = 0.75
"""Gaps between buffers are less than a third of what stands."""


@dataclass(frozen=True)
class Compiled:
    """Bytes on one device, inputs and outputs included.

    Attributes:
        placed_bytes: what the program needs as it is written, gaps included.
        peak_bytes: what stands at once in the compiled program.
        needed_bytes: what the compiler sets aside for it, gaps included.
        recomputed: instructions that it repeats or moves by itself.
    """

    placed_bytes: int
    peak_bytes: int
    needed_bytes: int
    recomputed: int = 0


def compiled(
    held: Held,
    memory: Memory,
    habits: Habits,
    device_bytes: int,
    limit_bytes: int | None = None,
) -> Compiled:
    """What a compiler is expected to make of a plan for a device of so much memory.

    Args:
        limit_bytes: what is asked is only whether ``placed_bytes`` is within it: no
            more is done than that takes.
    """
    top = memory.peak_bytes
    if limit_bytes is not None and not DOUBTFUL * limit_bytes < top <= limit_bytes:
        return Compiled(top, top, top)
    spans = list(held.spans())
    placed = memory.input_bytes + placed_bytes(spans)
    room = habits.temporaries_bytes(
        device_bytes, memory.input_bytes + memory.output_bytes
    )
    if limit_bytes is not None or room is None or held.peak_bytes <= room:
        return Compiled(placed, top, placed)
    found = recomputed(held, room)
    stays = ((s.num_bytes, s.first, s.last_held()) for s in found.stands)
    spans = list(held.spans(stays, order=found.order))
    less = memory.input_bytes + peak_bytes(spans)
    if less >= top:
        return Compiled(placed, top, placed)
    return Compiled(placed, less, memory.input_bytes + placed_bytes(spans), found.count)
