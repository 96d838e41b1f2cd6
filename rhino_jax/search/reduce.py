"""A problem made smaller that has the same optimum, and the way back.

A variable with one value, or with at most two neighbours, is minimized over: what
remains of it is a price of its neighbours together, so that the smaller problem is
one of pairs still (the reductions R0, RI and RII of partitioned boolean quadratic
programs: Scholz and Eckstein, "Register allocation for irregular architectures", LCTES
2002). Of a whole train step little is left: the loops that hold it together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rhino_jax.search.problem import Problem
from rhino_jax.search.tables import Step, hold, minimize, opened, traced_back

MOST_BESIDE = 2


@dataclass(frozen=True)
class Reduced:
    """The smaller problem; ``kept`` are its variables' numbers in the one it is of."""

    problem: Problem
    kept: tuple[int, ...]
    trail: tuple[Step, ...] = field(repr=False)
    count: int

    def restrict(self, answer: Sequence[int]) -> tuple[int, ...]:
        """An answer of the whole problem, of the variables that are left."""
        return tuple(answer[v] for v in self.kept)

    def restore(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The best answer of the whole problem with ``answer`` for what is left."""
        found = [0] * self.count
        for v, value in zip(self.kept, answer, strict=True):
            found[v] = value
        traced_back(self.trail, found)
        return tuple(found)


def reduced(problem: Problem) -> Reduced:
    """``problem`` without the variables that can go exactly.

    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> chain = reduced(Problem.of([node] * 3, [(0, 1, pair), (1, 2, pair)]))
    >>> len(chain.problem.nodes), chain.restore(())
    (0, (0, 1, 0))
    """
    state = opened(problem)
    trail: list[Step] = []
    gone = [size == 1 for size in state.sizes]
    for v, single in enumerate(gone):
        if single:
            hold(state, v, 0)
    queue = [(len(beside), v) for v, beside in enumerate(state.beside) if not gone[v]]
    heapq.heapify(queue)
    while queue:
        count, v = heapq.heappop(queue)
        if gone[v] or count != len(state.beside[v]):
            continue
        if count > MOST_BESIDE:
            break
        around = set(state.beside[v])
        minimize(state, v, trail)
        gone[v] = True
        for u in around:
            heapq.heappush(queue, (len(state.beside[u]), u))
    kept = tuple(v for v, done in enumerate(gone) if not done)
    place = {v: k for k, v in enumerate(kept)}
    nodes = [np.zeros(state.sizes[v], np.int64) for v in kept]
    edges = []
    for scope, table in state.tables.values():
        if len(scope) == 1:
            nodes[place[scope[0]]] = nodes[place[scope[0]]] + table
        else:
            edges.append((place[scope[0]], place[scope[1]], table))
    count = len(problem.nodes)
    return Reduced(Problem.of(nodes, edges), kept, tuple(trail), count)
