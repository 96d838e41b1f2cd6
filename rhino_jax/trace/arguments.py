"""The arguments of a step before it is traced: their names, their shapes, their faults.

Arrays become ``jax.ShapeDtypeStruct``s, so that tracing depends on shapes and dtypes
(weak types included) and never on where an array lies.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.api_util import shaped_abstractify

from rhino_jax.errors import TraceError, problems

Path = tuple[Any, ...]

SHOWN = 12


def keys(path: Path) -> tuple[str, ...]:
    """A tree path as plain strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def join(*parts: str) -> str:
    """Parts of a tree path, empty ones left out.

    >>> join("state", "", "params/w")
    'state/params/w'
    """
    return "/".join(part for part in parts if part)


def few(items: Iterable[str]) -> list[str]:
    """The first items, and how many more there are."""
    listed = list(items)
    more = len(listed) - SHOWN
    return [*listed[:SHOWN], f"and {more} more"] if more > 0 else listed


def function_name(fun: Any) -> str:
    """What a user calls the function: its name, that of what it wraps, or its type."""
    inner = fun.func if isinstance(fun, functools.partial) else fun
    return str(getattr(inner, "__name__", type(inner).__name__))


def signature(fun: Any) -> inspect.Signature | None:
    """The signature of ``fun`` where it has one."""
    try:
        return inspect.signature(fun)
    except (TypeError, ValueError):
        return None


_BY_PLACE = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def positional_names(fun: Any, count: int) -> list[str]:
    """Names of the first ``count`` positional arguments.

    >>> positional_names(lambda state, *rest: 0, 3)
    ['state', 'rest/0', 'rest/1']
    """
    found = signature(fun)
    parameters = list(found.parameters.values()) if found else []
    names = [p.name for p in parameters if p.kind in _BY_PLACE]
    rest = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    label = rest[0] if rest else "args"
    extra = [f"{label}/{k}" for k in range(max(0, count - len(names)))]
    return [*names, *extra][:count]


def check_call(fun: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`TraceError` where the arguments do not fit the signature."""
    found = signature(fun)
    if found is None:
        return
    try:
        found.bind(*args, **kwargs)
    except TypeError as error:
        name = function_name(fun)
        raise TraceError(
            f"{name}{found} was called with {len(args)} positional arguments and "
            f"keywords {sorted(kwargs)}: {error}."
        ) from None


def static_positions(
    fun: Any, count: int, static_argnums: Sequence[int]
) -> frozenset[int]:
    """``static_argnums`` counted from the start.

    Raises :class:`TraceError` for a number that no positional argument has.
    """
    found = signature(fun)
    kinds = [p.kind for p in found.parameters.values()] if found else []
    limit = sum(kind in _BY_PLACE for kind in kinds)
    if not found or inspect.Parameter.VAR_POSITIONAL in kinds:
        limit = max(limit, count)
    wrong = [n for n in static_argnums if not -limit <= n < limit]
    if wrong:
        raise TraceError(
            f"static_argnums {wrong}: {function_name(fun)} takes {limit} positional "
            "arguments, counted from 0."
        )
    return frozenset(n % limit for n in static_argnums)


def abstract(
    fun: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    static: frozenset[int] = frozenset(),
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with every array as its shape; static ones as they are.

    Raises :class:`TraceError` that lists every leaf that is no array and every static
    argument that does not hash.
    """
    names = positional_names(fun, max([len(args), *(n + 1 for n in static)]))
    held = {names[n] for n in static}
    wrong: list[str] = []

    def shapes(name: str, tree: Any) -> Any:
        if name in held:
            wrong.extend(_unhashable(name, tree))
            return tree
        found = faults(name, tree)
        wrong.extend(found)
        return tree if found else jax.tree.map(_shape, tree)

    new_args = [shapes(name, a) for name, a in zip(names, args, strict=False)]
    new_kwargs = {name: shapes(name, a) for name, a in kwargs.items()}
    if wrong:
        raise not_arrays(fun, wrong)
    return new_args, new_kwargs


def not_arrays(fun: Any, wrong: Sequence[str]) -> TraceError:
    """The error for arguments that can not be traced."""
    title = f"{function_name(fun)}: {_count(len(wrong), 'argument')} not usable:"
    return TraceError(
        problems(
            title,
            few(wrong),
            "Pass arrays; give a setting that is no array by static_argnums, or keep "
            "it out of the tree (functools.partial, a static field, "
            "equinox.partition).",
        )
    )


def _count(number: int, what: str) -> str:
    return f"1 {what} is" if number == 1 else f"{number} {what}s are"


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = shaped_abstractify(leaf)
    weak = bool(getattr(aval, "weak_type", False))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def leaves_of(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[Path, Any]]:
    """The leaves of ``tree`` with their paths; none where it does not flatten."""
    try:
        return list(jax.tree.leaves_with_path(tree, is_leaf=is_leaf))
    except (TypeError, ValueError):
        return []


def faults(name: str, tree: Any) -> list[str]:
    """What keeps the leaves of ``tree`` from being traced, each with its path."""
    try:
        leaves = jax.tree.leaves_with_path(tree)
    except (TypeError, ValueError) as error:
        return [f"{name or _WHOLE}: {_cause(error)}"]
    found = []
    for path, leaf in leaves:
        what = leaf_fault(leaf)
        if what:
            found.append(f"{join(name, *keys(path)) or _WHOLE}: {what}")
    return found


_WHOLE = "the result"


def _cause(error: BaseException) -> str:
    """A dict whose keys do not sort tells why only in its cause."""
    inner = error.__cause__ or error.__context__
    return f"{error} {inner or ''}".strip()


def leaf_fault(leaf: Any) -> str:
    """Why ``leaf`` is no array ("" for one that is)."""
    if isinstance(leaf, jax.core.Tracer):
        return ""
    try:
        aval: Any = shaped_abstractify(leaf)
    except (TypeError, ValueError):
        return _describe(leaf)
    if isinstance(aval, jax.ref.AbstractRef):
        return "a mutable jax.Ref; pass the array and return the new one"
    dated = getattr(aval.dtype, "kind", "") in ("m", "M")
    return _describe(leaf) if dated else ""


def _describe(leaf: Any) -> str:
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{type(leaf).__name__} of dtype {leaf.dtype}, which JAX does not have"
    text = repr(leaf)
    short = text if len(text) <= 40 else f"{text[:37]}..."
    kind = "a function" if callable(leaf) else type(leaf).__name__
    return f"{kind} {short} is no array"


def _unhashable(name: str, value: Any) -> list[str]:
    try:
        hash(value)
    except TypeError as error:
        kind = type(value).__name__
        return [f"{name}: static, but a {kind} does not hash ({error})"]
    return []


def mixed_faults(fun: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Leaves that are no array beside leaves that are, in one argument.

    In the arguments of a function that is jitted already, any whole argument may be
    static; a tree with arrays in it can not be.
    """
    names = positional_names(fun, len(args))
    found: list[str] = []
    for name, tree in [*zip(names, args, strict=True), *kwargs.items()]:
        wrong = faults(name, tree)
        if len(wrong) < len(leaves_of(tree)):
            found += wrong
    return found


def output_faults(result: Any) -> list[str]:
    """What keeps a step's result from being arrays, each with its path."""
    return faults("", result)
