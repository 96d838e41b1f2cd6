"""What each dimension is made of, as everybody who touches the value sees it.

A fused projection gives a dimension of 3·H that is next split in three and reshaped to
(3, heads, head size). Cut into blocks it suits nobody; cut inside each third, along the
heads, it survives. So the places where a dimension may be cut are carried along every
link until nothing new is learnt: each factor of an op, and each dimension of a port, is
a product of *parts*, and an axis takes the outermost digit of one part.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from rhino_jax.ir.factors import RING, Factor
from rhino_jax.search.graph import Endpoint, Graph, Var

Name = str | int
"""A factor of a site, or a dimension of a port."""

Part = tuple[int, int]
"""(low, high): the digits of weight ``low`` up to ``high`` of a factor."""

Parts = Mapping[Name, tuple[Part, ...]]

MOST_PARTS = 4
"""Parts of one factor that are offered, the outermost first."""

ROUNDS = 4
"""Of a ring in strides. Of eight devices the busiest one then sees 61 % of all pairs
under a causal mask, in blocks 94 %, and kernels of whole blocks are few and large."""

Piece = tuple[Name, int, int]
"""(factor or dimension, its weight in the value's dimension, its size)."""


def all_parts(graph: Graph) -> list[Parts]:
    """For each variable the parts of its factors or dimensions."""
    cuts = [_own(var) for var in graph.vars]
    around: list[list[tuple[Endpoint, Endpoint]]] = [[] for _ in graph.vars]
    for source, target, _, _ in graph.links:
        around[source.var].append((source, target))
        around[target.var].append((target, source))
    queue = deque(range(len(graph.vars)))
    waiting = set(queue)
    while queue:
        var = queue.popleft()
        waiting.discard(var)
        for mine, other in around[var]:
            if _tell(graph, cuts, mine, other) and other.var not in waiting:
                waiting.add(other.var)
                queue.append(other.var)
    return [{name: _parts(found) for name, found in of_var.items()} for of_var in cuts]


def _own(var: Var) -> dict[Name, set[int]]:
    """Every factor whole, and cut where the op's own dimensions say so.

    What is empty has nothing to cut.
    """
    if var.rule is None:
        return {d: {1, n or 1} for d, n in enumerate(var.shape)}
    return {f.name: {1, f.size or 1} | set(_rounds(f)) for f in var.rule.factors}


def _rounds(factor: Factor) -> Iterator[int]:
    """Where a ring may be cut so that every device has rows of several rounds.

    In blocks all wait for those whose queries see every key that comes by.
    """
    if factor.kind == RING and factor.size % ROUNDS == 0:
        yield factor.size // ROUNDS


def _tell(
    graph: Graph, cuts: list[dict[Name, set[int]]], mine: Endpoint, other: Endpoint
) -> bool:
    """Carry the cuts that ``mine`` knows to ``other``; whether it learnt any."""
    news = False
    dims = zip(
        pieces(graph.vars[mine.var], mine),
        pieces(graph.vars[other.var], other),
        strict=True,
    )
    for here, there in dims:
        known = {
            weight * cut for name, weight, _ in here for cut in cuts[mine.var][name]
        }
        for name, weight, size in there:
            found = cuts[other.var][name]
            for cut in known:
                if not weight or cut % weight or cut <= weight:
                    continue
                inside = cut // weight
                if inside < size and size % inside == 0 and inside not in found:
                    found.add(inside)
                    news = True
    return news


def pieces(var: Var, end: Endpoint) -> Iterator[Sequence[Piece]]:
    """For each dimension of the value at ``end`` what it is made of."""
    if end.lift.stack is not None:
        yield []
    if var.rule is None:
        yield from ([(d, 1, n)] for d, n in enumerate(var.shape))
        return
    rule = var.rule
    sides = rule.operands if _is_operand(end) else rule.results
    index = -1 - end.index if _is_operand(end) else end.index
    for dim in sides[index]:
        yield [(name, rule.weight(dim, name), rule.factor(name).size) for name in dim]


def _is_operand(end: Endpoint) -> bool:
    return end.index < 0


def _parts(cuts: set[int]) -> tuple[Part, ...]:
    ordered = sorted(cuts - {0})  # of an empty array
    found = [
        (low, high) for low, high in itertools.pairwise(ordered) if high % low == 0
    ]
    whole = (ordered[0], ordered[-1])
    return tuple(dict.fromkeys([*reversed(found), whole]))[:MOST_PARTS]
