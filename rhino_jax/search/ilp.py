"""The same problem as an integer program, solved by HiGHS: the oracle of large ones.

One 0/1 variable for every value of a variable, one continuous for every pair of values
along an edge (the local polytope: Wainwright and Jordan, "Graphical models, exponential
families, and variational inference", 2008, section 4). Each variable takes one value,
and the pairs of an edge add up to the values at its ends.
"""

from __future__ import annotations

import numpy as np

from rhino_jax.search.problem import FORBIDDEN, Problem, Solution

NODE_LIMIT = 10_000


def integer_program(problem: Problem, node_limit: int = NODE_LIMIT) -> Solution | None:
    """The optimum by branch and bound; None if none was found within the limit.

    Prices are floats on the way, so they are scaled to the dearest that is possible;
    the cost is taken from the integers again. ``bound`` is HiGHS' own, rounded up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    prices, first, integral = _variables(problem)
    possible = prices[prices < FORBIDDEN]
    scale = float(max(possible.max(initial=1.0), 1.0))
    upper = np.where(prices < FORBIDDEN, 1.0, 0.0)
    found = milp(
        np.where(prices < FORBIDDEN, prices / scale, 0.0),
        integrality=integral,
        bounds=Bounds(0.0, upper),
        constraints=LinearConstraint(*_constraints(problem, first, prices.size)),
        options={"node_limit": node_limit, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    answer = tuple(
        int(found.x[start : start + node.size].argmax())
        for start, node in zip(first, problem.nodes, strict=False)
    )
    cost = problem.cost(answer)
    if found.status == 0:
        return Solution(answer, cost, cost)
    bound = int(np.floor((found.mip_dual_bound or 0.0) * scale))
    return Solution(answer, cost, min(cost, bound))


def _variables(problem: Problem) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Prices of all 0/1 variables, where each block starts, which must be whole."""
    parts = [*problem.nodes, *(table.ravel() for _, _, table in problem.edges)]
    starts = np.cumsum([0, *(part.size for part in parts)])
    prices = np.concatenate([part.astype(float) for part in parts])
    values = sum(node.size for node in problem.nodes)
    integral = np.zeros(prices.size)
    integral[:values] = 1
    return prices, [int(k) for k in starts[:-1]], integral


def _constraints(
    problem: Problem, first: list[int], count: int
) -> tuple[object, np.ndarray, np.ndarray]:
    from scipy.sparse import csr_array

    rows: list[int] = []
    columns: list[int] = []
    entries: list[float] = []
    right: list[float] = []

    def add(terms: list[tuple[int, float]], value: float) -> None:
        rows.extend([len(right)] * len(terms))
        columns.extend(column for column, _ in terms)
        entries.extend(entry for _, entry in terms)
        right.append(value)

    for start, node in zip(first, problem.nodes, strict=False):
        add([(start + k, 1.0) for k in range(node.size)], 1.0)
    for e, (i, j, table) in enumerate(problem.edges):
        start = first[len(problem.nodes) + e]
        cells = start + np.arange(table.size).reshape(table.shape)
        for k in range(table.shape[0]):
            add([*((int(c), 1.0) for c in cells[k]), (first[i] + k, -1.0)], 0.0)
        for k in range(table.shape[1]):
            add([*((int(c), 1.0) for c in cells[:, k]), (first[j] + k, -1.0)], 0.0)
    matrix = csr_array((entries, (rows, columns)), shape=(len(right), count))
    return matrix, np.array(right), np.array(right)
