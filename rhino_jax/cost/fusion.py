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
4. several read it, and it is dear to make (``habits.dear``): it is written;
5. a look-up that is a kernel of its own reads it (``habits.looks_up``): it is written
   for that one alone, and of its other readers all else here is true. Rows of a
   parameter, and what is made of them, are written where several read them: the table
   need not stand.

On a TPU a product or convolution counts as a fused reader (``habits.products_fuse``):
it makes what it reads as it goes. What is put together of several arrays it does not:
that is written (the stack of looked-up rows before their products with one another).
What only products of two matrices read, and no more than ``habits.remade`` of them, is
never written, whatever it is made of (``gelu(gate) * up``). For products of many
matrices at once, attention's, this is not counted on: what is made there is not written
either, but copies as large of queries, keys and values in other layouts are.

A kernel that makes something dear on its way to a result writes what a product reads of
it, too (``habits.joins``): where scores have a bias to learn, their gradient is written
for its sum over the batch, and the probabilities beside it.

What is not written is made again where it is read, so what *it* is made of must still
be there: a saved ``gelu(x)`` that is never written keeps ``x`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.cost.buffers import (
    FUSED,
    OPAQUE,
    PARTIAL_READERS,
    REDUCING,
    Instruction,
    Unfolded,
)
from rhino_jax.cost.habits import PLAIN, Habits
from rhino_jax.cost.instructions import CONVERTS, PRODUCTS, multiplies_one

AGAIN = 1.05
REPEATED_RARELY = frozenset("div exp log log1p pow rsqrt sqrt tanh erf".split())
"""XLA's ``InstructionFusion::IsExpensive``, in short."""
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
    beside: Mapping[int, int] = field(default_factory=dict)
    """What is made on the way to another result -> the instruction beside whose result
    it is written."""


def fusion(unfolded: Unfolded, habits: Habits = PLAIN) -> Fusion:
    """The rule above, over all buffers. Linear in the instructions."""
    count = len(unfolded.buffers)
    size = [buffer.num_bytes for buffer in unfolded.buffers]
    demanded = [False] * count
    multiplied: set[int] = set()
    looked_up: set[int] = set()
    rows: set[int] = set()
    """What is made of rows of a table."""

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
        elif instruction.kind == "gather" and habits.looks_up:
            looked_up.add(instruction.reads[0])
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
            of_rows = habits.looks_up and (
                _takes_rows(unfolded, instruction)
                or not rows.isdisjoint(instruction.reads)
            )
            dear = of_rows or instruction.kind in habits.dear
            only = readers <= habits.remade and all(
                multiplies_one(unfolded.instructions[i]) for i in unfolded.readers[made]
            )
            cheap = not dear and (only or again <= AGAIN * size[made] * others)
            if readers <= 1 or cheap:
                written[made] = made in looked_up
                sources[made] = found
                if of_rows:
                    rows.add(made)
    plain = Fusion(tuple(written), tuple(sources), reduced)
    return _joined(unfolded, plain, multiplied) if habits.joins else plain


def _takes_rows(unfolded: Unfolded, one: Instruction) -> bool:
    """Whether it looks up what is given: a parameter, gathered or converted or not."""
    if one.kind != "gather" or one.step is not None:
        return False
    at = unfolded.writer[one.reads[0]]
    while at >= 0:
        maker = unfolded.instructions[at]
        if maker.kind not in CONVERTS and maker.step is None:
            return False
        at = unfolded.writer[maker.reads[0]]
    return True


def _joined(unfolded: Unfolded, fused: Fusion, multiplied: set[int]) -> Fusion:
    """With what shares something dear with a result that is written after a reduction
    (the gradient of a softmax), where a product that can wait for it reads it: the
    result's kernel writes both."""
    written, sources, reduced = [*fused.written], fused.sources, fused.reduced
    dear: dict[int, frozenset[int]] = {}
    """What is not written -> the dear values that making it takes."""
    operands: dict[int, list[int]] = {}
    """Dear value -> what products read of those made of it."""
    found: dict[int, int] = {}
    for index, one in enumerate(unfolded.instructions):
        if one.role != FUSED or len(one.writes) != 1:
            continue
        (made,) = one.writes
        taken = frozenset[int]().union(*(dear[b] for b in one.reads if b in dear))
        if not written[made]:
            if one.kind in REPEATED_RARELY:
                taken |= {made}
            if taken:
                dear[made] = taken
            if made in multiplied:
                for value in taken:
                    operands.setdefault(value, []).append(made)
            continue
        readers = (unfolded.instructions[i].kind for i in unfolded.readers[made])
        if not taken or all(kind in PRODUCTS for kind in readers):
            continue
        count = unfolded.buffers[made].num_elements
        read = {s for b in one.reads for s in sources[b]}
        waits = {s for b in read for s in reduced.get(b, ())} & read
        shared = (v for v in taken if unfolded.buffers[v].num_elements == count)
        for other in {b for value in shared for b in operands.get(value, ())}:
            alike = unfolded.buffers[other].num_elements == count
            new = waits - sources[other].keys()
            since = min((_possible(unfolded, sources, s) for s in new), default=index)
            if alike and unfolded.readers[other][-1] > since:
                written[other] = True
                found[unfolded.writer[other]] = index
    return replace(fused, written=tuple(written), beside=found)


def _possible(
    unfolded: Unfolded, sources: Sequence[Mapping[int, int]], buffer: int
) -> int:
    """The last instruction that what makes a buffer must wait for."""
    at = unfolded.writer[buffer]
    reads = unfolded.instructions[at].reads if at >= 0 else ()
    return max((unfolded.writer[s] for b in reads for s in sources[b]), default=-1)


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
