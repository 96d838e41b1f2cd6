"""The best answer to a problem: exact where that can be, else bettered in passes."""

from __future__ import annotations

from collections.abc import Sequence

from rhino_jax.search.eliminate import LARGEST_TABLE, eliminate
from rhino_jax.search.problem import Problem, Solution
from rhino_jax.search.propagate import propagate
from rhino_jax.search.reduce import reduced

MOST_PASSES = 3
SMALL_TABLE = 2**16
"""Entries, where variables are held anyway: more of them, sooner done."""


def solve(
    problem: Problem,
    incumbent: Sequence[int] | None = None,
    largest_table: int = LARGEST_TABLE,
) -> Solution:
    """The optimum where elimination reaches it; else better than ``incumbent``.

    Too wide a problem is reduced, answered by messages, and solved exactly around that
    answer: the widest variables are held where it says, and again where the answer
    found says, while that helps (at most :data:`MOST_PASSES` times).
    """
    start = tuple(incumbent or (0,) * len(problem.nodes))
    exact = eliminate(problem, start, largest_table, exact=True)
    if exact is not None:
        return exact
    core = reduced(problem)
    small = min(SMALL_TABLE, largest_table)
    found: Solution | None = None
    best = propagate(core.problem, core.restrict(start))
    for _ in range(MOST_PASSES):
        again = eliminate(core.problem, best, small)
        assert again is not None, "variables may be held"
        if found is not None and again.cost >= found.cost:
            break
        best, found = again.answer, again
        if not again.held:
            break
    assert found is not None
    answer = core.restore(found.answer)
    cost = problem.cost(answer)
    held = tuple(core.kept[v] for v in found.held)
    return Solution(answer, cost, problem.floor() if held else cost, held)
