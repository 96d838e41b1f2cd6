"""When each real buffer of a plan is held.

A buffer lives from the instruction that writes it to the last that reads it, or reads
what is made of it without being written (:mod:`rhino_jax.cost.fusion`); compilers run
some instructions elsewhere than the plan has them (:mod:`rhino_jax.cost.order`). A
fused instruction may write over a buffer of the same size that it reads last, and so
may an all-reduce, a scatter and the carries of a loop. What a TPU's product does with
its result in its own kernel (:mod:`rhino_jax.cost.guests`) is written while all that
the product reads stands, and over nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rhino_jax.cost.buffers import FUSED, Instruction, Unfolded
from rhino_jax.cost.fusion import Fusion
from rhino_jax.cost.guests import guests
from rhino_jax.cost.habits import Habits
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

BEFORE = -1
"""Where inputs are written."""


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
        tried = reads[index] if habits.tries_first else ends
        for read, made in _in_place(
            instruction, reads[index], tried, unfolded, fused, habits
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
    tried: tuple[int, ...],
    unfolded: Unfolded,
    fused: Fusion,
    habits: Habits,
) -> Iterator[tuple[int, int]]:
    """Pairs (read, written) of equal size that may be one memory; of what a fused
    instruction reads the first one ``tried``."""
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
    left = [b for b in tried if b not in apart]
    for made in instruction.writes:
        if not fused.written[made]:
            continue
        size = buffers[made].num_bytes
        for read in left:
            if buffers[read].num_bytes == size:
                left.remove(read)
                yield read, made
                break
