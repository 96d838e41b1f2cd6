"""What is left of a problem while its variables go, one by one.

Tables over several variables, and who is beside whom. A variable goes by being
*minimized* over (the tables it is in become one over its neighbours), *held* at a
value, or *relaxed* (each table it is in chooses its value alone).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rhino_jax.search.problem import FORBIDDEN, Array, Problem

MOST_DIMENSIONS = 30
"""Of a table; numpy has a limit of its own."""

Scope = tuple[int, ...]
Step = tuple[int, Scope, Array]
"""A variable, what it depends on, and its best value for each of that."""


@dataclass
class Tables:
    """Tables by number, and for every variable those it is in and whom it is beside."""

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


def bare(problem: Problem) -> Tables:
    """Who is beside whom, without any table."""
    state = Tables([node.size for node in problem.nodes])
    state.within = [set() for _ in problem.nodes]
    state.beside = [set() for _ in problem.nodes]
    for i, j, _ in problem.edges:
        state.beside[i].add(j)
        state.beside[j].add(i)
    return state


def opened(problem: Problem) -> Tables:
    state = bare(problem)
    for v, node in enumerate(problem.nodes):
        state.add((v,), node)
    for i, j, prices in problem.edges:
        state.add((i, j), prices)
    return state


def in_order(state: Tables, largest_table: int) -> Iterator[tuple[int, bool]]:
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


def join(state: Tables, v: int, others: bool) -> None:
    """``v`` is nobody's neighbour any more; those it had are, of one another."""
    touched, state.beside[v] = state.beside[v], set()
    for u in touched:
        state.beside[u].discard(v)
        if others:
            state.beside[u] |= touched - {u}


def relax(state: Tables, v: int) -> int:
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
    join(state, v, False)
    return alone


def hold(state: Tables, v: int, value: int) -> None:
    """Fix ``v`` in every table it is in."""
    for scope, table in state.take(v):
        rest = tuple(u for u in scope if u != v)
        if rest:
            state.add(rest, table.take(value, axis=scope.index(v)))
    join(state, v, False)


def minimize(state: Tables, v: int, trail: list[Step]) -> int:
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
    join(state, v, True)
    return 0 if touched else int(least)


def traced_back(trail: Sequence[Step], answer: list[int]) -> None:
    """Give each variable that was minimized over its best value, the last one first."""
    for v, scope, best in reversed(trail):
        answer[v] = int(best[tuple(answer[u] for u in scope)])
