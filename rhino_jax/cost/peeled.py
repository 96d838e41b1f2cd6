"""What a GPU's compiler runs of a loop ahead of it.

XLA's collective pipeliner peels the first turn off a loop that stores what it reduces
over devices (:func:`~rhino_jax.cost.order.stores_reduced`). What that turn recomputes
does not wait for the carry: it runs beside the loss, before the loop, and stands there.

*From when.* As early as what it reads is there, but not before the last array that is
gathered again on the way to the loop waits no more: that gather is hidden behind it.

*How far.* Of what is recomputed the last product, and all behind it, was seen to run
when the carry is there, behind the product that makes it.

*Masks.* What is broadcast of counters alone is an array inside a loop, a constant to
it, but outside it is made whole, for all that read it there.

Read off programs of a scanned GPT on ``h100:1x8`` and ``4x8`` (jax 0.10.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rhino_jax.cost.instructions import FUSED, PRODUCTS, Unfolded
from rhino_jax.cost.order import stores_reduced
from rhino_jax.ir.steps import ALL_GATHER

if TYPE_CHECKING:
    from rhino_jax.cost.memory import Held


def ahead(
    unfolded: Unfolded, within: Mapping[int, Held]
) -> Iterator[tuple[int, int, int]]:
    """Of peeled loops: from where until when how many bytes stand ahead of them."""
    for loop, body in within.items():
        if stores_reduced(body.unfolded):
            first = max(_all_read(unfolded, loop), _last_gather(unfolded, loop))
            until = _until(body.unfolded)
            masks = _masks_bytes(unfolded, loop, body.unfolded, until)
            if first < loop and until:
                yield first, loop, _standing_bytes(body, until)
                yield first, loop + 1, masks


def _all_read(unfolded: Unfolded, loop: int) -> int:
    """Where all is there that the loop reads, but for its carry."""
    carried = {before for before, _ in unfolded.instructions[loop].overwrites}
    reads = (b for b in unfolded.instructions[loop].reads if b not in carried)
    return 1 + max((unfolded.writer[b] for b in reads), default=-1)


def _last_gather(unfolded: Unfolded, loop: int) -> int:
    """The last instruction before the loop that gathers what waits for a barrier."""
    pinned = {*unfolded.pinned}
    return max(
        (
            index
            for index, one in enumerate(unfolded.instructions[:loop])
            if one.kind == ALL_GATHER and pinned.intersection(one.reads)
        ),
        default=0,
    )


def _until(body: Unfolded) -> int:
    """The first instruction of a body that waits for the carry, or the last product
    before it."""
    waiting = {body.inputs[i] for i, _ in body.same}
    carry = next(
        (i for i, x in enumerate(body.instructions) if waiting.intersection(x.reads)), 0
    )
    products = (
        index
        for index, one in enumerate(body.instructions[:carry])
        if one.kind in PRODUCTS
    )
    return max(products, default=carry)


def _standing_bytes(body: Held, until: int) -> int:
    return sum(
        body.unfolded.buffers[buffer].num_bytes
        for buffer, birth in body.born.items()
        if birth < until <= body.dies[buffer]
    )


def _masks_bytes(unfolded: Unfolded, loop: int, body: Unfolded, until: int) -> int:
    op = unfolded.instructions[loop].op
    if op is None or op.kind != "scan":
        return 0
    count = op.param["num_consts"]
    given = zip(body.inputs[:count], unfolded.instructions[loop].reads, strict=False)
    counted = {inside for inside, b in given if _of_counters(unfolded, b)}
    return sum(
        body.buffers[made].num_bytes
        for one in body.instructions[:until]
        if one.kind == "broadcast_in_dim" and counted.intersection(one.reads)
        for made in one.writes
    )


def _of_counters(unfolded: Unfolded, buffer: int, depth: int = 8) -> bool:
    """Whether a buffer is computed of counters and literals alone."""
    at = unfolded.writer[buffer]
    if at < 0:
        return not unfolded.buffers[buffer].num_bytes
    one = unfolded.instructions[at]
    fused = one.role == FUSED and one.step is None and depth > 0
    return fused and all(_of_counters(unfolded, b, depth - 1) for b in one.reads)
