"""The public face: ``auto_parallel``, ``plan``, ``follow``, ``name``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

import jax
from jax.ad_checkpoint import checkpoint_name

from rhino_jax.api.function import ParallelFunction
from rhino_jax.api.planned import Planned, bind, make_planned, traced_bare
from rhino_jax.errors import TraceError
from rhino_jax.options import Options, make_options
from rhino_jax.plan import Plan

__all__ = ["ParallelFunction", "Planned", "auto_parallel", "follow", "name", "plan"]


@overload
def auto_parallel(fun: Callable[..., Any], /) -> ParallelFunction: ...
@overload
def auto_parallel(
    fun: None = None, /, **options: Any
) -> Callable[[Callable[..., Any]], ParallelFunction]: ...
def auto_parallel(fun: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Run a train step written for one device on every device there is.

    Use it bare (``@rhino.auto_parallel``) or with options
    (``@rhino.auto_parallel(recipe="zero3")``); they are the fields of
    :class:`~rhino_jax.options.Options`, and ``plan``: a :class:`Plan` or the path of
    a saved one.

    Raises:
        OptionsError: unknown or contradictory options.
        TraceError: ``fun`` is no function.

    >>> import jax.numpy as jnp
    >>> @auto_parallel
    ... def step(w, x):
    ...     return w - 0.1 * x.T @ (x @ w), jnp.mean((x @ w) ** 2)
    >>> w, loss = step(jnp.ones((4, 2)), jnp.ones((8, 4)))
    >>> float(loss)
    16.0
    """
    given = options.pop("plan", None)
    loaded = _loaded(given)
    chosen = make_options(**options)

    def decorate(fun: Callable[..., Any]) -> ParallelFunction:
        return ParallelFunction(fun, chosen, loaded)

    return decorate if fun is None else decorate(fun)


def plan(fun: Callable[..., Any], *args: Any, **options: Any) -> Planned:
    """Plan a step without running it. Arguments may be ``jax.ShapeDtypeStruct``.

    Args:
        fun: the step, plain, jitted or decorated.
        args: its arguments, arrays or shapes.
        options: fields of :class:`~rhino_jax.options.Options`; ``plan``, a saved plan
            to bind in place of planning; ``kwargs``, keyword arguments of the step.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    >>> w = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    >>> def step(w, x):
    ...     return w - x.T @ (x @ w)
    >>> planned = plan(step, w, x, cluster="h100:1x8", recipe="data_parallel")
    >>> [(c.kind, c.wire_bytes) for c in planned.plan.collectives]
    [('all-reduce', 28672)]
    """
    kwargs = options.pop("kwargs", {})
    loaded = _loaded(options.pop("plan", None))
    base: dict[str, Any] = {}
    if isinstance(fun, ParallelFunction):
        base = {k: getattr(fun.options, k) for k in Options.__dataclass_fields__}
        fun = fun.fun
    if not callable(fun):
        raise TraceError(f"plan needs a function, got {type(fun).__name__}: {fun!r}")
    chosen = make_options(**{**base, **options})
    if loaded is None:
        return make_planned(fun, args, kwargs, chosen)
    return bind(loaded, traced_bare(fun, args, kwargs, chosen), chosen)


def follow(
    parent: ParallelFunction, fun: Callable[..., Any], **options: Any
) -> ParallelFunction:
    """``fun`` (an evaluation step) run with the layouts of ``parent``.

    Arguments that ``parent`` has too (same path inside the argument, shape and dtype)
    lie as they do there; nothing is donated.
    """
    return ParallelFunction(
        fun, make_options(**{"donate": False, **options}), parent=parent
    )


def name(x: jax.Array, label: str) -> jax.Array:
    """``x`` itself, under a name that pins can mean."""
    return checkpoint_name(x, label)


def _loaded(given: Plan | Planned | str | Path | None) -> Plan | None:
    if isinstance(given, str | Path):
        return Plan.load(given)
    return given.plan if isinstance(given, Planned) else given
