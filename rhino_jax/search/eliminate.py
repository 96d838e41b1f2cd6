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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rhino_jax.search.problem import FORBIDDEN, Array, Problem, Solution

LARGEST_TABLE = 2**24
"""Entries of the largest table that is made: 128 MiB."""

MOST_ENTRIES = 2**26
"""Of all tables together, before an exact answer is given up: a second or two."""

MOST_DIMENSIONS = 30
"""Of a table; numpy has a limit of its own."""

Scope = tuple[int, ...]
Step = tuple[int, Scope, Array]
"""A variable, what it depends on, and its best value for each of that."""


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


def _bare(problem: Problem) -> _Tables:
    """Who is beside whom, without any table."""
    state = _Tables([node.size for node in problem.nodes])
    state.within = [set() for _ in problem.nodes]
    state.beside = [set() for _ in problem.nodes]
    for i, j, _ in problem.edges:
        state.beside[i].add(j)
        state.beside[j].add(i)
    return state


def _open(problem: Problem) -> _Tables:
    state = _bare(problem)
    for v, node in enumerate(problem.nodes):
        state.add((v,), node)
    for i, j, prices in problem.edges:
        state.add((i, j), prices)
    return state


def _affordable(problem: Problem, largest_table: int) -> bool:
    """Whether nothing need be held. The same steps as with tables, at no price."""
    state = _bare(problem)
    spent = 0.0
    for v, wide in _order(state, largest_table):
        single = state.sizes[v] == 1
        spent += 0 if single else state.entries(v)
        if wide or spent > MOST_ENTRIES:
            return False
        _join(state, v, not single)
    return True


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

    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> eliminate(Problem.of([node, node], [(0, 1, pair)])).cost
    1
    """
    if exact and not _affordable(problem, largest_table):
        return None
    state = _open(problem)
    answer = list(incumbent or (0,) * len(problem.nodes))
    trail: list[Step] = []
    held: list[int] = []
    for v, wide in _order(state, largest_table):
        if wide:
            held.append(v)
            _hold(state, v, answer[v])
        elif state.sizes[v] == 1:
            answer[v] = 0
            _hold(state, v, 0)
        else:
            _minimize(state, v, trail)
    for v, scope, best in reversed(trail):
        answer[v] = int(best[tuple(answer[u] for u in scope)])
    cost = problem.cost(answer)
    bound = problem.floor() if held else cost
    return Solution(tuple(answer), cost, bound, tuple(sorted(held)))


def lower_bound(problem: Problem, largest_table: int = LARGEST_TABLE) -> int:
    """A cost that no answer undercuts; the optimum itself where the problem is narrow.

    Where every table would be too large, each table that the widest variable is in
    takes its own best value of it (mini-buckets: Dechter and Rish, Journal of the ACM
    50(2), 2003).

    >>> node, pair = np.array([0, 1]), np.array([[5, 0], [0, 5]])
    >>> lower_bound(Problem.of([node, node], [(0, 1, pair)]))
    1
    """
    state = _open(problem)
    total, trail = 0, list[Step]()
    for v, wide in _order(state, largest_table):
        if wide or state.sizes[v] == 1:
            total += _relax(state, v)
        else:
            total += _minimize(state, v, trail)
    return total


def _order(state: _Tables, largest_table: int) -> Iterator[tuple[int, bool]]:
    """The variable to go next, and whether its table, as all others, is too large.

    Variables with one value go first. Where all are too wide, it is the one with most
    neighbours among a narrowest one and those beside it.
    """
    gone = [False] * len(state.sizes)

    def go(v: int, wide: bool = False) -> Iterator[tuple[int, bool]]:
        around = set(state.beside[v])
        yield v, wide
        gone[v] = True
        for u in around:
            if not gone[u]:
                heapq.heappush(queue, (state.entries(u), u))

    queue: list[tuple[float, int]] = []
    for v, size in enumerate(state.sizes):
        if size == 1:
            yield from go(v)
    queue = [(state.entries(v), v) for v, done in enumerate(gone) if not done]
    heapq.heapify(queue)
    while queue:
        entries, v = heapq.heappop(queue)
        if gone[v] or entries != state.entries(v):
            continue
        if entries <= largest_table:
            yield from go(v)
            continue
        hub = max((v, *state.beside[v]), key=lambda u: (len(state.beside[u]), -u))
        yield from go(hub, True)
        if hub != v:
            heapq.heappush(queue, (state.entries(v), v))


def _join(state: _Tables, v: int, others: bool) -> None:
    """``v`` is nobody's neighbour any more; those it had are, of one another."""
    touched, state.beside[v] = state.beside[v], set()
    for u in touched:
        state.beside[u].discard(v)
        if others:
            state.beside[u] |= touched - {u}


def _relax(state: _Tables, v: int) -> int:
    """Let every table that ``v`` is in choose its value alone. What is left of those
    that were about nothing else is returned."""
    alone = 0
    for scope, table in state.take(v):
        rest = tuple(u for u in scope if u != v)
        least = table.min(axis=scope.index(v))
        if rest:
            state.add(rest, least)
        else:
            alone += int(least)
    _join(state, v, False)
    return alone


def _hold(state: _Tables, v: int, value: int) -> None:
    """Fix ``v`` in every table it is in."""
    for scope, table in state.take(v):
        rest = tuple(u for u in scope if u != v)
        if rest:
            state.add(rest, table.take(value, axis=scope.index(v)))
    _join(state, v, False)


def _minimize(state: _Tables, v: int, trail: list[Step]) -> int:
    """Eliminate ``v``: its neighbours become each other's. Without neighbours its best
    price is returned, else 0."""
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
    least = total.min(axis=0)
    if touched:
        state.add(scope[1:], np.minimum(least, 2 * FORBIDDEN))
    _join(state, v, True)
    return 0 if touched else int(least)
