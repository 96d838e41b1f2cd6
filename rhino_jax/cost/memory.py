"""Peak memory of a device: the real buffers of a plan, by liveness.

Inputs are there from beginning to end; an output that takes over a donated input's
memory costs nothing once that input was last read. Every other buffer lives from the
instruction that writes it to the last that reads it, or reads what is made of it
without being written (:mod:`rhino_jax.cost.fusion`). A fused instruction may write
over a buffer of the same size that it reads last, and so may an all-reduce, a scatter
and the carries of a loop. What a TPU's product does with its result in its own kernel
(:mod:`rhino_jax.cost.guests`) is written while all that the product reads stands, and
over nothing. What a body holds at most stands beside its loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from rhino_jax.cost.buffers import FUSED, Instruction, RuleOf, Unfolded, unfold
from rhino_jax.cost.fusion import Fusion, fusion
from rhino_jax.cost.guests import guests
from rhino_jax.cost.habits import PLAIN, Habits
from rhino_jax.cost.instructions import PRODUCTS
from rhino_jax.cost.order import (
    combined_at,
    gradients_at_end,
    kept_at_end,
    look_ups_at,
    products_ahead,
    products_at,
    side_inputs,
)
from rhino_jax.cost.peeled import ahead
from rhino_jax.cost.placement import Span
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program, Where

BEFORE = -1
_NAMED = 8
MIB = 2**20


WORKSPACE = frozenset(("dot_general",))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, pads of ragged shards included.

    Attributes:
        peak_bytes: inputs, outputs with memory of their own and temporaries at once.
        input_bytes: all inputs (parameters, optimizer state, batch).
        output_bytes: outputs that take over no donated input.
        temp_bytes: what stands at the peak beside the inputs.
        op: index of the op of the Program at the peak (-1: before the first).
        where: its place in the user's source.
        at_peak: the largest buffers beside the inputs at the peak, and their bytes.
    """

    peak_bytes: int
    input_bytes: int
    output_bytes: int
    temp_bytes: int
    op: int = BEFORE
    where: Where = field(default=Where())
    at_peak: tuple[tuple[str, int], ...] = ()


def memory(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    rule_of: RuleOf,
    donated: tuple[int, ...] = (),
    habits: Habits = PLAIN,
) -> Memory:
    """Peak bytes of ``program`` under ``assignment``, near linear in its ops.

    Args:
        donated: positions of inputs whose memory outputs may take over.
        habits: what the compiler adds (:data:`HABITS`).
    """
    unfolded = unfold(program, assignment, mesh, rule_of, donated, habits)
    return memory_of(Held(unfolded, fusion(unfolded, habits), habits))


def memory_of(held: Held) -> Memory:
    """:func:`memory` of what was unfolded already."""
    unfolded = held.unfolded
    inputs = sum(unfolded.buffers[b].num_bytes for b in set(unfolded.inputs))
    top = max(held.bytes_at, default=0)
    spot = held.bytes_at.index(top) if top else BEFORE
    at = unfolded.instructions[spot] if spot != BEFORE else None
    taken = {unfolded.outputs[o] for _, o in unfolded.same}
    free = {*unfolded.inputs, *taken}
    return Memory(
        inputs + top,
        inputs,
        sum(unfolded.buffers[b].num_bytes for b in {*unfolded.outputs} - free),
        top,
        at.index if at else BEFORE,
        at.where if at else Where(),
        tuple(held.named(spot)),
    )


class Held:
    """Bytes held beside the inputs during every instruction.

    ``born`` and ``dies`` are the first and the last instruction that a real buffer
    stands during; ``bytes_at`` what stands during each, with what its bodies hold.
    """

    def __init__(self, unfolded: Unfolded, fused: Fusion, habits: Habits) -> None:
        self.unfolded = unfolded
        self.fused = fused
        self.lives = lives(unfolded, fused, habits)
        self.born, self.dies = self.lives.born, self.lives.dies
        self.within = {
            i: max(
                (Held(body, fusion(body, habits), habits) for body in one.bodies),
                key=lambda body: body.peak_bytes,
            )
            for i, one in enumerate(unfolded.instructions)
            if one.bodies
        }
        self.inside = {i: body.peak_bytes for i, body in self.within.items()}
        for i, instruction in enumerate(unfolded.instructions):
            library = habits.workspace_bytes if instruction.kind in WORKSPACE else 0
            if library or instruction.extended_bytes:
                self.inside[i] = library + instruction.extended_bytes
        end = len(unfolded.instructions)
        change = [0] * (end + 2)
        for buffer, birth in self.born.items():
            size = unfolded.buffers[buffer].num_bytes
            change[max(birth, 0)] += size
            change[max(birth, self.dies[buffer] + 1)] -= size
        self.early = list(ahead(unfolded, self.within)) if habits.peels else []
        for first, i, size in self.early:
            change[first] += size
            change[i] -= size
        *held, _ = accumulate(change)
        self.bytes_at = [held[i] + self.inside.get(i, 0) for i in range(end)]

    def stays(self) -> Iterator[tuple[int, int, int]]:
        """Bytes of every memory, and its first and last instruction.

        Buffers written over one another in place are one memory.
        """
        shared = self.lives.shared
        later = set(shared.values())
        for buffer, birth in self.born.items():
            if buffer in later:
                continue
            last = buffer
            while last in shared:
                last = shared[last]
            yield self.unfolded.buffers[buffer].num_bytes, birth, self.dies[last]

    def spans(
        self,
        stays: Iterable[tuple[int, int, int]] | None = None,
        begin: int = 0,
        order: Sequence[int] | None = None,
    ) -> Iterator[Span]:
        """Everything beside the inputs with the ticks during which it stands.

        A loop's body has ticks of its own within those of its instruction.

        Args:
            stays: of the buffers outside bodies, if not :meth:`stays`.
            order: instructions as they run, if not one after the other: ``stays`` are
                then by places in it, and nothing of a peeled loop is ahead of it.
        """
        places = range(len(self.bytes_at)) if order is None else order
        ticks = [begin]
        for i in places:
            within = self.within.get(i)
            ticks.append(ticks[-1] + (within.num_ticks if within else 0) + 1)
        last = len(self.bytes_at) - 1
        for size, birth, dies in self.stays() if stays is None else stays:
            if size and dies >= birth:
                yield Span(size, ticks[max(birth, 0)], ticks[min(dies, last) + 1] - 1)
        for place, i in enumerate(places) if self.inside else ():
            if i in self.within:
                yield from self.within[i].spans(begin=ticks[place])
            elif i in self.inside:
                yield Span(self.inside[i], ticks[place], ticks[place])
        for first, i, size in self.early if order is None else ():
            yield Span(size, ticks[first], ticks[i] - 1)

    @property
    def num_ticks(self) -> int:
        bodies = self.within.values()
        return len(self.bytes_at) + sum(body.num_ticks for body in bodies)

    @property
    def peak_bytes(self) -> int:
        return max(self.bytes_at, default=0)

    def named(self, spot: int) -> Iterator[tuple[str, int]]:
        """The largest buffers held during one instruction, in its bodies too."""
        yield from sorted(self._named(spot), key=lambda pair: (-pair[1], pair[0]))[
            :_NAMED
        ]

    def _named(self, spot: int) -> Iterator[tuple[str, int]]:
        instructions = self.unfolded.instructions
        for buffer, birth in self.born.items():
            if birth <= spot <= self.dies[buffer]:
                held = self.unfolded.buffers[buffer]
                where = instructions[birth].where if birth >= 0 else Where()
                place = f" of {where}" if held.name.startswith("%") and where else ""
                yield held.name + place, held.num_bytes
        if spot in self.within:
            body = self.within[spot]
            yield from body._named(body.bytes_at.index(body.peak_bytes))
        elif self.inside.get(spot):
            yield f"workspace of {instructions[spot].kind}", self.inside[spot]


@dataclass(frozen=True)
class Lives:
    """When each real buffer but the inputs is held, by instruction.

    Attributes:
        born, dies: the first and the last. One that is written over in place dies
            before the instruction that does so.
        uses: the instructions that read it.
        shared: those that are written over in place, and what by.
        runs: instructions that compilers run at another's place, and which that is.
    """

    born: dict[int, int]
    dies: dict[int, int]
    uses: dict[int, list[int]]
    shared: dict[int, int]
    runs: Mapping[int, int]


def lives(unfolded: Unfolded, fused: Fusion, habits: Habits) -> Lives:
    """Of every real buffer. Near linear in the instructions."""
    end = len(unfolded.instructions)
    reads = [real_reads(x, fused) for x in unfolded.instructions]
    late = products_at(unfolded, habits.stores_last) if habits.late_products else {}
    kernels = _kernels(unfolded, fused, reads, late, habits)
    runs = kernels.runs
    born: dict[int, int] = {}
    dies: dict[int, int] = dict.fromkeys(unfolded.inputs, BEFORE)
    uses: dict[int, list[int]] = {}
    for index, instruction in enumerate(unfolded.instructions):
        place = runs.get(index, index)
        for buffer in reads[index]:
            dies[buffer] = max(dies.get(buffer, BEFORE), place)
            uses.setdefault(buffer, []).append(index)
        for buffer in instruction.writes:
            if fused.written[buffer]:
                born[buffer] = dies[buffer] = place
    for buffer, place in side_inputs(unfolded).items() if habits.late_products else ():
        if buffer in born:
            dies[buffer], uses[buffer] = place, [place]
    taken = {}
    for i, o in unfolded.same:
        before, after = unfolded.inputs[i], unfolded.outputs[o]
        if after in born:
            taken[after] = before, dies[before]
    for buffer in unfolded.outputs:
        dies[buffer] = end
    for buffer, (before, last) in taken.items():
        # Written straight into the old memory, or once that was last read. What a loop
        # stacks, turn by turn, is neither while it reads the old one.
        maker = unfolded.instructions[unfolded.writer[buffer]]
        apart = bool(maker.bodies) and (before, buffer) not in maker.overwrites
        until = last if last > born[buffer] or apart else born[buffer] - 1
        dies[buffer] = max(until, born[buffer] - 1)
    for index in late:  # the sum is written straight away
        (product,) = unfolded.instructions[index].writes
        if unfolded.readers[product] == (late[index],):
            dies[product] = born[product] - 1
    for buffer in _swallowed(unfolded, reads, kernels.host):
        dies[buffer] = born[buffer] - 1
    shared: dict[int, int] = {}
    summed: frozenset[int] = frozenset()
    if habits.sums_beside:
        summed = frozenset().union(*fused.reduced.values())
    for index, instruction in enumerate(unfolded.instructions):
        if index in kernels.copying:
            continue
        ends = tuple(b for b in reads[index] if b in born and dies[b] == index)
        for read, made in _in_place(
            instruction, reads[index], ends, unfolded, fused, habits
        ):
            if made in summed and instruction.role == FUSED:
                continue
            if read in ends and made in born and dies[made] >= born[made]:
                dies[read] = index - 1
                shared[read] = made
    return Lives(born, dies, uses, shared, runs)


def _made_by_library(unfolded: Unfolded, buffer: int) -> bool:
    at = unfolded.writer[buffer]
    return at >= 0 and unfolded.instructions[at].kind in PRODUCTS


@dataclass(frozen=True)
class _Kernels:
    """Which instructions leave their place in the plan, and why.

    Attributes:
        runs: where they run instead.
        host: of those done in a product's kernel, the product.
        copying: those that write nothing over what they read: combined collectives,
            kernels of products, and kernels that write several results.
    """

    runs: Mapping[int, int]
    host: Mapping[int, int]
    copying: frozenset[int]


def _kernels(
    unfolded: Unfolded,
    fused: Fusion,
    reads: list[tuple[int, ...]],
    late: Mapping[int, int],
    habits: Habits,
) -> _Kernels:
    """Where everything runs; ``late`` are products that wait for what they add to."""
    runs = combined_at(unfolded, reads, habits.combine_bytes)
    if habits.stores_last:
        runs.update(gradients_at_end(unfolded))
        runs.update(kept := kept_at_end(unfolded))
    runs.update(late)
    if habits.stores_last and kept:
        runs.update(products_ahead(unfolded, runs))
    host = dict(_hosted(unfolded, fused)) if habits.hosts else {}
    runs.update({guest: runs.get(at, at) for guest, at in host.items()})
    beside = dict(fused.beside)
    if habits.looks_up:
        beside.update(look_ups_at(unfolded, fused, host))
    runs.update(beside)
    return _Kernels(runs, host, frozenset((*runs, *beside.values())))


def _hosted(unfolded: Unfolded, fused: Fusion) -> Iterator[tuple[int, int]]:
    """Instructions done in a product's kernel, and the product: what they write has as
    many elements as its result, or is a reduction of it."""
    buffers = unfolded.buffers
    for index, at in guests(unfolded, fused).items():
        one, (made,) = unfolded.instructions[index], unfolded.instructions[at].writes
        count = buffers[made].num_elements
        if one.role != FUSED or all(
            buffers[b].num_elements == count for b in one.writes
        ):
            yield index, at


def _swallowed(
    unfolded: Unfolded, reads: list[tuple[int, ...]], hosted: Mapping[int, int]
) -> set[int]:
    """Results of products that only what is done in their kernels reads."""
    found = {b for at in hosted.values() for b in unfolded.instructions[at].writes}
    found -= {*unfolded.outputs, *unfolded.pinned}
    for index, read in enumerate(reads):
        host = hosted.get(index)
        found -= {b for b in read if unfolded.writer[b] != host}
    return found


def real_reads(instruction: Instruction, fused: Fusion) -> tuple[int, ...]:
    """The real buffers needed while an instruction runs; none if it makes none."""
    skipped = instruction.role == FUSED and instruction.writes
    if skipped and not any(fused.written[b] for b in instruction.writes):
        return ()
    return tuple({s: 0 for read in instruction.reads for s in fused.sources[read]})


def _in_place(
    instruction: Instruction,
    reads: tuple[int, ...],
    ends: tuple[int, ...],
    unfolded: Unfolded,
    fused: Fusion,
    habits: Habits,
) -> Iterator[tuple[int, int]]:
    """Pairs (read, written) of equal size that may be one memory; of what a fused
    instruction reads those that it reads last, the ``ends``."""
    buffers = unfolded.buffers
    if instruction.role != FUSED:
        yield from (
            (r, w)
            for r, w in instruction.overwrites
            if buffers[r].num_bytes == buffers[w].num_bytes
        )
        return
    # A reduction and what it reduced, in one kernel (softmax, norms): not in place.
    apart = {b for read in reads for b in fused.reduced.get(read, ())}
    if habits.workspace_bytes:  # A library gives a pair: what it makes, and scratch.
        apart.update(b for b in reads if _made_by_library(unfolded, b))
    left = [b for b in ends if b not in apart]
    for made in instruction.writes:
        if not fused.written[made]:
            continue
        size = buffers[made].num_bytes
        for read in left:
            if buffers[read].num_bytes == size:
                left.remove(read)
                yield read, made
                break
