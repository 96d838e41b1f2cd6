"""What is known of the values of one Program while a plan for it is completed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from rhino_jax.cost.reshard import local_bytes, route, wire_bytes
from rhino_jax.ir.depends import forward
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.steps import FREE, Move


@dataclass(frozen=True)
class Marks:
    """Facts about one value that decide what an op follows.

    ``batch``: it descends from the batch. ``keep``: axes on which it is a stationary
    weight, which ops must follow. ``free``: it takes whatever layout is asked of it
    (the carry of an accumulator, before its layout is known). ``open``: axes on which
    a parameter's layout is not settled yet, so that the first reader may wish it.
    """

    batch: bool = False
    keep: frozenset[str] = frozenset()
    free: bool = False
    open: frozenset[str] = frozenset()


@dataclass
class State:
    """Layouts at hand per value, marks, hints, and the moves written so far."""

    program: Program
    mesh: Mesh
    marks: dict[int, Marks]
    hints: Mapping[int, Layout]
    versions: dict[int, dict[Layout, str]] = field(default_factory=dict)
    homes: dict[int, Layout] = field(default_factory=dict)
    wishes: dict[int, Layout] = field(default_factory=dict)
    expert_axes: frozenset[str] = frozenset()
    stored: dict[int, Layout] = field(default_factory=dict)
    decided: dict[Hashable, Choice] = field(default_factory=dict)
    rows: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def batch_values(self) -> frozenset[int]:
        """Values that descend from the batch."""
        inputs = (v for v in self.program.inputs if self.mark(v).batch)
        return forward(self.program, inputs)

    def home(self, value: int) -> Layout:
        """The layout of ``value`` where it was made (or first settled)."""
        if self.program.values[value].literal is not None:
            return Layout.replicated(len(self.program.values[value].shape))
        return self.homes[value]

    def put(self, value: int, layout: Layout) -> None:
        self.homes[value] = layout
        self.versions[value] = {layout: ""}

    def store(self, value: int, layout: Layout, used: Layout) -> None:
        """An input that comes as ``layout`` and is brought to ``used`` at first use."""
        self.put(value, used)
        if layout != used:
            self.stored[value] = layout
            self.versions[value] = {layout: ""}

    def mark(self, value: int) -> Marks:
        return self.marks.get(value, Marks())

    def wish(self, value: int, layout: Layout) -> None:
        """Settle the open axes of ``value`` as its first reader wants them."""
        still = self.mark(value).open
        asked = still.intersection(layout.split_axes)
        if asked:
            self.wishes[value] = layout.without(set(layout.axes) - still).settled()
            self.put(value, layout.settled())
            self.set_mark(value, open=still - asked)

    def cost(self, value: int, source: Layout, target: Layout) -> int:
        v = self.program.values[value]
        return wire_bytes(v.shape, v.dtype, source, target, self.mesh)

    def reading_bytes(self, value: int, layout: Layout, axis: str) -> int:
        """Bytes sent over ``axis`` to have ``value`` in ``layout``."""
        target = layout.only(axis)
        sent = self.cost(value, self.home(value).only(axis), target)
        if value in self.stored:
            sent = min(sent, self.cost(value, self.stored[value].only(axis), target))
        return sent

    def read(self, value: int, target: Layout, region: str) -> tuple[Move, ...]:
        """The moves that bring ``value`` to ``target``, none if it is at hand there.

        What was moved in another region (forward, backward) is moved again: a
        gathered weight is not kept from the forward to the backward pass. An activation
        that did not grow when it was moved is kept: the backward pass holds it either
        way, and reads it where it is.
        """
        v = self.program.values[value]
        if v.literal is not None and not target.partial:
            return ()
        home = self.home(value)
        first: tuple[Move, ...] = ()
        held = self.versions.setdefault(value, {home: ""})
        stored = self.stored.get(value, home)
        if target == stored:
            return ()
        if home not in held:
            first = (self._move(value, stored, home),)
            held[home] = ""
        if target == home or held.get(target) == region or self._kept(value, target):
            return first
        near = [
            s
            for s, where in held.items()
            if s in (home, stored) or where == region or self._kept(value, s)
        ]
        source = min(near, key=lambda s: (self.cost(value, s, target), s != home))
        # A weight moved, or turned around, and gathered for the backward pass: the
        # compiler may see that the forward pass gathered the same.
        weight = region == "backward" and not self.mark(value).batch
        again = target in held or weight
        held[target] = region
        return (*first, replace(self._move(value, source, target), again=again))

    def _kept(self, value: int, layout: Layout) -> bool:
        """Whether ``value``, once moved to ``layout``, stays at hand there."""
        if layout not in self.versions[value] or not self.mark(value).batch:
            return False
        v = self.program.values[value]
        here = local_bytes(v.shape, v.dtype, self.home(value), self.mesh)
        return local_bytes(v.shape, v.dtype, layout, self.mesh) <= here

    def _move(self, value: int, source: Layout, target: Layout) -> Move:
        v = self.program.values[value]
        steps = route(v.shape, v.dtype, source, target, self.mesh)
        return Move(value, source, target, steps)

    def settle(self, value: int, target: Layout) -> Move:
        """Move ``value`` right after it is made; ``target`` is its home from now."""
        move = self._move(value, self.homes[value], target)
        self.put(value, target)
        return move

    def set_mark(self, value: int, **changed: object) -> None:
        self.marks[value] = replace(self.mark(value), **changed)  # type: ignore[arg-type]


def is_free(move: Move) -> bool:
    """Whether a move sends nothing."""
    return all(step.kind in FREE for step in move.steps)
