"""What the search pays: integer ticks for a move, for an op, for a byte held.

Prices become integers when they enter the search, so that a plan is the same on every
machine. :class:`ClusterPrices` asks the cost model; :class:`AlphaBeta` is the abstract
cost of published expert plans: a collective is latency and bytes, compute is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.compute import kernel_work, memory_seconds
from rhino_jax.cost.handed import handed_on
from rhino_jax.cost.reshard import local_bytes
from rhino_jax.ir.factors import Choice, Rule, layouts
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Value
from rhino_jax.ir.steps import FREE, Step

PICOSECONDS = 10**12

FUSED_SHARE = 1 / 16
"""Assumed: what an element costs that is made on the way and not written."""


class Prices(Protocol):
    """How the search asks for a price. Everything is in seconds but ``ticks``."""

    @property
    def ticks_per_second(self) -> int:
        """Ticks are integers; what a second is worth in them."""

    def move(self, step: Step, mesh: Mesh, num_bytes: int) -> float:
        """Seconds of one step of a move that leaves ``num_bytes`` on a device."""

    def op(
        self,
        op: Op,
        reads: tuple[Value, ...],
        makes: tuple[Value, ...],
        rule: Rule,
        choice: Choice,
        mesh: Mesh,
        fused: tuple[bool, ...],
    ) -> float:
        """Seconds of one op on one shard, with what it hands around a ring.

        ``fused`` says of every operand, then of every result, that it is no real
        buffer: a neighbour makes or reads it on the way.
        """


@dataclass(frozen=True)
class ClusterPrices:
    """Roofline and links of a cluster, in picoseconds.

    What is fused away costs a share of its bytes all the same (:data:`FUSED_SHARE`):
    it is made element by element, and less of it is less work.
    """

    cluster: Cluster
    ticks_per_second: int = PICOSECONDS

    def move(self, step: Step, mesh: Mesh, num_bytes: int) -> float:
        if step.kind in FREE:
            return memory_seconds(num_bytes, self.cluster.device)
        return step_seconds(step, mesh, self.cluster)

    def op(
        self,
        op: Op,
        reads: tuple[Value, ...],
        makes: tuple[Value, ...],
        rule: Rule,
        choice: Choice,
        mesh: Mesh,
        fused: tuple[bool, ...],
    ) -> float:
        device = self.cluster.device
        work = kernel_work(op, reads, makes, rule, choice, mesh, device, fused)
        _, given = layouts(rule, choice)
        made = zip(makes, given, fused[len(reads) :], strict=True)
        gone = sum(
            local_bytes(v.shape, v.dtype, x, mesh) for v, x, away in made if away
        )
        around = _around_a_ring(self, rule, choice, reads, makes, mesh)
        return work.seconds + around + memory_seconds(FUSED_SHARE * gone, device)


@dataclass(frozen=True)
class AlphaBeta:
    """``alpha + beta * bytes`` a collective, by mesh axis; all else is free.

    A collective over several axes pays the dearest of them.

    >>> prices = AlphaBeta({"x": 1.0}, {"x": 0.5})
    >>> from rhino_jax.ir.layout import Layout
    >>> whole = Layout.replicated(0)
    >>> prices.move(Step("all-reduce", ("x",), whole, whole, 10), Mesh.of(x=2), 10)
    6.0
    """

    alpha: Mapping[str, float] = field(default_factory=dict)
    beta: Mapping[str, float] = field(default_factory=dict)
    ticks_per_second: int = 1000

    def move(self, step: Step, mesh: Mesh, num_bytes: int) -> float:
        if not step.wire_bytes:
            return 0.0
        alpha = max(self.alpha.get(axis, 1.0) for axis in step.axes)
        beta = max(self.beta.get(axis, 1.0) for axis in step.axes)
        return alpha + beta * step.wire_bytes

    def op(
        self,
        op: Op,
        reads: tuple[Value, ...],
        makes: tuple[Value, ...],
        rule: Rule,
        choice: Choice,
        mesh: Mesh,
        fused: tuple[bool, ...],
    ) -> float:
        return _around_a_ring(self, rule, choice, reads, makes, mesh)


def _around_a_ring(
    prices: Prices,
    rule: Rule,
    choice: Choice,
    reads: tuple[Value, ...],
    makes: tuple[Value, ...],
    mesh: Mesh,
) -> float:
    """Seconds of what an op hands around by itself."""
    handed = handed_on(rule, choice, reads, makes, mesh)
    return sum(one.turns * prices.move(one.step, mesh, 0) for one in handed)
