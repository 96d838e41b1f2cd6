"""What runs inside the kernel of a product: on TPUs, what is made of its result.

A TPU's compiler puts into the kernel of a product or convolution whatever works
element by element on its result, and reductions of that: residual sums, the statistics
of a layer norm, the gradient of a bias, an optimizer's update of the weight whose
gradient it is. They are *guests* of the product, as long as all else that they read is
there before it runs. What reads a guest that reduces is not: it waits for the whole.

Read off fusions that XLA made of GPT, ViT and ResNet steps for v5e (libtpu 0.0.42).
"""

from __future__ import annotations

from rhino_jax.cost.buffers import FUSED, REDUCING, Instruction, Unfolded
from rhino_jax.cost.fusion import Fusion
from rhino_jax.cost.instructions import PRODUCTS, updates


def guests(unfolded: Unfolded, fused: Fusion) -> dict[int, int]:
    """Instruction -> the product whose kernel it is part of. Linear in instructions."""
    found: dict[int, int] = {}
    at_hand: dict[int, int] = {}
    """Buffers made inside a product's kernel, element by element -> the product."""
    for index, one in enumerate(unfolded.instructions):
        if one.kind in PRODUCTS and one.step is None:
            at_hand.update(dict.fromkeys(one.writes, index))
        elif _may_join(one):
            product = _host(unfolded, fused, one, at_hand)
            if product is not None:
                found[index] = product
                if one.role == FUSED:
                    at_hand.update(dict.fromkeys(one.writes, product))
    return found


def _may_join(one: Instruction) -> bool:
    sends = one.step is not None and one.step.wire_bytes
    return one.role in (FUSED, REDUCING) and not (
        one.bodies or sends or updates(one.kind)
    )


def _host(
    unfolded: Unfolded, fused: Fusion, one: Instruction, at_hand: dict[int, int]
) -> int | None:
    """The last product that ``one`` reads of, if it waits for nothing else."""
    found = [at_hand[s] for b in one.reads for s in fused.sources[b] if s in at_hand]
    if not found:
        return None
    product = max(found)
    waits = any(
        at_hand.get(s) != product and unfolded.writer[s] >= product
        for b in one.reads
        for s in fused.sources[b]
    )
    return None if waits else product


def swallowed(
    unfolded: Unfolded, fused: Fusion, found: dict[int, int]
) -> frozenset[int]:
    """Results of products that nobody but their guests reads: never written."""
    kept = {*unfolded.outputs, *unfolded.pinned}
    gone = set()
    for index in set(found.values()):
        for made in unfolded.instructions[index].writes:
            readers = unfolded.readers[made]
            if made not in kept and all(found.get(r) == index for r in readers):
                gone.add(made)
    return frozenset(gone)
