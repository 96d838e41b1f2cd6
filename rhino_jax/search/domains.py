"""What each variable may be: per mesh axis one *slot*, and what slots mean together.

A slot says what one axis does for one variable: nothing, take the outermost digit of a
part of a factor, let a partial value flow through, or (of a port) leave a sum partial.
Slots of all axes make a :class:`~rhino_jax.ir.factors.Choice` or a
:class:`~rhino_jax.ir.layout.Layout`. Axes on one part take its digits in the order of
the mesh, so that what is stored is stored in blocks. The outermost part of what is
not stored need not divide: its last shards are then padded.

Variables of one make (same rule, same parts) share a :class:`Kind`, which remembers
what it was asked.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rhino_jax.ir.factors import (
    WINDOW,
    Choice,
    Rule,
    choice_problems,
    layouts,
    manual_choice,
)
from rhino_jax.ir.layout import Layout, Split, contiguous, local_size, sorted_dim
from rhino_jax.ir.mesh import STAGE, TORUS, Mesh
from rhino_jax.ir.staged import Lift
from rhino_jax.rules.placing import OPEN
from rhino_jax.search.graph import OUTPUT, READ, STATE, STORED, SUMMED, Graph, Var
from rhino_jax.search.parts import Name, Part, Parts
from rhino_jax.search.rows import NO_LIMITS, Limits

Slot = tuple[str, Name, Part] | None
"""("split", factor or dimension, part), ("flow", number, ...), ("sum", ...) or None."""

Slots = tuple[Slot, ...]
"""One slot for every axis of the mesh, in its order."""

NO_PART: Part = (0, 0)
SPLIT, FLOW, SUM = "split", "flow", "sum"

TILE = 8 * 128
"""Elements: a TPU compiler scatters whole tiles, more than one, or it all-reduces."""

ALIGNED = 8
"""Elements: padded shards of a long dimension hold a multiple of this many, 16 bytes
of bfloat16, which is how matrix units load them."""
LONG = 100 * ALIGNED
"""Elements of a shard from which on that wastes less than 1 %."""


@dataclass(frozen=True)
class Meaning:
    """What slots say: the choice (of a site) and the layouts that it implies.

    A port's one layout is both what it wants and what it gives.
    """

    choice: Choice | None
    wants: tuple[Layout, ...]
    gives: tuple[Layout, ...]


@dataclass(frozen=True, eq=False)
class Domain:
    """What one variable may be in one problem: slots and what they mean.

    Equal only to itself, so that what was worked out for it is found again quickly.
    """

    slots: tuple[Slots, ...]
    meanings: tuple[Meaning, ...]

    def gives(self, index: int, lift: Lift) -> tuple[Layout, ...]:
        """The layouts of one result, as ``lift`` says that it is seen."""
        return tuple(lift(meaning.gives[index]) for meaning in self.meanings)

    def wants(self, index: int, lift: Lift) -> tuple[Layout, ...]:
        """The layouts of one operand."""
        return tuple(lift(meaning.wants[index]) for meaning in self.meanings)


@dataclass
class Kind:
    """All variables of one make on one mesh. ``pads``: shards may be padded.
    ``halos``: windows may be cut in blocks."""

    mesh: Mesh
    parts: Parts
    rule: Rule | None = None
    shape: tuple[int, ...] = ()
    role: str = ""
    lifted: bool = False
    fixed: Layout | None = None
    wanted: tuple[tuple[str, ...], ...] | None = None
    settled: bool = False
    pads: bool = False
    halos: bool = True
    limits: Limits = NO_LIMITS
    _known: dict[Slots, Meaning | None] = field(default_factory=dict)
    _domains: dict[Hashable, Domain] = field(default_factory=dict)

    @cached_property
    def manual(self) -> Choice | None:
        """The choice that the user has made for an op."""
        return None if self.rule is None else manual_choice(self.rule, self.mesh)

    def around(self, at: Slots, axis: int) -> Domain:
        """The ways to change one axis of ``at``, what stands there first."""
        key = at, axis
        if key not in self._domains:
            options = self.options(self.mesh.names[axis])
            changed = ((*at[:axis], slot, *at[axis + 1 :]) for slot in options)
            stays = (at,) if at[axis] in options else ()
            self._domains[key] = self.domain((*stays, *changed))
        return self._domains[key]

    def domain(self, slots: Iterable[Slots]) -> Domain:
        """Those of ``slots`` that can be, without repeats."""
        wanted = tuple(dict.fromkeys(slots))
        if wanted not in self._domains:
            known = [(s, m) for s in wanted if (m := self.meaning(s)) is not None]
            self._domains[wanted] = Domain(
                tuple(s for s, _ in known), tuple(m for _, m in known)
            )
        return self._domains[wanted]

    def options(self, axis: str) -> tuple[Slot, ...]:
        """The slots of one axis, whatever the others are."""
        if (
            self.fixed is not None
            or self.manual is not None
            or self.mesh.size(axis) == 1
            or axis in self.limits.barred
        ):
            return (None,)
        found = list(self._splits(axis))
        if self.wanted is not None:
            asked = [d for d, axes in enumerate(self.wanted) if axis in axes]
            rest = () if asked else (None,)
            if not asked:
                asked = [d for d, axes in enumerate(self.wanted) if axes == OPEN]
            found = [s for s in found if s and self._dim_of(s[1]) in asked]
            return (*rest, *found) or (None,)
        if self.rule is not None:
            count = 0 if self.settled else len(self.rule.flows)
            flows: Iterator[Slot] = ((FLOW, n, NO_PART) for n in range(count))
            return (None, *found, *flows)
        if self.role == SUMMED:
            return (None, *found, (SUM, 0, NO_PART))
        return (None, *found)

    def _dim_of(self, name: Name) -> int:
        """The dimension of the (elementwise) result that a factor is."""
        assert self.rule is not None
        return next(d for d, dim in enumerate(self.rule.results[0]) if name in dim)

    def _splits(self, axis: str) -> Iterator[Slot]:
        size = self.mesh.size(axis)
        if self.rule is None:
            for d, n in enumerate(self.shape):
                stored = self.role in STORED
                parts = ((1, n),) if stored else self.parts[d]
                for part in parts:
                    if self._may_divide(d, part, size):
                        yield SPLIT, d, part
            return
        for factor in self.rule.factors:
            if factor.traits.split and (self.halos or factor.kind != WINDOW):
                whole = ((1, factor.size),)
                for part in self.parts[factor.name] if factor.traits.strided else whole:
                    if self._may_divide(factor.name, part, size):
                        yield SPLIT, factor.name, part

    def _may_divide(self, name: Name, part: Part, size: int) -> bool:
        """Whether a part may be cut in ``size``: evenly, or as the outermost part of
        what may be padded, with fewer pads than elements."""
        count = part[1] // part[0]
        if count % size == 0:
            return True
        few = -(-count // size) * size < 2 * count
        return self.pads and few and _may_pad(self.rule, self.shape, name, part)

    def meaning(self, slots: Slots) -> Meaning | None:
        """What ``slots`` say together; None where they can not be together."""
        if slots not in self._known:
            found = self._meaning(slots)
            if found is not None:
                wanted = found.wants if self.rule is not None else ()
                allowed = self.limits.allow((*wanted, *found.gives), self.mesh)
                found = found if allowed else None
            self._known[slots] = found
        return self._known[slots]

    def _meaning(self, slots: Slots) -> Meaning | None:
        if self.fixed is not None:
            return Meaning(None, (self.fixed,), (self.fixed,))
        if self.rule is not None and self.manual is not None:
            return Meaning(self.manual, *layouts(self.rule, self.manual))
        digits = self._digits(slots)
        if digits is None:
            return None
        flows = {
            axis: int(slot[1])
            for axis, slot in zip(self.mesh.names, slots, strict=True)
            if slot and slot[0] == FLOW
        }
        if self.rule is not None:
            choice = Choice.of({str(n): s for n, s in digits.items()}, flows)
            if choice_problems(self.rule, choice, self.mesh):
                return None
            wants, gives = layouts(self.rule, choice)
            return Meaning(choice, wants, gives)
        layout = Layout(
            tuple(sorted_dim(digits.get(d, ())) for d in range(len(self.shape))),
            tuple(
                sorted(
                    (axis, "sum")
                    for axis, slot in zip(self.mesh.names, slots, strict=True)
                    if slot and slot[0] == SUM
                )
            ),
        )
        if layout.problems(self.shape, self.mesh) or not self._may_store(layout):
            return None
        return Meaning(None, (layout,), (layout,))

    def _digits(self, slots: Slots) -> Mapping[Name, list[Split]] | None:
        """The digits that axes take: within a part the first axis is outermost."""
        inside: dict[tuple[Name, Part], list[str]] = {}
        for axis, slot in zip(self.mesh.names, slots, strict=True):
            if slot and slot[0] == SPLIT:
                inside.setdefault((slot[1], slot[2]), []).append(axis)
        found: dict[Name, list[Split]] = {}
        for (name, part), axes in inside.items():
            # Stages innermost: gathered over them, what is left is in blocks.
            axes.sort(key=lambda axis: axis == STAGE)
            size = self.mesh.group_size(tuple(axes))
            if not self._may_divide(name, part, size):
                return None
            low, high = part
            count = high // low
            if low == 1 and count % size and count >= LONG * size:
                count = -(-count // (ALIGNED * size)) * ALIGNED * size
            found.setdefault(name, []).extend(
                Split(split.axis, split.stride * low)
                for split in contiguous(count, axes, self.mesh)
            )
        return found

    def _may_store(self, layout: Layout) -> bool:
        """Whether JAX can hold it, and (on a torus) compilers can scatter it."""
        if self.role not in STORED or not layout.axes:
            return True
        for n, dim in zip(self.shape, layout.dims, strict=True):
            axes = [s.axis for s in dim]
            if contiguous(n, axes, self.mesh) != dim:
                return False
            if n % self.mesh.group_size(tuple(axes)):
                return False
        if self.role not in (STATE, OUTPUT):
            return True
        layers = layout.dims[0] if self.lifted else ()
        if any(split.axis != STAGE for split in layers):
            return False
        links = {axis.name: axis.link for axis in self.mesh.axes}
        held = {split.axis for split in layers}  # stacked where it lies
        if any(links[axis] == TORUS for axis in layout.axes if axis not in held):
            sides = zip(self.shape, layout.dims, strict=True)
            shard = 1
            for n, dim in sides:
                shard *= local_size(n, dim, self.mesh)
            return len(self.shape) > 1 and shard > TILE and shard % TILE == 0
        return True


def kinds_of(
    graph: Graph,
    all_of: Sequence[Parts],
    mesh: Mesh,
    made: dict[Hashable, Kind],
    even: bool = False,
    halos: bool = True,
) -> list[Kind]:
    """For each variable its Kind; ``made`` are those there are, and gets the new.

    ``even``: nothing is padded. ``halos``: windows may be cut in blocks.
    """
    found = []
    for var, parts in zip(graph.vars, all_of, strict=True):
        key = even, halos, _key(var, parts)
        if key not in made:
            pads = not even and _pads(var, parts, mesh)
            # The same, where there is nothing to pad.
            same = "pads", pads, *key[1:]
            made[key] = made[same] = made.get(same) or Kind(
                mesh,
                parts,
                var.rule,
                var.shape,
                var.role,
                var.lifted,
                var.fixed,
                var.wanted,
                var.settled,
                pads,
                halos,
                var.limits,
            )
        found.append(made[key])
    return found


def _pads(var: Var, parts: Parts, mesh: Mesh) -> bool:
    """Whether a variable has an outermost part that may be padded, and does not divide.

    Of ports only those that readers share: JAX stores no padded array, and no loop
    carries or stacks one.
    """
    if var.rule is None and var.role != READ:
        return False
    return any(
        high // low % mesh.num_devices and _may_pad(var.rule, var.shape, name, part)
        for name, of in parts.items()
        for part in of
        for low, high in (part,)
    )


def _may_pad(rule: Rule | None, shape: Sequence[int], name: Name, part: Part) -> bool:
    """Whether ``part`` is outermost in all there is, and may be padded."""
    if rule is None:
        return part[1] == shape[int(name)]
    name = str(name)
    return part[1] == rule.factor(name).size and rule.may_be_ragged(name)


def _key(var: Var, parts: Parts) -> Hashable:
    made_of: Sequence[Hashable] = tuple(parts.items())
    rule = id(var.rule) if var.rule is not None else None
    pinned = var.fixed, var.wanted, var.settled, var.limits
    return rule, var.shape, var.role, var.lifted, pinned, made_of
