"""Where compilers leave the order of the plan: what runs later, or earlier.

**Combined collectives.** XLA joins collectives of one kind over the same devices into
one, up to a size of its results (``xla_gpu_*_combine_threshold_bytes``). What the first
one reads then waits for the last: full gradients stand side by side until one
reduce-scatter takes them all. The rule used here, in the order of the plan: a
collective joins the open group of its kind if nothing reads a result of the group
before it (all then run where it stands), or if what it reads was there when the group
began (all then run where that stands).

**Products that add.** A matrix product whose result is only added to something becomes
one library call that adds (``beta = 1``). It waits for what it is added to: the logits'
gradient of a tied embedding is kept until the look-up's gradient is there too. Where
there is a conversion between the two it is not one call, and waits only where something
is sent behind it, to be hidden: not in a loop over microbatches.

**Convolutions that add.** Of two that are added the later one adds the other.

**Gradients of weights.** Nothing waits for them but a reduction over devices, and for
that the optimizer: they run last, and all that they read stands until then. (With
nothing to reduce they run as soon as they can.) In a loop over microbatches those that
are added to an accumulator run at its end, if anything moves between devices in it.

**Products that a loop stores.** They run at the end of its body. And what only products
read that run later than they stand runs right before them: the values' gradient of an
attention, behind those of its scores, so that the shares stand beside both.

**Loops that store what they reduce** (:func:`stores_reduced`). Their first turn is
peeled off (:mod:`rhino_jax.cost.peeled`).

**Labels on a TPU.** What is written for a look-up that only results wait for (a loss,
which no gradient reads) is not in a hurry: the kernel that makes the gradient of it
writes it too. What is larger than :data:`JOINED_BYTES` was seen written by itself, at
the end of the program; it is counted where the plan has it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from rhino_jax.cost.buffers import Unfolded
from rhino_jax.cost.fusion import Fusion
from rhino_jax.cost.instructions import (
    ADDS,
    CONVERTS,
    FUSED,
    PARTIAL_READERS,
    PRODUCTS,
    REDUCING,
    STORE,
    Instruction,
)
from rhino_jax.ir.steps import ALL_GATHER, ALL_REDUCE, FREE, REDUCE_SCATTER

JOINED_BYTES = 2**32
"""The largest array that a kernel writes beside another one (seen: 3.9 GiB joined, 4.9
not)."""
COMBINED = frozenset((ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER))


@dataclass
class _Group:
    members: list[int] = field(default_factory=list)
    num_bytes: int = 0
    first_read: int = 0


def combined_at(
    unfolded: Unfolded, reads: list[tuple[int, ...]], threshold_bytes: int
) -> dict[int, int]:
    """Collective -> the instruction at whose place it runs; only those in groups.

    Args:
        reads: for each instruction the real buffers that it needs.
        threshold_bytes: the most a group's results may have; 0 combines nothing.
    """
    first_read, ready = _first_reads(unfolded, reads), unfolded.writer
    open_groups: dict[tuple[object, ...], _Group] = {}
    found: dict[int, int] = {}
    for index, instruction in enumerate(unfolded.instructions):
        step = instruction.step
        if step is None or step.kind not in COMBINED or not threshold_bytes:
            continue
        if instruction.within is not None:
            continue
        (source,), (made,) = instruction.reads, instruction.writes
        num_bytes = unfolded.buffers[made].num_bytes
        operators = tuple(dict(step.source.partial).get(axis) for axis in step.axes)
        key = step.kind, step.axes, operators
        group = open_groups.get(key)
        if group and group.num_bytes + num_bytes <= threshold_bytes:
            later = group.first_read > index
            early = ready[source] < group.members[0] and not later
            if later or early:
                group.members.append(index)
                group.num_bytes += num_bytes
                group.first_read = min(group.first_read, first_read[made])
                place = index if later else group.members[0]
                found.update(dict.fromkeys(group.members, place))
                continue
        open_groups[key] = _Group([index], num_bytes, first_read[made])
    return found


def products_at(unfolded: Unfolded, apart: bool = False) -> dict[int, int]:
    """Product -> the addition that it becomes part of, or waits for.

    Between the two there may be conversions that nothing else reads. ``apart``: it is
    then not part of the addition, and waits only to hide what is sent behind it.
    """
    ready = unfolded.writer
    sends = (i for i, x in enumerate(unfolded.instructions) if x.kind in COMBINED)
    last_sent = max(sends, default=-1)
    found = {}
    for index, instruction in enumerate(unfolded.instructions):
        if instruction.kind != "dot_general":
            continue
        (product,) = instruction.writes
        made, reader = product, unfolded.only_reader(product)
        while reader is not None and unfolded.instructions[reader].kind in CONVERTS:
            (made,) = unfolded.instructions[reader].writes
            reader = unfolded.only_reader(made)
        if reader is None or unfolded.instructions[reader].kind not in ADDS:
            continue
        if apart and made != product and reader > last_sent:
            continue
        others = [b for b in unfolded.instructions[reader].reads if b != made]
        size = unfolded.buffers[made].num_bytes
        if any(
            ready[b] > index and unfolded.buffers[b].num_bytes == size for b in others
        ):
            found[index] = reader
    return found


def products_ahead(unfolded: Unfolded, runs: Mapping[int, int]) -> dict[int, int]:
    """Products that only later products read -> where the first of those runs.

    Sums of their results (the gradient of a bias) are made there too. ``runs``: what is
    known to run later than it stands.
    """
    found: dict[int, int] = {}
    for index in reversed(range(len(unfolded.instructions))):
        instruction = unfolded.instructions[index]
        if instruction.kind != "dot_general" or index in runs:
            continue
        readers = unfolded.readers[instruction.writes[0]]
        places = {r: runs.get(r, found.get(r)) for r in readers}
        later = [place for place in places.values() if place is not None]
        others = [r for r, place in places.items() if place is None]
        first = min(later, default=index)
        sums = (unfolded.instructions[r].role == REDUCING for r in others)
        if first > index and all(sums):
            found.update(dict.fromkeys((index, *others), first))
    return found


def side_inputs(unfolded: Unfolded) -> dict[int, int]:
    """Buffer -> the convolution that adds it to its own result (cuDNN's side input).

    It is then not needed by what reads the sum.
    """
    found: dict[int, int] = {}
    for index, instruction in enumerate(unfolded.instructions):
        if instruction.kind != "conv_general_dilated":
            continue
        (made,) = instruction.writes
        reader = unfolded.only_reader(made)
        if reader is None or unfolded.instructions[reader].kind not in ADDS:
            continue
        for other in unfolded.instructions[reader].reads:
            ready = -1 < unfolded.writer[other] < index
            if ready and unfolded.only_reader(other) == reader:
                found[other] = index
    return found


def look_ups_at(
    unfolded: Unfolded, fused: Fusion, early: Container[int]
) -> dict[int, int]:
    """What writes an array for one look-up alone -> where it does, if that can wait.

    ``early`` are instructions that kernels of products do by themselves.
    """
    found: dict[int, int] = {}
    for index, one in enumerate(unfolded.instructions):
        if one.kind != "gather" or one.step is not None:
            continue
        buffer = one.reads[0]
        maker, sources = unfolded.writer[buffer], fused.sources[buffer]
        alone = fused.written[buffer] and buffer not in sources
        if maker in early or not alone:
            continue
        if unfolded.instructions[maker].kind in PARTIAL_READERS:
            continue
        fits = unfolded.buffers[buffer].num_bytes <= JOINED_BYTES
        if fits and _for_results_only(unfolded, index):
            found[maker] = _beside(unfolded, fused, buffer, index)
    return found


def _beside(unfolded: Unfolded, fused: Fusion, buffer: int, after: int) -> int:
    """The kernel that writes a ``buffer`` beside its own, of the same elements."""
    last = len(unfolded.instructions) - 1
    alike = unfolded.buffers[buffer].num_elements
    made_of = fused.sources[buffer].keys()
    for index in range(after, last):
        one = unfolded.instructions[index]
        if one.role == FUSED and any(
            fused.written[b] and unfolded.buffers[b].num_elements == alike
            for b in one.writes
        ):
            if any(not made_of.isdisjoint(fused.sources[b]) for b in one.reads):
                return index
    return last


def _for_results_only(unfolded: Unfolded, index: int) -> bool:
    """Whether nothing that follows from an instruction is more than a reduction."""
    waiting, seen = [index], {index}
    while waiting:
        for made in unfolded.instructions[waiting.pop()].writes:
            for reader in unfolded.readers[made]:
                one = unfolded.instructions[reader]
                if one.role not in (FUSED, REDUCING) and one.step is None:
                    return False
                if reader not in seen:
                    seen.add(reader)
                    waiting.append(reader)
    return True


def kept_at_end(unfolded: Unfolded) -> dict[int, int]:
    """Products of a loop's body that are only stored -> the end of the body.

    The gradients of weights: nothing in the body waits for them, so schedulers put
    them last, with the conversions and reductions between product and store.
    """
    end = len(unfolded.instructions) - 1
    found: dict[int, int] = {}
    for index, instruction in enumerate(unfolded.instructions):
        if instruction.kind != "dot_general":
            continue
        chain, reader = [index], unfolded.only_reader(instruction.writes[0])
        while reader is not None and _passes_on(unfolded.instructions[reader]):
            chain.append(reader)
            (made,) = unfolded.instructions[reader].writes
            reader = unfolded.only_reader(made)
        if reader is not None and unfolded.instructions[reader].kind == STORE:
            found.update(dict.fromkeys((*chain, reader), end))
    return found


def gradients_at_end(unfolded: Unfolded) -> dict[int, int]:
    """Matrix products to be reduced that no product waits for -> the last product.

    The gradients of weights, where they are reduced over devices or added up by a loop
    over microbatches that moves anything between devices: what follows them
    (the optimizer) follows all products. Conversions and reductions between run there
    too. A barrier keeps its place, and so do convolutions of larger filters, which were
    seen to run as soon as they can.
    """
    products = [i for i, x in enumerate(unfolded.instructions) if x.kind in PRODUCTS]
    last = products[-1] if products else -1
    held = {*unfolded.pinned}
    totals = _added_up(unfolded)
    found: dict[int, int] = {}
    for index, instruction in enumerate(unfolded.instructions):
        if not _multiplies_matrices(instruction):
            continue
        chain, (made,) = [index], instruction.writes
        reader = unfolded.only_reader(made)
        while reader is not None and _passes_on(unfolded.instructions[reader]):
            chain.append(reader)
            if made in held:
                break
            (made,) = unfolded.instructions[reader].writes
            reader = unfolded.only_reader(made)
        reduced = any(unfolded.instructions[i].kind in COMBINED for i in chain)
        reduced |= reader is not None and reader in totals
        after = min(unfolded.readers[made], default=-1) > last
        if reduced and after and made not in held:
            found.update(dict.fromkeys(chain, last))
    return found


def _added_up(body: Unfolded) -> frozenset[int]:
    """Where a body adds to its carries, if it moves anything between devices."""
    if all(x.step is None or x.kind in FREE for x in body.instructions):
        return frozenset()
    pairs = ((body.inputs[i], body.outputs[o]) for i, o in body.same)
    return frozenset(
        body.writer[after]
        for before, after in pairs
        if body.writer[after] >= 0
        and body.instructions[body.writer[after]].kind in ADDS
        and before in body.instructions[body.writer[after]].reads
    )


def _multiplies_matrices(instruction: Instruction) -> bool:
    """A matrix product, or the gradient of a convolution's 1 x 1 filter."""
    if instruction.kind == "dot_general":
        return True
    if instruction.kind != "conv_general_dilated" or instruction.op is None:
        return False
    (value,) = instruction.program.result_values(instruction.op)
    return sum(size > 1 for size in value.shape) <= 2


def stores_reduced(body: Unfolded) -> bool:
    """Whether a loop's body stores what was just reduced over devices."""
    for instruction in body.instructions:
        if instruction.kind == STORE:
            at = body.writer[instruction.reads[0]]
            while at >= 0 and body.instructions[at].kind in CONVERTS:
                at = body.writer[body.instructions[at].reads[0]]
            if at >= 0 and body.instructions[at].kind in (ALL_REDUCE, REDUCE_SCATTER):
                return True
    return False


def _passes_on(instruction: Instruction) -> bool:
    return instruction.kind in CONVERTS or instruction.kind in COMBINED


def _first_reads(unfolded: Unfolded, reads: list[tuple[int, ...]]) -> list[int]:
    found = [len(unfolded.instructions)] * len(unfolded.buffers)
    for index in reversed(range(len(reads))):
        for buffer in reads[index]:
            found[buffer] = index
    return found
