"""How the arguments of a call are handed to the compiled step, and where to look.

``jax.jit`` donates whole arguments. Where a step's donated leaves are whole arguments
(the state), they are handed on as they are: their leaves are taken out and put back by
JAX alone. Otherwise the leaves are, in two lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any

import jax
from jax.tree_util import GetAttrKey, SequenceKey

Key = int | str
"""An argument: its position or its keyword."""
OUTERMOST = 12
"""How many nodes of a returned state are looked into when it comes back."""
Call = tuple[Any, Any]
"""What is donated and what is not, as the compiled step takes it."""


@dataclass(frozen=True)
class Passing:
    """Which arguments (or leaves, where an argument is donated in part) are donated."""

    donated: tuple[Key, ...]
    others: tuple[Key, ...]
    by_leaves: bool = False

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The arguments in two groups.

        >>> Passing((0,), ("batch",)).call(("state",), {"batch": "rows"})
        (('state',), ('rows',))
        """
        every: Any = args
        if self.by_leaves:
            every = jax.tree.leaves((tuple(args), dict(kwargs)))
        elif kwargs:
            every = every_argument(args, kwargs)
        return (
            tuple([every[key] for key in self.donated]),
            tuple([every[key] for key in self.others]),
        )


def every_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """The arguments by their position or keyword.

    >>> every_argument("ab", {"c": 1})
    {0: 'a', 1: 'b', 'c': 1}
    """
    return {**dict(enumerate(args)), **kwargs}


def passing(in_tree: Any, donated: Sequence[int]) -> Passing:
    """How to pass a call of this tree whose leaves at ``donated`` are given away."""
    gone = set(donated)
    args, kwargs = jax.tree.unflatten(in_tree, range(in_tree.num_leaves))
    held = {
        key: set(jax.tree.leaves(x)) for key, x in every_argument(args, kwargs).items()
    }
    if all(leaves <= gone or not leaves & gone for leaves in held.values()):
        given = [key for key, leaves in held.items() if leaves & gone]
        kept = [key for key in held if key not in given]
        return Passing(tuple(given), tuple(kept))
    kept_leaves = [i for i in range(in_tree.num_leaves) if i not in gone]
    return Passing(tuple(donated), tuple(kept_leaves), by_leaves=True)


Way = tuple[Any, ...]
"""The steps from a tree to one of its leaves."""


def ways(tree: Any, count: int) -> tuple[Way, ...]:
    """The ways to at most ``count`` leaves of ``tree``, evenly spread.

    >>> ways(({"b": 1, "w": 2},), 1)
    ((SequenceKey(idx=0), DictKey(key='b')),)
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return tuple(paths[i] for i in spread(range(len(paths)), count))


def walked(tree: Any, way: Way) -> Any:
    """The leaf at the end of ``way``; None where a node cannot be walked.

    >>> walked(({"b": 1},), (SequenceKey(0), jax.tree_util.DictKey("b")))
    1
    """
    try:
        return reduce(_child, way, tree)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None


def _child(node: Any, key: Any) -> Any:
    if isinstance(key, GetAttrKey):
        return getattr(node, key.name)
    if isinstance(key, SequenceKey):
        return node[key.idx]
    return node[key.key]


def contents(tree: Any) -> list[int]:
    """The ids of ``tree`` and of what its outermost nodes hold, breadth first.

    Enough to tell a state that was returned and not touched since from one that was
    changed in place (``state["average"] = state["params"]``), without going through
    every leaf.

    >>> held = {"a": [1000], "b": [2000]}
    >>> before = contents(held)
    >>> held["a"] = held["b"]
    >>> contents(held) == before
    False
    """
    nodes = [tree]
    for node in nodes:
        if isinstance(node, (tuple, list)):
            inside: Any = node
        elif isinstance(node, dict):
            inside = node.values()
        elif hasattr(type(node), "__dataclass_fields__"):
            inside = vars(node).values()
        else:
            continue
        nodes.extend(islice(inside, OUTERMOST - len(nodes)))
        if len(nodes) == OUTERMOST:
            break
    return list(map(id, nodes))


def spread(items: Sequence[int], count: int) -> tuple[int, ...]:
    """At most ``count`` of ``items``, evenly spread, first and last among them.

    >>> spread(range(100), 3)
    (0, 50, 99)
    """
    if len(items) <= count:
        return tuple(items)
    step = (len(items) - 1) / max(count - 1, 1)
    return tuple(items[round(k * step)] for k in range(count))
