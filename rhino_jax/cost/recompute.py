"""What a compiler recomputes by itself where a program does not fit.

XLA's ``HloRematerialization`` walks through the schedule, and where more stands than a
limit allows it looks for one buffer not needed right now whose instruction it can
repeat before the next reader: that which frees most, after what the repetition keeps
alive is taken off. An instruction that nothing has read yet is simply moved there.
Library calls (matrix products), collectives and loops are not repeated.

On a GPU the limit on what stands beside inputs and outputs is 95 % of what they leave
of 80 % of its memory (``xla_gpu_memory_limit_slop_factor`` and
``GetSchedulerMemoryLimit`` in ``gpu_hlo_schedule.cc``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rhino_jax.cost.instructions import FUSED, REDUCING
from rhino_jax.cost.memory import Held, real_reads

REPEATED = frozenset((FUSED, REDUCING))


@dataclass
class Stand:
    """One stay of a buffer: from its writer, or its repetition, to the last reader."""

    buffer: int
    num_bytes: int
    first: int
    last: int
    uses: list[int]
    """Readers, in order."""
    sources: tuple[int, ...]
    """What repeating it reads."""
    shared: bool
    """The last reader writes over it."""
    movable: bool

    def last_held(self) -> int:
        return self.last - self.shared


def recomputed(held: Held, limit_bytes: int) -> tuple[list[Stand], int]:
    """Stays of all buffers once what stands beside inputs and outputs is cut down.

    And how many instructions were repeated or moved for it. Where nothing more can be,
    it remains over the limit.
    """
    stands = list(_stands(held))
    outputs = set(held.unfolded.outputs)
    usage = np.zeros(len(held.bytes_at) + 1, np.int64)
    for i, size in held.inside.items():
        usage[i] += size
    for one in stands:
        if one.buffer not in outputs:
            usage[one.first : one.last + 1] += one.num_bytes
    by_buffer: dict[int, list[Stand]] = {}
    count = 0
    for one in stands:
        by_buffer.setdefault(one.buffer, []).append(one)
    for now in range(len(held.bytes_at)):
        while usage[now] > limit_bytes:
            found = _best(stands, by_buffer, now, limit_bytes, outputs)
            if found is None:
                break
            again = _repeat(found, by_buffer, usage, now)
            stands.append(again)
            count += 1
            if not found.uses:
                stands.remove(found)
    return stands, count


def _stands(held: Held) -> Iterator[Stand]:
    unfolded, lives = held.unfolded, held.lives
    kept = {*unfolded.outputs, *unfolded.inputs}
    for buffer, first in lives.born.items():
        size, last = unfolded.buffers[buffer].num_bytes, lives.dies[buffer]
        shared = buffer in lives.shared
        if not size or (last < first and not shared):
            continue
        made_by = unfolded.instructions[unfolded.writer[buffer]]
        uses = sorted(set(lives.uses.get(buffer, ())))
        yield Stand(
            buffer,
            size,
            max(first, 0),
            last + shared,
            uses,
            real_reads(made_by, held.fused),
            shared,
            made_by.role in REPEATED and buffer not in kept and bool(uses),
        )


def _standing(by_buffer: dict[int, list[Stand]], buffer: int, now: int) -> bool:
    return any(s.first <= now <= s.last for s in by_buffer.get(buffer, ()))


def _best(
    stands: list[Stand],
    by_buffer: dict[int, list[Stand]],
    now: int,
    limit_bytes: int,
    outputs: set[int],
) -> Stand | None:
    best: tuple[int, int] | None = None
    found = None
    for order, one in enumerate(stands):
        if not one.movable or not one.first < now < one.last or now in one.uses:
            continue
        lost = sum(
            by_buffer[s][0].num_bytes
            for s in one.sources
            if s in by_buffer and s not in outputs and not _standing(by_buffer, s, now)
        )
        freed = one.num_bytes - lost
        if freed <= 0:
            continue
        cost = limit_bytes // freed if one.uses[0] < now else 0
        if best is None or (cost, order) < best:
            best, found = (cost, order), one
    return found


def _repeat(
    one: Stand, by_buffer: dict[int, list[Stand]], usage: np.ndarray, now: int
) -> Stand:
    before = [use for use in one.uses if use < now]
    after = [use for use in one.uses if use > now]
    moved = not before
    again = Stand(
        one.buffer,
        one.num_bytes,
        after[0],
        one.last,
        after,
        one.sources,
        one.shared,
        not moved,
    )
    end = before[-1] if before else one.first - 1
    usage[end + 1 : again.first] -= one.num_bytes
    one.last, one.uses, one.shared = end, before, False
    by_buffer[one.buffer].append(again)
    for source in one.sources:
        stays = [s for s in by_buffer.get(source, ()) if s.first <= again.first]
        if not stays:
            continue
        stay = max(stays, key=lambda s: s.first)
        if stay.last < again.first:
            usage[stay.last + 1 : again.first + 1] += stay.num_bytes
            stay.last, stay.shared = again.first, False
        if again.first not in stay.uses:
            stay.uses = sorted([*stay.uses, again.first])
    return again
