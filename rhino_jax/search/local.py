"""A fair answer at once: variables one after the other, then each in turn.

Not a solver: where a problem is too wide to be solved exactly, this is the answer that
the widest variables are held at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rhino_jax.search.problem import Problem

SWEEPS = 4


def greedy(problem: Problem, held: Mapping[int, int]) -> tuple[int, ...]:
    """Each variable in order as suits those before it best, then swept.

    ``held`` are variables whose values stay.
    """
    around = neighbours(problem)
    answer = [held.get(v, -1) for v in range(len(problem.nodes))]
    for v in range(len(problem.nodes)):
        if v not in held:
            answer[v] = _best(problem, around[v], answer, v)
    return improved(problem, answer, held)


def improved(
    problem: Problem, answer: Sequence[int], held: Mapping[int, int] | None = None
) -> tuple[int, ...]:
    """``answer`` with each variable in turn set to its best, until none changes."""
    around = neighbours(problem)
    now = list(answer)
    for _ in range(SWEEPS):
        before = list(now)
        for v in range(len(now)):
            if held is None or v not in held:
                now[v] = _best(problem, around[v], now, v)
        if now == before:
            break
    return tuple(now)


Around = Sequence[Sequence[tuple[int, np.ndarray]]]


def neighbours(problem: Problem) -> Around:
    """For each variable its neighbours, with costs (own value, neighbour's value)."""
    found: list[list[tuple[int, np.ndarray]]] = [[] for _ in problem.nodes]
    for i, j, costs in problem.edges:
        found[i].append((j, costs))
        found[j].append((i, costs.T))
    return found


def _best(
    problem: Problem,
    around: Sequence[tuple[int, np.ndarray]],
    answer: Sequence[int],
    v: int,
) -> int:
    total = problem.nodes[v]
    for other, costs in around:
        if answer[other] >= 0:
            total = total + costs[:, answer[other]]
    now = answer[v]
    best = int(total.argmin())
    return now if now >= 0 and total[now] <= total[best] else best
