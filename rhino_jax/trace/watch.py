"""A step under watch while it is traced: everything wrong with it, in its own terms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from rhino_jax.errors import TraceError, problems
from rhino_jax.trace import nnx
from rhino_jax.trace.arguments import (
    few,
    function_name,
    leaf_fault,
    leaves_of,
    output_faults,
)
from rhino_jax.trace.blame import explain

Step = Callable[..., Any]


def watched(fun: Step, shared: Mapping[str, str]) -> Step:
    """``fun``, which when traced raises :class:`TraceError` for what is wrong with it.

    What the user's own code raises passes through. ``shared`` names nnx variables that
    the arguments hold more than once.
    """

    @functools.wraps(fun)
    def step(*args: Any, **kwargs: Any) -> Any:
        before = nnx.contents(nnx.variables(fun, args, kwargs))
        try:
            result = fun(*args, **kwargs)
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            raise TraceError(f"{function_name(fun)}: {message}") from None
        wrong = output_faults(result)
        if wrong:
            raise _no_arrays(fun, wrong)
        after = nnx.variables(fun, args, kwargs)
        lost = nnx.lost_updates(fun, before, after, result, shared)
        if lost:
            raise TraceError(lost)
        return result

    step.__name__ = function_name(fun)
    return step


def _no_arrays(fun: Step, wrong: Sequence[str]) -> TraceError:
    plural = "a result" if len(wrong) == 1 else f"{len(wrong)} results"
    return TraceError(
        problems(
            f"{function_name(fun)} returns {plural} that JAX does not have:",
            few(wrong),
            "Return arrays, numbers and None, in trees of them; register a class of "
            "your own with jax.tree_util.register_dataclass.",
        )
    )


def examine(fun: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Trace what a jitted function wraps, only to learn what is wrong with it.

    Which of its arguments are static is not known here: those without any array are
    taken to be. Raises :class:`TraceError`; says nothing where all is well or where
    the function's own code raises.
    """
    inner = fun.__wrapped__  # type: ignore[attr-defined]
    shared = nnx.shared_paths(nnx.variables(inner, args, kwargs))
    every: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    traced = {key: tree for key, tree in every.items() if _has_arrays(tree)}

    def call(held: Mapping[Any, Any]) -> Any:
        given = {**every, **held}
        positional = [given[k] for k in range(len(args))]
        return watched(inner, shared)(*positional, **{k: given[k] for k in kwargs})

    try:
        jax.eval_shape(call, traced)
    except TraceError:
        raise
    except Exception:
        return


def _has_arrays(tree: Any) -> bool:
    leaves = [leaf for _, leaf in leaves_of(tree)]
    arrays = [leaf for leaf in leaves if not isinstance(leaf, bool | int | float)]
    return bool(arrays) and not any(leaf_fault(leaf) for leaf in leaves)
