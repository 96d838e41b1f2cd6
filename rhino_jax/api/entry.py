"""What is known of one signature of a step, and how a call is held against it.

A call is checked quickly. What it brings anew (the batch) is looked at leaf by leaf.
The rest is mostly the state that the last call returned: where that is the very object
there is nothing to check. Otherwise the buffers of its leaves are, and the shardings of
a few; a state of other shapes, or on the same devices otherwise, is noticed by
``jax.jit``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.api_util import shaped_abstractify

from rhino_jax.api.passing import (
    Call,
    Key,
    Passing,
    Way,
    contents,
    every_argument,
    passing,
    spread,
    ways,
)

if TYPE_CHECKING:
    from rhino_jax.api.planned import Planned
    from rhino_jax.trace import Traced

Static = tuple[tuple[Key, type, Any], ...]
"""Arguments that are no arrays: each with its type, for 1 is not True."""
Kind = Any
"""Shape, dtype and weak type of an array, or the type of a Python number."""

WATCHED = 16
PROBES = 8
GIVEN = 2

_is_deleted = methodcaller("is_deleted")


def split(
    args: Sequence[Any], kwargs: Mapping[str, Any], keys: Sequence[Key]
) -> tuple[tuple[Any, ...], dict[str, Any], Static]:
    """The arguments without the static ones, and those.

    >>> split((1, "train"), {"k": 2}, (1, "k"))
    ((1,), {}, ((1, <class 'str'>, 'train'), ('k', <class 'int'>, 2)))
    """
    every = every_argument(args, kwargs)
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
    leaves and ``probes`` a few of them with their shardings. ``passing`` is how a call
    is handed on, ``given`` the ways to a few of the donated leaves. ``across`` tells
    devices of several processes: NumPy arrays are then placed call by call.

    ``heirs`` are the arguments that are all state, each with the part of the result
    that takes its place in the next call, ``news`` the others, of the tree
    ``news_tree``; empty where the state cannot be told apart so. ``alike`` are the
    watched leaves that could be one of the donated arrays, by their looks.
    """

    planned: Planned
    tree: Any
    static: Static
    keys: tuple[Key, ...]
    avals: tuple[Kind, ...]
    wanted: Sequence[jax.sharding.Sharding] = ()
    watched: tuple[tuple[int, set[Kind], list[Any]], ...] = ()
    alike: frozenset[int] = frozenset()
    rest: slice | tuple[int, ...] = ()
    probes: list[tuple[int, Any]] = field(default_factory=list)
    across: bool = False
    passing: Passing = field(default_factory=lambda: Passing((), ()))
    given: tuple[Way, ...] = ()
    heirs: tuple[tuple[Key, Key | None], ...] = ()
    news: tuple[Key, ...] = ()
    news_tree: Any = None
    constants: tuple[Any, ...] = ()
    run: Any = None

    @property
    def donates(self) -> bool:
        return bool(self.passing.donated)

    def aim(self, wanted: Sequence[jax.sharding.Sharding]) -> None:
        """Make ready for calls whose leaves (then constants) should lie so."""
        traced = self.planned.traced
        state = traced.state_inputs
        anew = [i for i in range(len(self.avals)) if i not in state][-WATCHED:]
        rest = [i for i in range(len(self.avals)) if i not in anew]
        self.wanted = wanted
        self.across = not all(where.is_fully_addressable for where in wanted)
        self.watched = tuple((i, set(), []) for i in anew)
        gone = {self.avals[i][:2] for i in traced.donated}
        self.alike = frozenset(i for i in anew if self.avals[i][:2] in gone)
        self.rest = _packed(rest)
        self.probes = [(i, wanted[i]) for i in spread(rest, PROBES)]
        self.passing = passing(self.tree, traced.donated)
        args, kwargs = jax.tree.unflatten(self.tree, range(self.tree.num_leaves))
        donated, _ = self.passing.call(args, kwargs)
        self.given = ways(donated, GIVEN)
        self.heirs, self.news = _heirs(self.planned.traced, args, kwargs, set(anew))
        every = every_argument(args, kwargs)
        self.news_tree = jax.tree.structure([every[key] for key in self.news])

    def matches(self, tree: Any, static: Static, avals: tuple[Kind, ...]) -> bool:
        return tree == self.tree and static == self.static and avals == self.avals

    def read(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], returned: Returned
    ) -> Call | None:
        """A call that is as usual, to be handed on; None for one to be looked at.

        ``returned`` tells what the last call returned for this one.
        """
        try:
            if self.keys:
                args, kwargs, static = split(args, kwargs, self.keys)
                if static != self.static:
                    return None
            if self._returned(args, kwargs, returned):
                every: Any = every_argument(args, kwargs) if kwargs else args
                news, tree = jax.tree.flatten([every[key] for key in self.news])
                if tree == self.news_tree and not self._may_be_given(news):
                    usual = self._usual(news)
                    return self.passing.call(args, kwargs) if usual else None
            leaves, tree = jax.tree.flatten((tuple(args), dict(kwargs)))
            if tree != self.tree:
                return None
            ids = list(map(id, _some(leaves, self.rest)))
            news = [leaves[i] for i, _, _ in self.watched]
            if self.donates and any(id(x) in ids for x in news):
                return None
            if not (self._sound(leaves, ids) and self._usual(news)):
                return None
            return self.passing.call(args, kwargs)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            # No arrays of JAX, or tracers, or arguments that do not even compare.
            return None

    def _returned(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], returned: Returned
    ) -> bool:
        """Whether the state is what the last call, of this entry, returned."""
        if not returned or returned[0] is not self:
            return False
        if len(args) + len(kwargs) != len(self.heirs) + len(self.news):
            return False
        return all(
            contents(args[key] if isinstance(key, int) else kwargs[key]) == known
            for (key, _), known in zip(self.heirs, returned[1], strict=True)
        )

    def _sound(self, leaves: list[Any], ids: list[int]) -> bool:
        """Whether the rest is alive, given once, and where it should be."""
        if any(map(_is_deleted, _some(leaves, self.rest))):
            return False
        for i, home in self.probes:
            found = leaves[i].sharding
            if found is not home and found != home:
                return False
        return not self.donates or len(set(ids)) == len(ids)

    def _may_be_given(self, news: list[Any]) -> bool:
        """Whether something brought anew could be one of the donated arrays."""
        return bool(self.alike) and any(
            i in self.alike and isinstance(leaf, jax.Array)
            for leaf, (i, _, _) in zip(news, self.watched, strict=True)
        )

    def _usual(self, news: list[Any]) -> bool:
        """Whether what a call brings anew is like what was brought before."""
        for leaf, (_, kinds, homes) in zip(news, self.watched, strict=True):
            if kind_of(leaf) not in kinds:
                return False
            if self.across and isinstance(leaf, np.ndarray):
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

    def arranged(self, leaves: Sequence[Any]) -> Call:
        """Leaves that were looked at, as a call is handed on."""
        return self.passing.call(*jax.tree.unflatten(self.tree, leaves))

    def call(self, call: Call) -> tuple[Any, Returned]:
        """The result of the step, and what is known of the next call's state."""
        result = self.run(*call, self.constants)
        ids = tuple(
            [contents(result if key is None else result[key]) for _, key in self.heirs]
        )
        return result, (self, ids) if self.heirs else None


Returned = tuple[Entry, tuple[list[int], ...]] | None
"""Which entry was called last, and the contents of its result's parts (``heirs``)."""


def _heirs(
    traced: Traced, args: Any, kwargs: Any, anew: set[int]
) -> tuple[tuple[tuple[Key, Key | None], ...], tuple[Key, ...]]:
    """The arguments that are all state, with their parts of the result; the others."""
    pairs = dict(traced.state_pairs)
    result = jax.tree.unflatten(traced.out_tree, range(traced.out_tree.num_leaves))
    parts: list[tuple[Key | None, Any]] = [(None, result)]
    if type(result) in (tuple, list):
        parts += enumerate(result)
    elif type(result) is dict:
        parts += result.items()
    homes = {tuple(jax.tree.leaves(x)): key for key, x in reversed(parts)}
    heirs: list[tuple[Key, Key | None]] = []
    news: list[Key] = []
    brought: list[int] = []
    for key, x in every_argument(args, kwargs).items():
        leaves = jax.tree.leaves(x)
        to = tuple(pairs.get(i, -1) for i in leaves)
        if leaves and to in homes:
            heirs.append((key, homes[to]))
        elif anew.issuperset(leaves):
            news.append(key)
            brought += leaves
        else:
            return (), ()
    # What is anew must be what is watched, in its order.
    return (tuple(heirs), tuple(news)) if brought == sorted(anew) else ((), ())


def _some(items: Any, which: slice | tuple[int, ...]) -> Any:
    return items[which] if isinstance(which, slice) else [items[i] for i in which]


def _packed(numbers: list[int]) -> slice | tuple[int, ...]:
    """A slice where the numbers follow one another: faster to read."""
    if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return slice(numbers[0], numbers[-1] + 1)
    return tuple(numbers)
