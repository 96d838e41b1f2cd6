"""Bytes that kernels read and write: what is read together is read once.

Compilers make one kernel of what is fused (:mod:`rhino_jax.cost.fusion`), and of
neighbours that read the same array. The rule used here puts every kernel into a *pass*:
it is one later than the last of what it reads was written. Within a pass an array is
read once. Two things share the pass they come from:

1. a reduction over the last dimensions (softmax, layer norm): who reads it does so
   while the row is still at hand. Such kernels do not share with others;
2. a reduction of what an elementwise kernel of the same pass writes.

Batch norm does neither: it reads its input for the statistics, and again for the rest.

Read off kernels that XLA made of GPT, ViT and ResNet steps for an H100.
"""

from __future__ import annotations

from rhino_jax.cost.buffers import FUSED, REDUCING, Instruction, Unfolded
from rhino_jax.cost.fusion import Fusion, sources_of
from rhino_jax.cost.instructions import PARTIAL_READERS, PRODUCTS, updates

LOOP, ROWS = "loop", "rows"


def traffic(unfolded: Unfolded, fused: Fusion) -> tuple[int, ...]:
    """Bytes that each instruction moves: 0 for what is part of another's kernel.

    Collectives and instructions with bodies (priced by what is in them) move none
    here. Linear in instructions and what they read.
    """
    work = _Passes(unfolded, fused)
    return tuple(map(work.moved, unfolded.instructions))


class _Passes:
    """Which pass every buffer is there for, as far as instructions were seen."""

    def __init__(self, unfolded: Unfolded, fused: Fusion) -> None:
        self.fused = fused
        self.size = [buffer.num_bytes for buffer in unfolded.buffers]
        self.ready = [0] * len(self.size)
        self.lane = [LOOP] * len(self.size)
        self.looped: dict[int, int] = {}
        """Buffers that an elementwise kernel writes -> its pass."""
        self.seen: dict[tuple[int, int, str], int] = {}

    def moved(self, at: Instruction) -> int:
        written = [b for b in at.writes if self.fused.written[b]]
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
        return self.kernel(at) + sum(self.size[b] for b in written)

    def read(self, at: Instruction, buffer: int) -> int:
        """What an op of its own reads of an operand: nothing where that was a fused
        update; what it is made of where a product makes it as it goes."""
        if self.fused.written[buffer]:
            return self.size[buffer]
        sources = self.fused.sources[buffer]
        return sum(sources.values()) if at.kind in PRODUCTS else 0

    def kernel(self, at: Instruction) -> int:
        """What a kernel of its own reads that its pass has not read before."""
        made_bytes = sum(self.size[b] for b in at.writes)
        sources = sources_of(at, self.fused.sources, made_bytes)
        over_rows = _over_rows(at)
        inside = {}
        if at.role == REDUCING:
            inside = {s: self.looped[s] for s in sources if s in self.looped}
        when = max((inside.get(s, self.ready[s]) for s in sources), default=0)
        lane = ROWS if over_rows else self.lane_of(at)
        read = 0
        for source, num_bytes in sources.items():
            if inside.get(source) == when:
                continue
            key = (source, when, lane)
            read += max(0, num_bytes - self.seen.get(key, 0))
            self.seen[key] = max(num_bytes, self.seen.get(key, 0))
        self.put(at, when if over_rows else when + 1, ROWS if over_rows else LOOP)
        if at.role == FUSED and lane == LOOP:
            self.looped.update(dict.fromkeys(at.writes, when))
        return read

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
