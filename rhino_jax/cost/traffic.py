"""Bytes that kernels read and write: what is read together is read once.

Compilers make one kernel of what is fused (:mod:`rhino_jax.cost.fusion`), and of
neighbours that read the same array. The rule used here puts every kernel into a *pass*:
it is one later than the last of what it reads was written. Within a pass an array is
read once. Two things share the pass they come from:

1. a reduction over the last dimensions (softmax, layer norm): who reads it does so
   while the row is still at hand. Such kernels do not share with others;
2. a reduction of what an elementwise kernel of the same pass writes.

Batch norm does neither: it reads its input for the statistics, and again for the rest.

On a TPU, what is made of a product's result is made in the product's kernel
(:mod:`rhino_jax.cost.guests`), an elementwise kernel shares the pass of another that it
reads, and an element costs as much as one of 4 bytes, however narrow it is:
``habits.lane_bytes``.

Read off kernels that XLA made of GPT, ViT and ResNet steps for an H100 and a v5e.
"""

from __future__ import annotations

from dataclasses import dataclass

from rhino_jax.cost.buffers import FUSED, REDUCING, Buffer, Instruction, Unfolded
from rhino_jax.cost.fusion import Fusion, sources_of
from rhino_jax.cost.guests import guests, swallowed
from rhino_jax.cost.habits import PLAIN, Habits
from rhino_jax.cost.instructions import PARTIAL_READERS, PRODUCTS, updates

LOOP, ROWS = "loop", "rows"


@dataclass(frozen=True)
class Moved:
    """Bytes that an instruction moves: 0 for what is made where it is read.

    ``kernel`` is the instruction (its number) whose kernel it is part of: its own,
    unless it is a guest.
    """

    num_bytes: int
    kernel: int


def traffic(
    unfolded: Unfolded, fused: Fusion, habits: Habits = PLAIN
) -> tuple[Moved, ...]:
    """What each instruction moves, and in which kernel.

    Collectives and instructions with bodies (priced by what is in them) move none
    here. Linear in instructions and what they read.
    """
    work = _Passes(unfolded, fused, habits)
    moved = map(work.moved, range(len(unfolded.instructions)))
    return tuple(Moved(n, work.host.get(i, i)) for i, n in enumerate(moved))


def _widened(buffer: Buffer, lane_bytes: int) -> int:
    """How often its bytes count where elements take ``lane_bytes`` at least."""
    return max(1, round(lane_bytes / buffer.item_bytes))


class _Passes:
    """Which pass every buffer is there for, as far as instructions were seen."""

    def __init__(self, unfolded: Unfolded, fused: Fusion, habits: Habits) -> None:
        self.unfolded = unfolded
        self.fused = fused
        self.host = guests(unfolded, fused) if habits.products_fuse else {}
        self.chains = habits.products_fuse
        self.swallowed = swallowed(unfolded, fused, self.host)
        self.size = [buffer.num_bytes for buffer in unfolded.buffers]
        wide = habits.lane_bytes
        self.times = [_widened(buffer, wide) for buffer in unfolded.buffers]
        self.ready = [0] * len(self.size)
        self.lane = [LOOP] * len(self.size)
        self.looped: dict[int, int] = {}
        """Buffers that an elementwise kernel writes -> its pass."""
        self.seen: dict[tuple[int, int, str], int] = {}

    def moved(self, number: int) -> int:
        at = self.unfolded.instructions[number]
        written = [
            b for b in at.writes if self.fused.written[b] and b not in self.swallowed
        ]
        if at.bodies or (at.step and at.step.wire_bytes):
            self.put(at, 1 + self.latest(at))
            return 0
        if at.role not in (FUSED, REDUCING) or updates(at.kind):
            self.put(at, 1 + self.latest(at))
            reads = [self.read(at, b) for b in at.reads]
            made = sum(self.size[b] for b in at.writes)
            return whole_bytes(at.kind, reads, [self.size[b] for b in written], made)
        if at.writes and not written:
            self.put(at, self.latest(at), self.lane_of(at))
            return 0
        made = sum(self.times[b] * self.size[b] for b in written)
        return self.kernel(number) + made

    def read(self, at: Instruction, buffer: int) -> int:
        """What an op of its own reads of an operand: nothing where that was a fused
        update; what it is made of where a product makes it as it goes."""
        if self.fused.written[buffer]:
            return self.size[buffer]
        sources = self.fused.sources[buffer]
        return sum(sources.values()) if at.kind in PRODUCTS else 0

    def kernel(self, number: int) -> int:
        """What a kernel of its own, or a guest, reads that its pass has not read."""
        at = self.unfolded.instructions[number]
        made_bytes = sum(self.size[b] for b in at.writes)
        sources = sources_of(at, self.fused.sources, made_bytes)
        over_rows = _over_rows(at)
        inside = {}
        if at.role == REDUCING or self.chains:
            inside = {s: self.looped[s] for s in sources if s in self.looped}
        when = max((inside.get(s, self.ready[s]) for s in sources), default=0)
        lane = ROWS if over_rows else self.lane_of(at)
        read = 0
        for source, real_bytes in sources.items():
            if inside.get(source) == when or self.at_hand(number, source):
                continue
            num_bytes = self.times[source] * real_bytes
            key = (source, when, lane)
            read += max(0, num_bytes - self.seen.get(key, 0))
            self.seen[key] = max(num_bytes, self.seen.get(key, 0))
        self.put(at, when if over_rows else when + 1, ROWS if over_rows else LOOP)
        if at.role == FUSED and lane == LOOP:
            self.looped.update(dict.fromkeys(at.writes, when))
        return read

    def at_hand(self, number: int, source: int) -> bool:
        """Whether a guest finds a buffer in the kernel that it is part of."""
        if number not in self.host:
            return False
        maker = self.unfolded.writer[source]
        return self.host.get(maker, maker) == self.host[number]

    def latest(self, at: Instruction) -> int:
        return max((self.ready[b] for b in at.reads), default=0)

    def lane_of(self, at: Instruction) -> str:
        """Rows if what is read last is a row's reduction of the same pass."""
        when = self.latest(at)
        last = (b for b in at.reads if self.ready[b] == when)
        return ROWS if any(self.lane[b] == ROWS for b in last) else LOOP

    def put(self, at: Instruction, when: int, lane: str = LOOP) -> None:
        for b in at.writes:
            self.ready[b], self.lane[b] = when, lane


def whole_bytes(kind: str, reads: list[int], writes: list[int], made: int) -> int:
    """Bytes that an op of its own moves, given those of what it reads and writes.

    ``made`` are those of its results, written or not.

    >>> whole_bytes("dot_general", [8, 8], [4], 4), whole_bytes("slice", [80], [8], 8)
    (20, 16)
    """
    if kind in PARTIAL_READERS:
        return sum(min(read, made) for read in reads) + sum(writes)
    if updates(kind):
        # Written in place: what changes is read and written, the rest is left.
        rest = sum(reads[1:])
        return rest + min(rest, sum(writes))
    return sum(reads) + sum(writes)


def _over_rows(at: Instruction) -> bool:
    """Whether a reduction is over the last dimensions of what it reads."""
    if at.role != REDUCING or at.op is None:
        return False
    axes = at.op.param.get("axes", ())
    rank = len(at.program.values[at.op.operands[0]].shape)
    return bool(axes) and sorted(axes) == list(range(rank - len(axes), rank))
