"""Exact minimization by eliminating one variable after the other.

Bucket elimination over (min, +) (Dechter, "Bucket elimination: a unifying framework for
reasoning", Artificial Intelligence 1999): the tables that a variable is in are added up
and minimized over it; what remains is a table over its neighbours. The next variable is
always the one whose table is smallest. Where every table would be too large, the
variable with most neighbours is *held* at a given value: the rest is then solved
exactly around it, and the answer says which variables were held.
"""

from __future__ import annotations

from collections.abc import Sequence

from rhino_jax.search.problem import Problem, Solution
from rhino_jax.search.tables import (
    Step,
    bare,
    hold,
    in_order,
    join,
    minimize,
    opened,
    relax,
    traced_back,
)

LARGEST_TABLE = 2**24
"""Entries of the largest table that is made: 128 MiB."""

MOST_ENTRIES = 2**26
"""Of all tables together, before an exact answer is given up: a second or two."""


def eliminate(
    problem: Problem,
    incumbent: Sequence[int] | None = None,
    largest_table: int = LARGEST_TABLE,
    exact: bool = False,
) -> Solution | None:
    """The best answer; around held variables where the problem is too wide.

    Args:
        incumbent: the values at which variables are held. An answer is never worse.
        largest_table: in entries.
        exact: hold nothing; None where that takes too large a table, or too many.

    >>> import numpy as np
    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> eliminate(Problem.of([node, node], [(0, 1, pair)])).cost
    1
    """
    if exact and not _affordable(problem, largest_table):
        return None
    state = opened(problem)
    answer = list(incumbent or (0,) * len(problem.nodes))
    trail: list[Step] = []
    held: list[int] = []
    for v, wide in in_order(state, largest_table):
        if wide:
            held.append(v)
            hold(state, v, answer[v])
        elif state.sizes[v] == 1:
            answer[v] = 0
            hold(state, v, 0)
        else:
            minimize(state, v, trail)
    traced_back(trail, answer)
    cost = problem.cost(answer)
    bound = problem.floor() if held else cost
    return Solution(tuple(answer), cost, bound, tuple(sorted(held)))


def lower_bound(problem: Problem, largest_table: int = LARGEST_TABLE) -> int:
    """A cost that no answer undercuts; the optimum itself where the problem is narrow.

    Where every table would be too large, each table that the widest variable is in
    takes its own best value of it (mini-buckets: Dechter and Rish, Journal of the ACM
    50(2), 2003).

    >>> import numpy as np
    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> lower_bound(Problem.of([node, node], [(0, 1, pair)]))
    1
    """
    state = opened(problem)
    total, trail = 0, list[Step]()
    for v, wide in in_order(state, largest_table):
        if wide or state.sizes[v] == 1:
            total += relax(state, v)
        else:
            total += minimize(state, v, trail)
    return total


def _affordable(problem: Problem, largest_table: int) -> bool:
    """Whether nothing need be held. The same steps as with tables, at no price."""
    state = bare(problem)
    spent = 0.0
    for v, wide in in_order(state, largest_table):
        single = state.sizes[v] == 1
        spent += 0 if single else state.entries(v)
        if wide or spent > MOST_ENTRIES:
            return False
        join(state, v, not single)
    return True
