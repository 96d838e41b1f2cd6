"""What is known of one signature of a step, and how a call is held against it.

A call is checked quickly, in a few microseconds per hundred leaves: what it brings anew
(the batch) leaf by leaf, the rest (the state) by its buffers, and a few of its leaves
by their shardings. A state of other shapes, or on the same devices otherwise, is
noticed by ``jax.jit``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import jax
from jax.api_util import shaped_abstractify

if TYPE_CHECKING:
    from rhino_jax.api.planned import Planned

Key = int | str
"""An argument: its position or its keyword."""
Static = tuple[tuple[Key, type, Any], ...]
"""Arguments that are no arrays: each with its type, for 1 is not True."""
Kind = Any
"""Shape, dtype and weak type of an array, or the type of a Python number."""

WATCHED = 16
PROBES = 8

_is_deleted = methodcaller("is_deleted")


def split(
    args: Sequence[Any], kwargs: Mapping[str, Any], keys: Sequence[Key]
) -> tuple[tuple[Any, ...], dict[str, Any], Static]:
    """The arguments without the static ones, and those.

    >>> split((1, "train"), {"k": 2}, (1, "k"))
    ((1,), {}, ((1, <class 'str'>, 'train'), ('k', <class 'int'>, 2)))
    """
    every: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    return (
        tuple(a for i, a in enumerate(args) if i not in keys),
        {name: value for name, value in kwargs.items() if name not in keys},
        tuple((k, type(every[k]), every[k]) for k in keys if k in every),
    )


def kind_of(leaf: Any) -> Kind:
    """What a leaf looks like from outside; two that look alike are traced alike."""
    try:
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)
    except AttributeError:
        return type(leaf)


def aval_of(leaf: Any) -> Kind:
    """What JAX makes of a leaf: float64 is float32 unless x64 is on.

    Raises ``TypeError`` for a leaf that is no array.
    """
    aval = shaped_abstractify(leaf)
    return aval.shape, aval.dtype, bool(getattr(aval, "weak_type", False))


@dataclass
class Entry:
    """One signature: its plan, the call that carries it out, and what calls look like.

    ``avals`` are those of all leaves. ``watched`` are the leaves that a call brings
    anew, each with the kinds and the shardings seen good so far; ``rest`` are the other
    leaves, mostly the state, and ``probes`` a few of them with their shardings.
    ``given`` are a few of the donated leaves, ``first`` their number where they are the
    first ones.
    """

    planned: Planned
    tree: Any
    static: Static
    keys: tuple[Key, ...]
    avals: tuple[Kind, ...]
    wanted: Sequence[jax.sharding.Sharding] = ()
    watched: tuple[tuple[int, set[Kind], list[Any]], ...] = ()
    rest: slice | tuple[int, ...] = ()
    probes: list[tuple[int, Any]] = field(default_factory=list)
    donates: bool = False
    given: tuple[int, ...] = ()
    first: int = 0
    constants: tuple[Any, ...] = ()
    run: Any = None

    def aim(self, wanted: Sequence[jax.sharding.Sharding]) -> None:
        """Make ready for calls whose leaves (then constants) should lie so."""
        traced = self.planned.traced
        state = traced.state_inputs
        anew = [i for i in range(len(self.avals)) if i not in state][-WATCHED:]
        rest = [i for i in range(len(self.avals)) if i not in anew]
        self.wanted = wanted
        self.watched = tuple((i, set(), []) for i in anew)
        self.rest = _packed(rest)
        self.probes = [(i, wanted[i]) for i in spread(rest)]
        self.donates = bool(traced.donated)
        self.given = spread(traced.donated)
        count = len(traced.donated)
        self.first = count if traced.donated == tuple(range(count)) else 0

    def matches(self, tree: Any, static: Static, avals: tuple[Kind, ...]) -> bool:
        return tree == self.tree and static == self.static and avals == self.avals

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The leaves of a call that is as usual; None for one to be looked at."""
        try:
            if self.keys:
                args, kwargs, static = split(args, kwargs, self.keys)
                if static != self.static:
                    return None
            leaves, tree = jax.tree.flatten((args, kwargs))
            if tree != self.tree or not self._as_usual(leaves):
                return None
        except (AttributeError, TypeError, ValueError):
            # No arrays of JAX, or tracers, or arguments that do not even compare.
            return None
        return leaves

    def _as_usual(self, leaves: list[Any]) -> bool:
        rest = self._rest_of(leaves)
        if any(map(_is_deleted, rest)):
            return False
        for i, home in self.probes:
            found = leaves[i].sharding
            if found is not home and found != home:
                return False
        buffers = set(map(id, rest)) if self.donates else set()
        if self.donates and len(buffers) != len(rest):
            return False
        for i, kinds, homes in self.watched:
            leaf = leaves[i]
            if kind_of(leaf) not in kinds or id(leaf) in buffers:
                return False
            if isinstance(leaf, jax.Array) and (
                leaf.is_deleted() or (leaf.committed and leaf.sharding not in homes)
            ):
                return False
        return True

    def learn(self, leaves: list[Any]) -> None:
        """Take these leaves, which lie where they should, for usual."""
        for i, kinds, homes in self.watched:
            leaf = leaves[i]
            kinds.add(kind_of(leaf))
            if isinstance(leaf, jax.Array) and leaf.committed:
                if leaf.sharding not in homes:
                    homes[:] = [*homes, leaf.sharding][-PROBES:]
        for k, (i, _) in enumerate(self.probes):
            x = leaves[i]
            if isinstance(x, jax.Array) and (
                x.committed or x.sharding == self.wanted[i]
            ):
                self.probes[k] = i, x.sharding

    def call(self, leaves: list[Any]) -> Any:
        """The result of the step on the leaves of its arguments."""
        if self.first:
            donated, others = leaves[: self.first], leaves[self.first :]
        else:
            donated, others = parted(leaves, self.planned.traced.donated)
        return self.run(donated, [*others, *self.constants])

    def _rest_of(self, leaves: list[Any]) -> list[Any]:
        rest = self.rest
        if isinstance(rest, slice):
            return leaves[rest]
        return [leaves[i] for i in rest]


def _packed(numbers: list[int]) -> slice | tuple[int, ...]:
    """A slice where the numbers follow one another: faster to read."""
    if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return slice(numbers[0], numbers[-1] + 1)
    return tuple(numbers)


def parted(leaves: Sequence[Any], chosen: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """The chosen leaves, and the others, each in order.

    >>> parted("abcd", (0, 1)), parted("abcd", (1, 3))
    ((['a', 'b'], ['c', 'd']), (['b', 'd'], ['a', 'c']))
    """
    count = len(chosen)
    if tuple(chosen) == tuple(range(count)):
        return list(leaves[:count]), list(leaves[count:])
    hits = set(chosen)
    others = [x for i, x in enumerate(leaves) if i not in hits]
    return [leaves[i] for i in sorted(hits)], others


def spread(items: Sequence[int], count: int = PROBES) -> tuple[int, ...]:
    """At most ``count`` of ``items``, evenly spread, first and last among them.

    >>> spread(range(100), 3)
    (0, 50, 99)
    """
    if len(items) <= count:
        return tuple(items)
    step = (len(items) - 1) / (count - 1)
    return tuple(items[round(k * step)] for k in range(count))
