"""Halos on one device: how large, and what it takes to lay blocks beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rhino_jax.ir.factors import Choice, Halo, Rule, layouts
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Value, itemsize


@dataclass(frozen=True)
class Edge:
    """A halo of one operand: ``item_bytes`` of one element of the split dimension on
    one device, ``block_bytes`` of the block with its halo."""

    factor: str
    halo: Halo
    item_bytes: float
    block_bytes: float


def edges(
    rule: Rule, choice: Choice, reads: Sequence[Value], mesh: Mesh
) -> Iterator[Edge]:
    """Halos in the order in which they are fetched: by factor."""
    shapes: dict[int, list[int]] = {}
    for factor in rule.factors:
        if not choice.on(factor.name):
            continue
        for halo in factor.halos:
            i, value = halo.operand, reads[halo.operand]
            layout = layouts(rule, choice)[0][i]
            held = shapes.setdefault(i, list(layout.local_shape(value.shape, mesh)))
            dim, _ = rule.place(factor.name, i)
            size = itemsize(value.dtype)
            item_bytes = size * math.prod(held) / held[dim]
            held[dim] += halo.before + halo.behind
            yield Edge(factor.name, halo, item_bytes, size * math.prod(held))


def extended_bytes(
    rule: Rule, choice: Choice, reads: Sequence[Value], mesh: Mesh
) -> int:
    """Bytes of operands copied on one device, so that halos lie beside their blocks."""
    last: dict[int, Edge] = {}
    for edge in edges(rule, choice, reads, mesh):
        if edge.halo.before or edge.halo.behind:
            last[edge.halo.operand] = edge
    return math.ceil(sum(edge.block_bytes for edge in last.values()))
