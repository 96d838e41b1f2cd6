"""Prices of variables and links as integer arrays, for the solver."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rhino_jax.cost.reshard import local_bytes, route
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search.domains import SPLIT, Kind, Meaning, Slots
from rhino_jax.search.graph import Endpoint, Graph, Var
from rhino_jax.search.prices import Prices
from rhino_jax.search.problem import FORBIDDEN, Problem

Array = np.ndarray

COPY = FORBIDDEN >> 10
"""Ticks for an op done whole along one axis, where that is not wanted: more than any
communication, less than what is impossible, so that axes can be settled in turn."""


@dataclass
class Energy:
    """The cost of any answer: op by op, link by link.

    ``memory_ticks``: ticks for a byte that stands in a device's memory at the peak.
    ``copies``: an op of matrix units may be done whole on several devices.
    """

    graph: Graph
    mesh: Mesh
    prices: Prices
    copies: bool = True
    kinds: Sequence[Kind] = ()
    _moves: dict[Hashable, int] = field(default_factory=dict)
    _matrices: dict[Hashable, Array] = field(default_factory=dict)
    _ops: dict[Hashable, int] = field(default_factory=dict)

    def meaning(self, var: int, slots: Slots) -> Meaning | None:
        return self.kinds[var].meaning(slots)

    def problem(
        self,
        domains: Sequence[Sequence[Slots]],
        memory_ticks: float,
    ) -> Problem:
        """The choice of one of its slots for every variable."""
        nodes = []
        wants: list[tuple[tuple[Layout, ...], ...]] = []
        gives: list[tuple[tuple[Layout, ...], ...]] = []
        for v, domain in enumerate(domains):
            meanings = [self.kinds[v].meaning(slots) for slots in domain]
            nodes.append(self._node(v, domain, meanings, memory_ticks))
            known = [m for m in meanings if m is not None]
            assert len(known) == len(meanings), self.graph.vars[v]
            wants.append(tuple(m.wants for m in known))
            gives.append(tuple(m.gives for m in known))
        edges = []
        for (source, target, shape, dtype), weight in self.graph.links.items():
            given = tuple(_lifted(g[source.index], source) for g in gives[source.var])
            at = -1 - target.index if self.graph.vars[target.var].is_site else 0
            wanted = tuple(_lifted(w[at], target) for w in wants[target.var])
            matrix = self._matrix(shape, dtype, given, wanted)
            cost = np.minimum(matrix * weight, FORBIDDEN)
            edges.append((source.var, target.var, cost))
        return Problem.of(nodes, edges)

    def domain(self, var: int, at: Slots, axis: int) -> tuple[Slots, ...]:
        """The ways to change one axis of ``at``, what stands there first."""
        kind = self.kinds[var]
        name = self.mesh.names[axis]
        found = [at]
        for slot in kind.options(name):
            slots = (*at[:axis], slot, *at[axis + 1 :])
            if slots != at and kind.meaning(slots) is not None:
                found.append(slots)
        return tuple(found)

    # ---- prices

    def _node(
        self,
        v: int,
        domain: Sequence[Slots],
        meanings: Sequence[Meaning | None],
        memory_ticks: float,
    ) -> Array:
        var = self.graph.vars[v]
        costs = []
        for slots, meaning in zip(domain, meanings, strict=True):
            assert meaning is not None
            cost = self._op(var, meaning) * var.weight if var.is_site else 0
            for index, count in var.held.items():
                value = (var.shape, var.dtype)
                if var.is_site:
                    made = var.makes[index]
                    value = (made.shape, made.dtype)
                held = local_bytes(*value, meaning.gives[index], self.mesh)
                cost += round(held * count * memory_ticks)
            if var.heavy and not self.copies:
                cost += COPY * _idle_axes(slots, self.mesh)
            costs.append(min(cost, FORBIDDEN))
        return np.array(costs, np.int64)

    def _op(self, var: Var, meaning: Meaning) -> int:
        assert (
            var.op is not None and var.rule is not None and meaning.choice is not None
        )
        key = id(var.rule), var.op.kind, var.fused, meaning.choice
        if key not in self._ops:
            seconds = self.prices.op(
                var.op,
                var.reads,
                var.makes,
                var.rule,
                meaning.choice,
                self.mesh,
                var.fused,
            )
            self._ops[key] = round(seconds * self.prices.ticks_per_second)
        return self._ops[key]

    def _matrix(
        self,
        shape: tuple[int, ...],
        dtype: str,
        given: tuple[Layout, ...],
        wanted: tuple[Layout, ...],
    ) -> Array:
        key = shape, dtype, given, wanted
        found = self._matrices.get(key)
        if found is None:
            rows, columns = dict.fromkeys(given), dict.fromkeys(wanted)
            small = np.array(
                [[self.move(shape, dtype, a, b) for b in columns] for a in rows],
                np.int64,
            )
            row = {layout: i for i, layout in enumerate(rows)}
            column = {layout: i for i, layout in enumerate(columns)}
            found = small[np.ix_([row[x] for x in given], [column[x] for x in wanted])]
            self._matrices[key] = found
        return found

    def move(
        self, shape: tuple[int, ...], dtype: str, source: Layout, target: Layout
    ) -> int:
        """Ticks to bring a value from one layout to another."""
        if source == target:
            return 0
        key = shape, dtype, source, target
        found = self._moves.get(key)
        if found is None:
            steps = route(shape, dtype, source, target, self.mesh)
            seconds = sum(
                self.prices.move(
                    step,
                    self.mesh,
                    local_bytes(shape, dtype, step.target, self.mesh),
                )
                for step in steps
            )
            found = round(seconds * self.prices.ticks_per_second)
            self._moves[key] = found
        return found


def _lifted(layout: Layout, end: Endpoint) -> Layout:
    return layout.prepended() if end.lift else layout


def _idle_axes(slots: Slots, mesh: Mesh) -> int:
    """Axes of several devices on which an op does the same work everywhere."""
    return sum(
        axis.size > 1 and not (slot is not None and slot[0] == SPLIT)
        for axis, slot in zip(mesh.axes, slots, strict=True)
    )
