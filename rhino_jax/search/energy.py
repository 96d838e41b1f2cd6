"""Prices of variables and links as integer arrays, for the solver."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rhino_jax.cost.reshard import local_bytes, route
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search.domains import SPLIT, Domain, Kind, Meaning, Slots
from rhino_jax.search.graph import Graph, Var
from rhino_jax.search.prices import Prices
from rhino_jax.search.problem import FORBIDDEN, Problem

Array = np.ndarray

COPY = FORBIDDEN >> 10
"""Ticks for an op done whole along one axis, where that is not wanted: more than any
communication, less than what is impossible, so that axes can be settled in turn."""


@dataclass(frozen=True)
class Memo:
    """What was worked out for one mesh: good for every Program that is searched on it.

    ``kinds``: the makes of variables; ``moves``: ticks by layouts; ``matrices``: ticks
    of links by domains; ``ops``: ticks by rule and choice.
    """

    kinds: dict[Hashable, Kind] = field(default_factory=dict)
    moves: dict[Hashable, int] = field(default_factory=dict)
    matrices: dict[Hashable, Array] = field(default_factory=dict)
    ops: dict[Hashable, int] = field(default_factory=dict)


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
    memo: Memo = field(default_factory=Memo, repr=False)
    _nodes: dict[Hashable, Array] = field(default_factory=dict)

    def meaning(self, var: int, slots: Slots) -> Meaning | None:
        return self.kinds[var].meaning(slots)

    def problem(self, domains: Sequence[Domain], memory_ticks: float) -> Problem:
        """The choice of one of its slots for every variable."""
        nodes = [self._node(v, d, memory_ticks) for v, d in enumerate(domains)]
        edges = []
        for (source, target, shape, dtype), weight in self.graph.links.items():
            at = -1 - target.index if self.graph.vars[target.var].is_site else 0
            giving, wanting = domains[source.var], domains[target.var]
            key = shape, dtype, giving, source.index, source.lift, wanting, at
            matrix = self.memo.matrices.get((key, target.lift))
            if matrix is None:
                matrix = self.memo.matrices[key, target.lift] = self._matrix(
                    shape,
                    dtype,
                    giving.gives(source.index, source.lift),
                    wanting.wants(at, target.lift),
                )
            if weight != 1:
                matrix = np.minimum(matrix * weight, FORBIDDEN)
            edges.append((source.var, target.var, matrix))
        return Problem.of(nodes, edges)

    # ---- prices

    def _node(self, v: int, domain: Domain, memory_ticks: float) -> Array:
        var = self.graph.vars[v]
        key = v, domain
        seconds = self._nodes.get(key)
        if seconds is None:
            seconds = self._nodes[key] = np.array(
                [
                    self._own(var, slots, meaning)
                    for slots, meaning in zip(
                        domain.slots, domain.meanings, strict=True
                    )
                ],
                np.int64,
            )
        if not memory_ticks or not var.held:
            return seconds
        held = [self.held_bytes(var, meaning) for meaning in domain.meanings]
        return seconds + np.array([round(n * memory_ticks) for n in held], np.int64)

    def _own(self, var: Var, slots: Slots, meaning: Meaning) -> int:
        """Ticks of an op, as often as it runs."""
        cost = self._op(var, meaning) * var.weight if var.is_site else 0
        if var.heavy and not self.copies:
            cost += COPY * _idle_axes(slots, self.mesh, var.limits.barred)
        return min(cost, FORBIDDEN)

    def held_bytes(self, var: Var, meaning: Meaning) -> int:
        """Bytes that a variable has standing at the peak."""
        total = 0
        for index, count in var.held.items():
            made = var.makes[index] if var.is_site else None
            shape, dtype = (made.shape, made.dtype) if made else (var.shape, var.dtype)
            layout = meaning.gives[index]
            total += count * local_bytes(shape, dtype, layout, self.mesh)
        return total

    def spare_bytes(self, slots: Sequence[Slots]) -> int:
        """How much less than with ``slots`` can stand at the peak, at most: as if all
        that is not fixed could be divided among all devices."""
        spare = 0
        for v, var in enumerate(self.graph.vars):
            if var.held and var.fixed is None:
                meaning = self.meaning(v, slots[v])
                assert meaning is not None
                whole = replace(meaning, gives=tuple(map(_undivided, meaning.gives)))
                least = -(-self.held_bytes(var, whole) // self.mesh.num_devices)
                spare += max(self.held_bytes(var, meaning) - least, 0)
        return spare

    def _op(self, var: Var, meaning: Meaning) -> int:
        assert (
            var.op is not None and var.rule is not None and meaning.choice is not None
        )
        key = id(var.rule), var.op.kind, var.fused, meaning.choice
        ops = self.memo.ops
        if key not in ops:
            seconds = self.prices.op(
                var.op,
                var.reads,
                var.makes,
                var.rule,
                meaning.choice,
                self.mesh,
                var.fused,
            )
            ops[key] = round(seconds * self.prices.ticks_per_second)
        return ops[key]

    def _matrix(
        self,
        shape: tuple[int, ...],
        dtype: str,
        given: tuple[Layout, ...],
        wanted: tuple[Layout, ...],
    ) -> Array:
        rows, columns = list(dict.fromkeys(given)), list(dict.fromkeys(wanted))
        small = np.array(
            [[self.move(shape, dtype, a, b) for b in columns] for a in rows], np.int64
        )
        row = [rows.index(x) for x in given]
        column = [columns.index(x) for x in wanted]
        return small[np.ix_(row, column)]

    def move(
        self, shape: tuple[int, ...], dtype: str, source: Layout, target: Layout
    ) -> int:
        """Ticks to bring a value from one layout to another."""
        if source == target:
            return 0
        key = shape, dtype, source, target
        found = self.memo.moves.get(key)
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
            self.memo.moves[key] = found
        return found


def _undivided(layout: Layout) -> Layout:
    return Layout.replicated(len(layout.dims))


def _idle_axes(slots: Slots, mesh: Mesh, barred: Sequence[str]) -> int:
    """Axes of several devices on which an op does the same work everywhere."""
    return sum(
        axis.size > 1
        and axis.name not in barred
        and not (slot is not None and slot[0] == SPLIT)
        for axis, slot in zip(mesh.axes, slots, strict=True)
    )
