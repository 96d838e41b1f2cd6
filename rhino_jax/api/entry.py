"""What is known of one signature of a step, and how a call is held against it.

A call is checked quickly. What it brings anew (the batch) is looked at leaf by leaf.
The rest is mostly the state that the last call returned: where its leaves are those
very arrays there is nothing to check. Otherwise their buffers are, and the shardings of
a few; a state of other shapes, or on the same devices otherwise, is noticed by
``jax.jit``.
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
    leaves and ``probes`` a few of them with their shardings. ``donates`` counts the
    donated leaves, ``first`` says that they are the first ones, ``given`` are a few of
    them. ``next`` are the results that take the place of ``rest`` in the next call.
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
    donates: int = 0
    first: bool = False
    given: tuple[int, ...] = ()
    next: slice | tuple[int, ...] = ()
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
        self.donates = len(traced.donated)
        self.first = traced.donated == tuple(range(self.donates))
        self.given = spread(traced.donated)
        heirs = dict(traced.state_pairs)
        self.next = _packed([heirs[i] for i in rest if i in heirs])

    def matches(self, tree: Any, static: Static, avals: tuple[Kind, ...]) -> bool:
        return tree == self.tree and static == self.static and avals == self.avals

    def read(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], returned: list[int]
    ) -> list[Any] | None:
        """The leaves of a call that is as usual; None for one to be looked at.

        ``returned`` are the ids of the arrays that make up the last call's state.
        """
        try:
            if self.keys:
                args, kwargs, static = split(args, kwargs, self.keys)
                if static != self.static:
                    return None
            leaves, tree = jax.tree.flatten((args, kwargs))
            if tree != self.tree:
                return None
            ids = list(map(id, _some(leaves, self.rest)))
            if ids != returned and not self._sound(leaves, ids):
                return None
            return leaves if self._as_usual(leaves, ids) else None
        except (AttributeError, TypeError, ValueError):
            # No arrays of JAX, or tracers, or arguments that do not even compare.
            return None

    def _sound(self, leaves: list[Any], ids: list[int]) -> bool:
        """Whether the rest is alive, given once, and where it should be."""
        if any(map(_is_deleted, _some(leaves, self.rest))):
            return False
        for i, home in self.probes:
            found = leaves[i].sharding
            if found is not home and found != home:
                return False
        return not self.donates or len(set(ids)) == len(ids)

    def _as_usual(self, leaves: list[Any], ids: list[int]) -> bool:
        """Whether what a call brings anew is like what was brought before."""
        for i, kinds, homes in self.watched:
            leaf = leaves[i]
            if kind_of(leaf) not in kinds:
                return False
            if isinstance(leaf, jax.Array) and (
                leaf.is_deleted()
                or (leaf.committed and leaf.sharding not in homes)
                or (self.donates and id(leaf) in ids)
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

    def call(self, leaves: list[Any]) -> tuple[Any, list[int]]:
        """The result of the step, and the ids of the arrays of its state."""
        if self.first:
            donated, others = leaves[: self.donates], leaves[self.donates :]
        else:
            donated, others = parted(leaves, self.planned.traced.donated)
        outs = self.run(donated, [*others, *self.constants])
        result = jax.tree.unflatten(self.planned.traced.out_tree, outs)
        return result, list(map(id, _some(outs, self.next)))


def _some(items: Any, which: slice | tuple[int, ...]) -> Any:
    return items[which] if isinstance(which, slice) else [items[i] for i in which]


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
