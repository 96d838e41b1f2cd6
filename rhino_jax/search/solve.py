"""The best answer to a problem: exact where that can be, else bettered in passes."""

from __future__ import annotations

from collections.abc import Sequence

from rhino_jax.search.eliminate import LARGEST_TABLE, eliminate
from rhino_jax.search.problem import Problem, Solution
from rhino_jax.search.propagate import propagate

MOST_PASSES = 3
SMALL_TABLE = 2**16
"""Entries, where variables are held anyway: more of them, sooner done."""


def solve(
    problem: Problem,
    incumbent: Sequence[int] | None = None,
    largest_table: int = LARGEST_TABLE,
) -> Solution:
    """The optimum where elimination reaches it; else better than ``incumbent``.

    Too wide a problem is answered by messages first, and solved exactly around that
    answer: the widest variables are held where it says, and again where the answer
    found says, while that helps (at most :data:`MOST_PASSES` times).
    """
    start = tuple(incumbent or (0,) * len(problem.nodes))
    found = eliminate(problem, start, largest_table, exact=True)
    if found is not None:
        return found
    small = min(SMALL_TABLE, largest_table)
    best = propagate(problem, start)
    for _ in range(MOST_PASSES):
        again = eliminate(problem, best, small)
        assert again is not None, "variables may be held"
        if found is not None and again.cost >= found.cost:
            break
        best, found = again.answer, again
        if not again.held:
            break
    assert found is not None
    return found
