"""Blocks with what they read of their neighbours (:data:`ir.factors.WINDOW`).

Of every operand the edges are sent along the mesh axes that split it; at the ends of
the dimension, where nobody sends, stands the op's own padding. What is sent is told by
the rule's halos, as it is to those who price it (:mod:`rhino_jax.cost.handed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.factors import WINDOW, Factor, Halo
from rhino_jax.lower.local.shard import Shard
from rhino_jax.lower.reshard import Pairs, hand_on


def split_windows(shard: Shard) -> list[Factor]:
    """The factors whose blocks need halos."""
    factors = shard.rule.factors
    return [f for f in factors if f.kind == WINDOW and shard.is_split(f.name)]


def extended(
    shard: Shard, args: Sequence[jax.Array], fills: Sequence[jax.Array | int]
) -> list[jax.Array]:
    """Local operands with the halos of all split windows around them.

    Args:
        fills: for each operand, what stands past the ends of its dimensions.
    """
    found = list(args)
    for factor in split_windows(shard):
        for halo in factor.halos:
            i = halo.operand
            found[i] = _extended(shard, factor, halo, found[i], fills[i])
    return found


def _extended(
    shard: Shard, factor: Factor, halo: Halo, x: jax.Array, fill: jax.Array | int
) -> jax.Array:
    axes = tuple(split.axis for split in shard.choice.on(factor.name))
    last = shard.mesh.group_size(axes) - 1
    dim, _ = shard.rule.place(factor.name, halo.operand)
    size = x.shape[dim]
    onward = [(i, i + 1) for i in range(last)]
    back = [(i + 1, i) for i in range(last)]

    def sent(start: int, stop: int, pairs: Pairs, alone: int) -> jax.Array:
        """Elements of a neighbour; on the device to which nobody sends, ``fill``."""
        edge = lax.slice_in_dim(x, start, stop, axis=dim)
        come = hand_on(edge, axes, pairs, shard.mesh)
        if isinstance(fill, int) and fill == 0:
            return come  # what nobody sends is zeros
        return jnp.where(lax.axis_index(axes) == alone, fill, come)

    parts = [x]
    if halo.before:
        parts.insert(0, sent(size - halo.before, size, onward, 0))
    if halo.behind:
        parts.append(sent(0, halo.behind, back, last))
    return lax.concatenate(parts, dim) if len(parts) > 1 else x
