"""Solvers against brute force and against HiGHS, on random problems."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from rhino_jax.search.eliminate import eliminate, lower_bound
from rhino_jax.search.ilp import integer_program
from rhino_jax.search.local import greedy, improved
from rhino_jax.search.problem import FORBIDDEN, Problem, brute_force
from rhino_jax.search.propagate import propagate
from rhino_jax.search.reduce import reduced
from rhino_jax.search.solve import solve

GROUPS = 12
EACH = 50


def random_problem(seed: int) -> Problem:
    """Trees, cycles, dense graphs; ties, forbidden pairs, single values, loops."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 8))
    sizes = rng.integers(1, 4, count)
    top = int(rng.choice([2, 20, 10**9]))
    nodes = [rng.integers(0, top, n) for n in sizes]
    edges = []
    for _ in range(int(rng.integers(0, 2 * count + 1))):
        i, j = (int(k) for k in rng.integers(0, count, 2))
        prices = rng.integers(0, top, (sizes[i], sizes[j]))
        if rng.random() < 0.2:
            prices = np.where(rng.random(prices.shape) < 0.3, FORBIDDEN, prices)
        edges.append((i, j, prices))
    return Problem.of(nodes, edges)


@pytest.mark.parametrize("group", range(GROUPS))
def test_elimination_is_brute_force(group: int) -> None:
    for seed in range(group * EACH, (group + 1) * EACH):
        problem = random_problem(seed)
        best, found = brute_force(problem), eliminate(problem)
        assert found is not None and found.optimal and not found.held
        assert min(found.cost, FORBIDDEN) == min(best.cost, FORBIDDEN), seed
        assert problem.cost(found.answer) == found.cost


def dense_problem(seed: int) -> Problem:
    """Six variables, most of them beside most others."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, 6)
    pairs = [(i, j) for i in range(6) for j in range(i) if rng.random() < 0.8]
    edges = [(i, j, rng.integers(0, 99, (sizes[i], sizes[j]))) for i, j in pairs]
    return Problem.of([rng.integers(0, 99, n) for n in sizes], edges)


@pytest.mark.parametrize("make", [random_problem, dense_problem])
def test_reductions_keep_the_optimum(make: Callable[[int], Problem]) -> None:
    """Of 500 problems each: what is left has it, and the way back gives it."""
    left = []
    for seed in range(500):
        problem = make(seed)
        best, small = brute_force(problem), reduced(problem)
        found = small.restore(brute_force(small.problem).answer)
        assert min(problem.cost(found), FORBIDDEN) == min(best.cost, FORBIDDEN), seed
        assert all(n.size > 1 for n in small.problem.nodes)
        left.append(len(small.kept))
        # The way back never makes an answer worse.
        given = tuple(int(node.argmin()) for node in problem.nodes)
        cost = problem.cost(given)
        again = small.restore(small.restrict(given))
        assert problem.cost(again) <= cost or cost >= FORBIDDEN
    assert 0 in left and max(left) >= 4


@pytest.mark.parametrize("largest_table", [2, 4, 9, 10**6])
def test_no_answer_undercuts_the_bound(largest_table: int) -> None:
    below = 0
    for seed in range(200):
        problem = random_problem(seed)
        best = brute_force(problem)
        bound = lower_bound(problem, largest_table)
        if best.feasible:
            assert bound <= best.cost, seed
            below += bound < best.cost
    assert (below == 0) == (largest_table == 10**6)


@pytest.mark.parametrize("group", range(4))
def test_highs_agrees(group: int) -> None:
    for seed in range(group * 25, (group + 1) * 25):
        problem = random_problem(seed)
        best, found = brute_force(problem), integer_program(problem)
        if not best.feasible:
            assert found is None or not found.feasible
            continue
        assert found is not None and found.optimal
        assert found.cost == pytest.approx(best.cost, rel=1e-6), seed


def test_highs_agrees_where_brute_force_can_not_go() -> None:
    problem = ladder(40, 5, np.random.default_rng(3))
    exact, found = eliminate(problem), integer_program(problem)
    assert exact is not None and found is not None
    assert found.cost == exact.cost == found.bound


def ladder(rungs: int, size: int, rng: np.random.Generator) -> Problem:
    """Two chains and the rungs between them: a forward and a backward pass."""
    nodes = [rng.integers(0, 100, size) for _ in range(2 * rungs)]
    pairs = [(k, k + 1) for k in range(2 * rungs - 1)]
    pairs += [(k, 2 * rungs - 1 - k) for k in range(rungs - 1)]
    edges = [(i, j, rng.integers(0, 100, (size, size))) for i, j in pairs]
    return Problem.of(nodes, edges)


@pytest.mark.parametrize("seed", range(40))
def test_held_variables_never_make_it_worse(seed: int) -> None:
    problem = random_problem(seed)
    start = [0] * len(problem.nodes)
    best = brute_force(problem)
    for found in (eliminate(problem, start, 9), solve(problem, start, 9)):
        assert found is not None
        assert best.cost <= found.cost <= problem.cost(start)
        assert found.bound <= best.cost
        assert problem.cost(found.answer) == found.cost


def test_too_wide_for_exact_elimination_is_said() -> None:
    problem = ladder(12, 5, np.random.default_rng(0))
    assert eliminate(problem, largest_table=30, exact=True) is None
    found = eliminate(problem, largest_table=30)
    assert found is not None and found.held and not found.optimal


@pytest.mark.parametrize("seed", range(30))
def test_messages_are_never_worse_than_where_they_start(seed: int) -> None:
    problem = random_problem(seed)
    start = [0] * len(problem.nodes)
    found = propagate(problem, start)
    assert brute_force(problem).cost <= problem.cost(found) <= problem.cost(start)


def test_messages_are_exact_on_trees() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        nodes = [rng.integers(0, 50, 3) for _ in range(7)]
        edges = [
            (int(rng.integers(0, k)), k, rng.integers(0, 50, (3, 3)))
            for k in range(1, 7)
        ]
        problem = Problem.of(nodes, edges)
        found = propagate(problem, [0] * 7)
        assert problem.cost(found) == brute_force(problem).cost


def test_greedy_keeps_what_is_held() -> None:
    problem = random_problem(5)
    held = {0: problem.nodes[0].size - 1}
    assert greedy(problem, held)[0] == held[0]
    assert improved(problem, greedy(problem, held), held)[0] == held[0]


def test_edges_are_added_up_whatever_their_direction() -> None:
    node = np.zeros(2, np.int64)
    one = np.array([[1, 2], [3, 4]])
    problem = Problem.of([node, node], [(0, 1, one), (1, 0, one)])
    assert problem.edges[0][2].tolist() == (one + one.T).tolist()


def test_a_shape_that_does_not_fit_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="edge"):
        Problem.of([np.zeros(2), np.zeros(3)], [(0, 1, np.zeros((2, 2)))])


SCRIPT = """
from tests.search.test_solve import random_problem
from rhino_jax.search.solve import solve
print([solve(random_problem(s), None, 9).answer for s in range(40)])
"""


def test_answers_do_not_depend_on_the_hash_seed() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(outputs) == 1
