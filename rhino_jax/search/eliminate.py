"""Exact minimization by eliminating one variable after the other.

Bucket elimination over (min, +) (Dechter, "Bucket elimination: a unifying framework for
reasoning", Artificial Intelligence 1999): the tables that a variable is in are added up
and minimized over it; what remains is a table over its neighbours. The next variable is
always the one whose table is smallest. Where every table would be too large, the
variable with most neighbours is *held* at a given value: the rest is then solved
exactly around it, and the answer says which variables were held.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rhino_jax.search.problem import FORBIDDEN, Array, Problem, Solution

LARGEST_TABLE = 2**19
"""Entries of the largest table that is made."""

MOST_DIMENSIONS = 30
"""Of a table; numpy has a limit of its own."""

Scope = tuple[int, ...]


@dataclass
class _Tables:
    """What is left of a problem while its variables go, one by one."""

    sizes: list[int]
    tables: dict[int, tuple[Scope, Array]] = field(default_factory=dict)
    within: list[set[int]] = field(default_factory=list)
    beside: list[set[int]] = field(default_factory=list)
    number: int = 0

    def add(self, scope: Scope, table: Array) -> None:
        self.tables[self.number] = scope, table
        for v in scope:
            self.within[v].add(self.number)
        self.number += 1

    def take(self, v: int) -> list[tuple[Scope, Array]]:
        """The tables that ``v`` is in, removed."""
        found = []
        for k in sorted(self.within[v]):
            scope, table = self.tables.pop(k)
            for u in scope:
                if u != v:
                    self.within[u].discard(k)
            found.append((scope, table))
        self.within[v].clear()
        return found

    def entries(self, v: int) -> float:
        """The size of the table that eliminating ``v`` makes."""
        if len(self.beside[v]) > MOST_DIMENSIONS:
            return math.inf
        return self.sizes[v] * math.prod(self.sizes[u] for u in self.beside[v])


def _open(problem: Problem) -> _Tables:
    count = len(problem.nodes)
    state = _Tables([node.size for node in problem.nodes])
    state.within = [set() for _ in range(count)]
    state.beside = [set() for _ in range(count)]
    for v, node in enumerate(problem.nodes):
        state.add((v,), node)
    for i, j, prices in problem.edges:
        state.add((i, j), prices)
        state.beside[i].add(j)
        state.beside[j].add(i)
    return state


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
        exact: hold nothing; None where that takes too large a table.

    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> eliminate(Problem.of([node, node], [(0, 1, pair)])).cost
    1
    """
    state = _open(problem)
    answer = list(incumbent or (0,) * len(problem.nodes))
    trail: list[tuple[int, Scope, Array]] = []
    held: list[int] = []
    gone = [False] * len(answer)
    for v, size in enumerate(state.sizes):
        if size == 1:
            answer[v], gone[v] = 0, True
            _hold(state, v, 0)
    queue = [(state.entries(v), v) for v in range(len(answer)) if not gone[v]]
    heapq.heapify(queue)
    while queue:
        entries, v = heapq.heappop(queue)
        if gone[v] or entries != state.entries(v):
            continue
        if entries > largest_table:
            if exact:
                return None
            hub = max((v, *state.beside[v]), key=lambda u: (len(state.beside[u]), -u))
            touched = _hold(state, hub, answer[hub])
            held.append(hub)
            gone[hub] = True
            if hub != v:
                touched.add(v)
        else:
            touched = _minimize(state, v, trail)
            gone[v] = True
        for u in touched:
            if not gone[u]:
                heapq.heappush(queue, (state.entries(u), u))
    for v, scope, best in reversed(trail):
        answer[v] = int(best[tuple(answer[u] for u in scope)])
    cost = problem.cost(answer)
    bound = problem.floor() if held else cost
    return Solution(tuple(answer), cost, bound, tuple(sorted(held)))


def _hold(state: _Tables, v: int, value: int) -> set[int]:
    """Fix ``v`` in every table it is in. Its neighbours are returned."""
    for scope, table in state.take(v):
        rest = tuple(u for u in scope if u != v)
        if rest:
            state.add(rest, table.take(value, axis=scope.index(v)))
    touched = state.beside[v]
    for u in touched:
        state.beside[u].discard(v)
    state.beside[v] = set()
    return set(touched)


def _minimize(
    state: _Tables, v: int, trail: list[tuple[int, Scope, Array]]
) -> set[int]:
    """Eliminate ``v``. Its neighbours, each other's neighbours now, are returned."""
    scope = (v, *sorted(state.beside[v]))
    place = {u: k for k, u in enumerate(scope)}
    total: Array | None = None
    for inside, table in state.take(v):
        order = sorted(range(len(inside)), key=lambda k: place[inside[k]])
        shape = [1] * len(scope)
        for k in order:
            shape[place[inside[k]]] = table.shape[k]
        part = table.transpose(order).reshape(shape)
        total = part if total is None else total + part
    assert total is not None, "every variable has a price of its own"
    full = tuple(state.sizes[u] for u in scope)
    if total.shape != full:
        total = np.broadcast_to(total, full)
    trail.append((v, scope[1:], total.argmin(axis=0)))
    touched = set(scope[1:])
    if touched:
        state.add(scope[1:], np.minimum(total.min(axis=0), 2 * FORBIDDEN))
    for u in touched:
        state.beside[u].discard(v)
        state.beside[u] |= touched - {u}
    return touched
