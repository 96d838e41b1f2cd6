"""What a compiler recomputes by itself where a program does not fit.

XLA's ``HloRematerialization`` walks through the schedule, and where more stands than a
limit allows it looks for one buffer not needed right now whose instruction it can
repeat before the next reader: that which frees most, after what the repetition keeps
alive is taken off. An instruction that nothing has read yet is simply moved there.
The repetition runs before whatever next reads what it reads itself, so that none of
this stands longer for it; what it makes then stands from there, and may be repeated
once more. Collectives and loops are not repeated, nor library calls (a GPU's matrix
products). A TPU's compiler was seen to repeat products of two matrices and convolutions
(``habits.repeats_products``), not products of many matrices at once.

On a GPU the limit on what stands beside inputs and outputs is 95 % of what they leave
of 80 % of its memory (``xla_gpu_memory_limit_slop_factor`` and
``GetSchedulerMemoryLimit`` in ``gpu_hlo_schedule.cc``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rhino_jax.cost.instructions import FUSED, REDUCING, Instruction, multiplies_one
from rhino_jax.cost.lives import real_reads
from rhino_jax.cost.memory import Held

REPEATED = frozenset((FUSED, REDUCING))


@dataclass(eq=False)
class Stand:
    """One stay of a buffer: from its writer, or its repetition, to the last reader.

    Instructions are named by their places in the order in which they run.
    """

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
    moved: bool = False
    """It was not read before it was repeated."""

    def last_held(self) -> int:
        return self.last - self.shared


@dataclass(frozen=True)
class Recomputed:
    """What stands once a compiler has cut it down to a limit, as far as it can.

    Attributes:
        order: instructions as they run.
        stands: all stays, by places in ``order``.
        count: how many instructions were repeated or moved.
    """

    order: tuple[int, ...]
    stands: list[Stand]
    count: int


def recomputed(held: Held, limit_bytes: int) -> Recomputed:
    """What stands beside inputs and outputs, cut down to a limit if that can be."""
    walk = _Walk(held, limit_bytes)
    for now in range(len(walk.order)):
        while walk.usage[now] > limit_bytes and (found := walk.best(now)):
            walk.repeat(found, now)
    return Recomputed(walk.order, walk.stands, walk.count)


def in_order(held: Held) -> tuple[int, ...]:
    """Instructions as they run: those at one place in the order of the program."""
    runs = held.lives.runs
    return tuple(sorted(range(len(held.bytes_at)), key=lambda i: (runs.get(i, i), i)))


@dataclass
class _Walk:
    held: Held
    limit_bytes: int
    order: tuple[int, ...] = ()
    place: dict[int, int] = field(default_factory=dict)
    """Instruction -> where it runs."""
    stands: list[Stand] = field(default_factory=list)
    by_buffer: dict[int, list[Stand]] = field(default_factory=dict)
    readers: dict[int, set[int]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        self.order = in_order(self.held)
        self.place = {i: place for place, i in enumerate(self.order)}
        self.outputs = set(self.held.unfolded.outputs)
        self.readers = {
            buffer: {self.place[i] for i in uses}
            for buffer, uses in self.held.lives.uses.items()
        }
        self.stands = sorted(self.as_written(), key=lambda one: one.first)
        self.usage = np.zeros(len(self.order) + 1, np.int64)
        for i, size in self.held.inside.items():
            self.usage[self.place[i]] += size
        for one in self.stands:
            self.by_buffer.setdefault(one.buffer, []).append(one)
            if one.buffer not in self.outputs:
                self.usage[one.first : one.last + 1] += one.num_bytes

    def as_written(self) -> Iterator[Stand]:
        unfolded, lives = self.held.unfolded, self.held.lives
        kept = {*unfolded.outputs, *unfolded.inputs}
        until: dict[int, int] = {}
        """Place in the program -> the last that runs there."""
        for place, i in enumerate(self.order):
            until[lives.runs.get(i, i)] = place
        for buffer, first in lives.born.items():
            size, last = unfolded.buffers[buffer].num_bytes, lives.dies[buffer]
            shared = buffer in lives.shared
            if not size or (last < first and not shared):
                continue
            made_by = unfolded.instructions[unfolded.writer[buffer]]
            begin = self.place[unfolded.writer[buffer]]
            uses = sorted(self.readers.get(buffer, ()))
            if buffer in self.outputs:
                end = until.get(last, len(self.order) - 1)
            else:
                end = uses[-1] if uses else begin
            yield Stand(
                buffer,
                size,
                begin,
                end,
                uses,
                real_reads(made_by, self.held.fused),
                shared,
                self.repeats(made_by) and buffer not in kept and bool(uses),
            )

    def repeats(self, one: Instruction) -> bool:
        """Whether the compiler may run an instruction once more."""
        products = self.held.habits.repeats_products
        return one.role in REPEATED or (products and multiplies_one(one))

    def best(self, now: int) -> Stand | None:
        """What frees most if it is repeated later; the earliest of equals."""
        lowest, found = None, None
        for one in self.stands:
            if not one.first < now < one.last or not one.movable or now in one.uses:
                continue
            freed = one.num_bytes - sum(self.lost(one, now))
            if freed <= 0:
                continue
            cost = self.limit_bytes // freed if one.uses[0] < now else 0
            if lowest is None or cost < lowest:
                lowest, found = cost, one
        return found

    def lost(self, one: Stand, now: int) -> Iterator[int]:
        """Bytes that would have to stand now to repeat ``one`` later."""
        for source in one.sources:
            stays = self.by_buffer.get(source)
            if stays and source not in self.outputs:
                if not any(s.first <= now <= s.last for s in stays):
                    yield stays[0].num_bytes

    def repeat(self, one: Stand, now: int) -> None:
        before = [use for use in one.uses if use < now]
        after = [use for use in one.uses if use > now]
        place = after[0]
        for source in one.sources:
            later = (use for use in self.readers.get(source, ()) if use > now)
            place = min(place, min(later, default=place))
        again = Stand(
            one.buffer,
            one.num_bytes,
            place,
            one.last,
            after,
            one.sources,
            one.shared,
            bool(before) or not one.moved,
            not before,
        )
        end = before[-1] if before else one.first - 1
        self.usage[end + 1 : again.first] -= one.num_bytes
        one.last, one.uses, one.shared = end, before, False
        for source in one.sources:
            self.extend(source, place)
            self.readers.setdefault(source, set()).add(place)
        self.by_buffer[one.buffer].append(again)
        at = next((i for i, s in enumerate(self.stands) if s.first >= place), None)
        self.stands.insert(len(self.stands) if at is None else at, again)
        if not before:
            self.stands.remove(one)
            self.by_buffer[one.buffer].remove(one)
        self.count += 1

    def extend(self, source: int, place: int) -> None:
        """Let what is read stand until ``place``."""
        stays = [s for s in self.by_buffer.get(source, ()) if s.first <= place]
        if not stays:
            return
        stay = max(stays, key=lambda s: s.first)
        if stay.last < place:
            if source not in self.outputs:
                self.usage[stay.last + 1 : place + 1] += stay.num_bytes
            stay.last, stay.shared = place, False
        if place not in stay.uses:
            stay.uses = sorted([*stay.uses, place])
