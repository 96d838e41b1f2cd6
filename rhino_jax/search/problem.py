"""What the solver sees: variables with finite domains, and prices in numpy arrays.

Minimize the sum of a price for every variable's value and a price for every pair of
values along an edge. Prices are integers; :data:`FORBIDDEN` and above is impossible.
Ties fall to the lower index where the solver comes to choose, in an order that depends
on the problem alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

FORBIDDEN = 2**50
"""An impossible price; thousands of them still fit in 64 bits."""

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """``nodes[i]`` prices the values of variable i; an edge (i, j, prices) with i < j
    those of two variables together, [values of i, values of j]."""

    nodes: tuple[Array, ...]
    edges: tuple[tuple[int, int, Array], ...]

    @staticmethod
    def of(nodes: Sequence[Array], edges: Iterable[tuple[int, int, Array]]) -> Problem:
        """A problem in normal form.

        Edges may come in any order and direction, and repeat (they are added up); one
        from a variable to itself adds its diagonal to the variable's own prices.

        >>> node = np.array([1, 0])
        >>> loop = np.array([[0, 9], [9, 5]])
        >>> Problem.of([node], [(0, 0, loop)]).nodes[0].tolist()
        [1, 5]
        """
        own = [np.array(node, np.int64) for node in nodes]
        pairs: dict[tuple[int, int], Array] = {}
        for i, j, prices in edges:
            if i == j:
                own[i] = own[i] + np.diag(prices)
                continue
            key, table = ((i, j), prices) if i < j else ((j, i), prices.T)
            shape = own[key[0]].size, own[key[1]].size
            assert table.shape == shape, f"edge {key}: {table.shape}, domains {shape}"
            found = pairs.get(key)
            pairs[key] = table if found is None else found + table
        return Problem(
            tuple(np.minimum(node, FORBIDDEN) for node in own),
            tuple((i, j, np.minimum(m, FORBIDDEN)) for (i, j), m in pairs.items()),
        )

    def cost(self, answer: Sequence[int]) -> int:
        """The price of one value for every variable."""
        own = sum(int(node[k]) for node, k in zip(self.nodes, answer, strict=True))
        return own + sum(int(m[answer[i], answer[j]]) for i, j, m in self.edges)

    def floor(self) -> int:
        """A price that no answer undercuts: the least of each part."""
        parts = [*self.nodes, *(m for _, _, m in self.edges)]
        return sum(int(part.min()) for part in parts)


@dataclass(frozen=True)
class Solution:
    """An answer, its cost, and a cost that no answer undercuts.

    ``held`` are variables that were not searched, because the problem was too wide.
    """

    answer: tuple[int, ...]
    cost: int
    bound: int
    held: tuple[int, ...] = ()

    @property
    def optimal(self) -> bool:
        return self.cost == self.bound

    @property
    def feasible(self) -> bool:
        return self.cost < FORBIDDEN


def brute_force(problem: Problem) -> Solution:
    """The best of all answers, the first of equals; for small problems.

    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> brute_force(Problem.of([node, node], [(0, 1, pair)])).answer
    (0, 1)
    """
    every = itertools.product(*(range(node.size) for node in problem.nodes))
    best = min(every, key=lambda answer: (problem.cost(answer), answer))
    cost = problem.cost(best)
    return Solution(best, cost, cost)
