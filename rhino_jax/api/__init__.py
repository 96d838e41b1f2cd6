"""The public face: ``auto_parallel``, ``plan``, ``follow``, ``name``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import jax
from jax.ad_checkpoint import checkpoint_name

from rhino_jax.api.function import ParallelFunction
from rhino_jax.errors import OptionsError, TraceError
from rhino_jax.extend import as_rules
from rhino_jax.options import Options, make_options
from rhino_jax.plan import Plan

# Loaded when the first step is planned: importing rhino_jax must cost little.
if TYPE_CHECKING:
    from rhino_jax.api.planned import Planned as Planned

__all__ = ["ParallelFunction", "Planned", "auto_parallel", "follow", "name", "plan"]


def __getattr__(attribute: str) -> Any:
    if attribute == "Planned":
        from rhino_jax.api.planned import Planned

        return Planned
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


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

    loaded, given = _whole_plan(options)
    make_options(**given)  # so that what is wrong shows where it is written

    def decorate(fun: Callable[..., Any]) -> ParallelFunction:
        inner, chosen = _settled(fun, given)
        return ParallelFunction(inner, chosen, loaded)

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
    from rhino_jax.api.planning import bind, make_planned, traced_bare

    kwargs = options.pop("kwargs", {})
    loaded, given = _whole_plan(options)
    fun, chosen = _settled(fun, given)
    if not callable(fun):
        raise TraceError(f"plan needs a function, got {type(fun).__name__}: {fun!r}")
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
    if not isinstance(parent, ParallelFunction):
        raise TraceError(
            "follow needs a step decorated with rhino.auto_parallel, then the function "
            f"that follows it; got {type(parent).__name__}: {parent!r}"
        )
    fun, chosen = _settled(fun, {"donate": False, **options})
    return ParallelFunction(fun, chosen, parent=parent)


def name(x: jax.Array, label: str) -> jax.Array:
    """``x`` itself, under a name that pins can mean."""
    return checkpoint_name(x, label)


def _settled(
    fun: Callable[..., Any], given: dict[str, Any]
) -> tuple[Callable[..., Any], Options]:
    """The function and its options.

    Of a decorated function the one inside, with its options where none are given.
    """
    base: dict[str, Any] = {}
    if isinstance(fun, ParallelFunction):
        base = {k: getattr(fun.options, k) for k in Options.__dataclass_fields__}
        fun = fun.fun
    options = make_options(**{**base, **given})
    return fun, replace(options, rules=as_rules(options.rules))


def _whole_plan(options: dict[str, Any]) -> tuple[Plan | None, dict[str, Any]]:
    """The plan among the options, and the other options."""
    given = {**options}
    loaded = _loaded(given.pop("plan", None))
    beside = [key for key in ("recipe", "pins") if loaded and given.get(key)]
    if beside:
        raise OptionsError(
            f"plan= is a whole plan, {' and '.join(beside)} would change it; drop one: "
            "a plan's layouts are kept as pins by pins=plan.pins()"
        )
    if loaded and "lowering" in given:
        loaded = replace(loaded, lowering=given["lowering"])
    return loaded, given


def _loaded(given: Any) -> Plan | None:
    """A plan from a Plan, a Planned or the path of a saved one."""
    if isinstance(given, str | Path):
        return Plan.load(given)
    found = getattr(given, "plan", given)
    if found is None or isinstance(found, Plan):
        return found
    raise OptionsError(f"plan= takes a plan or the path of a saved one, not {given!r}")
