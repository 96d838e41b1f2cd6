"""Which buffers of an unfolded plan are real.

Compilers do not write what a fused reader can make again as cheaply as it can read it.
The rule used here, for a buffer that a *fused* instruction makes:

1. an opaque instruction reads it, or it is an output: it is written, but for a
   broadcast literal that a loop reads, which is made inside;
2. nobody reads it, or one instruction does: it is not written;
3. several read it: it is not written if that moves hardly more bytes
   (:data:`AGAIN`). Written, it costs a write and a read by each reader but the first,
   who finds it where it is made; not written, each of these reads again what it is
   made of;
4. several read it, and it is dear to make (``habits.dear``): it is written.

On a TPU a product or convolution counts as a fused reader (``habits.products_fuse``):
it makes what it reads as it goes. What is put together of several arrays it does not:
that is written (the stack of looked-up rows before their products with one another).

What is not written is made again where it is read, so what *it* is made of must still
be there: a saved ``gelu(x)`` that is never written keeps ``x`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.cost.buffers import (
    FUSED,
    OPAQUE,
    PARTIAL_READERS,
    REDUCING,
    Instruction,
    Unfolded,
)
from rhino_jax.cost.habits import PLAIN, Habits
from rhino_jax.cost.instructions import PRODUCTS

AGAIN = 1.05
MOST_SOURCES = 24
"""A fusion that would read more buffers than this is cut."""


@dataclass(frozen=True)
class Fusion:
    """What is real.

    Attributes:
        written: for each buffer, whether it is real.
        sources: what reading a buffer reads: real buffers, and the bytes of each.
        reduced: of a reduction's result, the real buffers that were reduced.
    """

    written: tuple[bool, ...]
    sources: tuple[Mapping[int, int], ...]
    reduced: Mapping[int, frozenset[int]]


def fusion(unfolded: Unfolded, habits: Habits = PLAIN) -> Fusion:
    """The rule above, over all buffers. Linear in the instructions."""
    count = len(unfolded.buffers)
    size = [buffer.num_bytes for buffer in unfolded.buffers]
    demanded = [False] * count
    multiplied: set[int] = set()

    def constant(buffer: int) -> bool:
        at = unfolded.writer[buffer]
        return at >= 0 and unfolded.instructions[at].constant is not None

    def stacked(buffer: int) -> bool:
        at = unfolded.writer[buffer]
        return at >= 0 and unfolded.instructions[at].kind == "stack"

    for instruction in unfolded.instructions:
        fuses = habits.products_fuse and instruction.kind in PRODUCTS
        if fuses:
            multiplied.update(instruction.reads)
            for buffer in instruction.reads:
                demanded[buffer] |= stacked(buffer)
        elif instruction.role == OPAQUE:
            for buffer in instruction.reads:
                demanded[buffer] |= not (instruction.bodies and constant(buffer))
    for buffer in (*unfolded.inputs, *unfolded.outputs, *unfolded.pinned):
        demanded[buffer] = True
    ends = _ends(unfolded, demanded)
    written = [True] * count
    sources: list[Mapping[int, int]] = [{b: size[b]} for b in range(count)]
    reduced: dict[int, frozenset[int]] = {}
    for instruction in unfolded.instructions:
        if instruction.role == REDUCING:
            read = frozenset(s for b in instruction.reads for s in sources[b])
            reduced.update(dict.fromkeys(instruction.writes, read))
        if instruction.role != FUSED:
            continue
        for made in instruction.writes:
            found = sources_of(instruction, sources, size[made])
            readers = len({ends[reader] for reader in unfolded.readers[made]})
            again = sum(found.values()) * (readers - 1)
            # A product does not find it where it is made: every one reads it.
            others = readers - 1 if made in multiplied else readers
            if demanded[made] or len(found) > MOST_SOURCES:
                continue
            dear = instruction.kind in habits.dear
            if readers <= 1 or (not dear and again <= AGAIN * size[made] * others):
                written[made] = False
                sources[made] = found
    return Fusion(tuple(written), tuple(sources), reduced)


def _ends(unfolded: Unfolded, demanded: Sequence[bool]) -> list[int]:
    """Instruction -> the one whose kernel it is part of, if all roads lead there.

    An instruction of several kernels, or that makes what is written, ends in itself.
    """
    ends = list(range(len(unfolded.instructions)))
    for index in reversed(ends):
        one = unfolded.instructions[index]
        if one.role == FUSED and not any(demanded[made] for made in one.writes):
            found = {ends[r] for made in one.writes for r in unfolded.readers[made]}
            if len(found) == 1:
                ends[index] = found.pop()
    return ends


def sources_of(
    instruction: Instruction, sources: Sequence[Mapping[int, int]], made_bytes: int
) -> dict[int, int]:
    """What making ``made_bytes`` reads: each source once, no more than is used of it.

    ``sources``: of each buffer, as :class:`Fusion` has them.
    """
    part = instruction.kind in PARTIAL_READERS
    found: dict[int, int] = {}
    for read in instruction.reads:
        for source, num_bytes in sources[read].items():
            used = min(num_bytes, made_bytes) if part else num_bytes
            found[source] = max(found.get(source, 0), used)
    return found
