"""Arithmetic of attention: what the busiest device does.

Scores are made and used block by block, so a kernel is bound by its products: two of
all queries with all keys forward, five backward, where scores are made again (Dao,
"FlashAttention-2", 2023). What a causal mask hides is skipped.

Where no kernel of cuDNN's runs (no CUDA, or arrays that it does not take), the same is
done by plain products of blocks, whose scores pass through memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rhino_jax.cluster.hardware import Device
from rhino_jax.ir.factors import RING, Choice, Factor, Rule
from rhino_jax.ir.layout import local_size
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Value, accumulator_dtype, itemsize

PRODUCTS = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}
"""Products of queries and keys by kind of op."""
WIDE = {
    "dot_product_attention_fwd_wrapper": 3,
    "dot_product_attention_bwd_wrapper": 4,
}
"""Passes over blocks of scores in an accumulator's dtype, where there is no kernel:
made and read twice; made, with their gradient, and read."""
NARROW = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}
"""Passes in the arrays' own: probabilities made and read; with the scores' gradient."""
LAUNCHED = {
    "dot_product_attention_fwd_wrapper": 4,
    "dot_product_attention_bwd_wrapper": 7,
}
"""Kernels of one block."""
BLOCK = 1024
"""Rows and columns of one, if heads are not so many that it has to be smaller."""
BATCH, ROWS, DEPTH, COLUMNS = "bhg", "st", "d", "su"
"""Names of factors (:mod:`rhino_jax.rules.attention`): what is done side by side, those
of queries, of one head, of keys. A ring's is that of queries and of keys."""


def attention_flops(op: Op, rule: Rule, choice: Choice, mesh: Mesh) -> int:
    """Floating-point operations of the busiest device."""
    points = math.prod(attention_size(rule, choice, mesh))
    return int(2 * PRODUCTS[op.kind] * points * seen_share(op, rule, choice, mesh))


def attention_size(rule: Rule, choice: Choice, mesh: Mesh) -> tuple[float, ...]:
    """Batch and heads, queries, depth and keys that one device works on.

    Those of one op's products, in the order of :func:`cost.compute.product_size`.
    """

    def held(letters: str) -> float:
        found = (f for f in rule.factors if f.name in letters)
        return float(math.prod(_held(f, choice, mesh, letters) for f in found))

    return held(BATCH), held(ROWS), held(DEPTH), held(COLUMNS)


@dataclass(frozen=True)
class Blocks:
    """What passes through memory, and how many kernels are launched for it."""

    num_bytes: float
    launches: float


def blocks(
    op: Op,
    queries: Value,
    rule: Rule,
    choice: Choice,
    mesh: Mesh,
    device: Device,
) -> Blocks | None:
    """What attention by plain products of blocks costs beside them; None for what is
    none, or is a kernel's."""
    if op.kind not in PRODUCTS:
        return None
    if device.platform == "cuda" and op.param.get("vendor", True):
        return None
    batch, rows, _, columns = attention_size(rule, choice, mesh)
    share = seen_share(op, rule, choice, mesh)
    wide = itemsize(accumulator_dtype(queries.dtype))
    each = WIDE[op.kind] * wide + NARROW[op.kind] * itemsize(queries.dtype)
    count = math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK) * share
    return Blocks(batch * rows * columns * share * each, count * LAUNCHED[op.kind])


def _held(factor: Factor, choice: Choice, mesh: Mesh, letters: str) -> int:
    if factor.kind == RING and letters == COLUMNS:
        return factor.size  # all of them come by
    return local_size(factor.size, choice.on(factor.name), mesh)


def seen_share(op: Op, rule: Rule, choice: Choice, mesh: Mesh) -> float:
    """Of all pairs of a device's queries and the keys, those that it works on.

    The busiest device counts, turn by turn of a ring, as all wait for it. In blocks,
    somebody's queries see all keys that come by, in every turn but the first; split in
    strides, so that each device has rows of ``r`` rounds, about 1/2 + 1/(2 r) of them
    (Brandon et al., "Striped Attention", 2023).
    """
    if "CAUSAL" not in op.param["mask_type"]:
        return 1.0
    rows = next((f for f in rule.factors if f.name in ROWS), None)
    if rows is None:
        return 1.0
    digits = choice.on(rows.name)
    share, coarse = 0.5, 0.0
    if digits:
        count = rows.size // local_size(rows.size, digits, mesh)
        rounds = rows.size // (digits[0].stride * mesh.size(digits[0].axis))
        share = (rounds - 1) / (2 * rounds) + (1 - 0.5 / count) / rounds
        coarse = 1 / count
    window = op.param["sliding_window_length"]
    return share if window is None else min(share, window / rows.size + coarse)
