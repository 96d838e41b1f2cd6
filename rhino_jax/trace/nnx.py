"""flax nnx: variables that a step changes must come back from it.

An nnx module is a pytree, so a traced step works on a copy: what it assigns to a
variable is lost unless the module (or its state) is returned. Nothing here imports
flax: where it is not loaded there are no variables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rhino_jax.errors import problems
from rhino_jax.trace.arguments import (
    few,
    function_name,
    join,
    keys,
    leaves_of,
    positional_names,
)

Variables = dict[str, Any]
"""Tree path -> nnx.Variable."""


def variables(
    fun: Any, args: Sequence[Any], kwargs: Mapping[str, Any], states: bool = True
) -> Variables:
    """Every nnx variable among the arguments, by its path.

    Without ``states`` those of modules alone. A state holds each of its variables once;
    where two states share one (parameters, and an average that begins as they are),
    they are meant to come apart.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return {}
    kind = nnx.Variable
    ends = kind if states else (kind, nnx.State)
    names = positional_names(fun, len(args))
    found = {}
    for name, tree in [*zip(names, args, strict=True), *kwargs.items()]:
        for path, leaf in leaves_of(tree, lambda x: isinstance(x, ends)):
            if isinstance(leaf, kind):
                found[join(name, *keys(path))] = leaf
    return found


def contents(found: Variables) -> dict[str, list[Any]]:
    """What each variable holds now."""
    return {path: jax.tree.leaves(variable) for path, variable in found.items()}


def lost_updates(
    fun: Any,
    before: Mapping[str, list[Any]],
    after: Variables,
    result: Any,
    shared: Mapping[str, str],
) -> str:
    """What is wrong with the nnx variables that a step changed ("" if nothing is).

    Args:
        before: what each variable held before the step.
        after: the variables of the same arguments after it.
        result: what the step returned.
        shared: path of a variable -> the other paths of the same one.
    """
    returned = {id(leaf) for leaf in jax.tree.leaves(result)}
    lost, torn = [], []
    for path, variable in after.items():
        now = jax.tree.leaves(variable)
        old = before.get(path)
        if old is None or _same(old, now):
            continue
        if not all(id(leaf) in returned for leaf in now):
            lost.append(f"{path} ({type(variable).__name__})")
        elif path in shared:
            torn.append(f"{path}, also {shared[path]}")
    name = function_name(fun)
    found = []
    if lost:
        title = f"{name} updates {_count(lost)} that it does not return:"
        found.append(problems(title, few(lost), _RETURN))
    if torn:
        title = f"{name} updates {_count(torn)} at one of several places only:"
        found.append(problems(title, few(torn), _SPLIT))
    return "\n".join(found)


_RETURN = (
    "These updates would be lost. Return what changes (`return model, optimizer, "
    "loss`: nnx modules and optimizers are pytrees), or nnx.split before the step, "
    "nnx.merge inside it and return nnx.state(...)."
)
_SPLIT = (
    "As an argument, a shared variable becomes one copy per place. Use nnx.split "
    "before the step, which keeps it one, and nnx.merge inside."
)


def _count(items: Sequence[str]) -> str:
    return "1 nnx variable" if len(items) == 1 else f"{len(items)} nnx variables"


def _same(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def shared_paths(found: Variables) -> dict[str, str]:
    """Variables that the arguments hold more than once: path -> the other paths."""
    places: dict[int, list[str]] = {}
    for path, variable in found.items():
        places.setdefault(id(variable), []).append(path)
    return {
        path: ", ".join(other for other in paths if other != path)
        for paths in places.values()
        if len(paths) > 1
        for path in paths
    }
