"""A good answer to a problem too wide for exact elimination: min-sum messages.

Every variable tells its neighbours, for each of their values, the least that its side
of the edge costs (loopy belief propagation: Pearl 1988; min-sum on factor graphs:
Kschischang, Frey and Loeliger, IEEE Trans. Inf. Theory 47(2), 2001), damped, all edges
at once in padded arrays. Beliefs are read off now and then, each reading is bettered
variable by variable, and the best is kept. No proof comes with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rhino_jax.search.local import improved
from rhino_jax.search.problem import FORBIDDEN, Array, Problem

ROUNDS, READ_EVERY, DAMPING = 90, 15, 0.5


def propagate(problem: Problem, start: Sequence[int]) -> tuple[int, ...]:
    """The best answer met; never worse than ``start``.

    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> propagate(Problem.of([node, node], [(0, 1, pair)]), (0, 0))
    (0, 1)
    """
    best = improved(problem, start)
    if not problem.edges:
        return best
    cost = problem.cost(best)
    sides = _Sides(problem)
    messages = np.zeros((2, len(problem.edges), sides.width))
    for number in range(1, ROUNDS + 1):
        messages = DAMPING * messages + (1 - DAMPING) * sides.sent(messages)
        if number % READ_EVERY == 0:
            tried = improved(problem, sides.reading(messages))
            if problem.cost(tried) < cost:
                best, cost = tried, problem.cost(tried)
    return best


class _Sides:
    """Edges as padded arrays, seen from both of their ends.

    Side 0 of an edge is its first variable. A message at side s is what that variable
    is told over the edge.
    """

    def __init__(self, problem: Problem) -> None:
        self.width = max(node.size for node in problem.nodes)
        count = len(problem.edges)
        self.ends = np.array([[i, j] for i, j, _ in problem.edges]).T
        self.prices = np.full((count, self.width, self.width), float(FORBIDDEN))
        for e, (_, _, table) in enumerate(problem.edges):
            self.prices[e, : table.shape[0], : table.shape[1]] = table
        self.nodes = np.full((len(problem.nodes), self.width), float(FORBIDDEN))
        for v, node in enumerate(problem.nodes):
            self.nodes[v, : node.size] = node

    def beliefs(self, messages: Array) -> Array:
        """For each variable its own prices and all that it was told."""
        total = self.nodes.copy()
        for side in (0, 1):
            np.add.at(total, self.ends[side], messages[side])
        return total

    def sent(self, messages: Array) -> Array:
        """What every variable tells over every edge, given what it was told."""
        beliefs = self.beliefs(messages)
        result = np.empty_like(messages)
        for side in (0, 1):
            known = beliefs[self.ends[side]] - messages[side]
            prices = self.prices if side == 0 else self.prices.transpose(0, 2, 1)
            told = (known[:, :, None] + prices).min(axis=1)
            result[1 - side] = told - told.min(axis=1, keepdims=True)
        return np.minimum(result, float(FORBIDDEN))

    def reading(self, messages: Array) -> list[int]:
        return [int(k) for k in self.beliefs(messages).argmin(axis=1)]
