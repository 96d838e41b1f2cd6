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
from rhino_jax.options import Options, make_options
from rhino_jax.plan import Plan

# Loaded when the first step is planned: importing rhino_jax must cost little.
if TYPE_CHECKING:
    from rhino_jax.api.planned import Planned as Planned

__all__ = [
    "ParallelFunction",
    "Planned",
    "auto_parallel",
    "follow",
    "global_shapes",
    "initialize",
    "name",
    "plan",
    "saved_steps",
]


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


def initialize(**given: Any) -> None:
    """Join the other processes of this run, if there are any, before JAX is used.

    Under ``rhino launch``, Slurm, Open MPI, Kubernetes and on TPU pods the others are
    found; elsewhere ``given`` names them, as for ``jax.distributed.initialize``
    (``coordinator_address``, ``num_processes``, ``process_id``). Where there are none
    nothing happens, nor a second time. A process that is silent for 10 seconds ends the
    run (``heartbeat_timeout_seconds``; JAX alone waits 100).

    Raises:
        ProcessError: the launcher's environment, or ``given``, is half set; the
            coordinator's port is in use.

    >>> initialize()
    """
    from rhino_jax.runtime import joining

    joining.initialize(**given)


def global_shapes(batch: Any) -> Any:
    """The shapes of the global batch that every process brings equal rows of.

    Plan with them: ``train_step.init(init_fn, rng, rhino.global_shapes(batch))``, then
    ``train_step.shard_batch(batch)`` takes the rows of each process. Every process must
    call it. On one process they are the batch's own shapes.

    Args:
        batch: this process's rows; every array's first dimension are rows.

    Raises:
        ProcessError: processes bring other trees, shapes or dtypes (which, by process).

    >>> import numpy as np
    >>> global_shapes({"x": np.zeros((4, 2), np.float32)})
    {'x': ShapeDtypeStruct(shape=(4, 2), dtype=float32)}
    """
    from rhino_jax.api import across

    return across.global_shapes(batch)


def saved_steps(folder: str | Path) -> tuple[int, ...]:
    """The steps whose states ``train_step.save`` wrote to ``folder``, rising.

    >>> saved_steps("/nowhere")
    ()
    """
    from rhino_jax.api import checkpoint

    return checkpoint.saved_steps(folder)


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
    if options.rules:
        from rhino_jax.extend import as_rules

        options = replace(options, rules=as_rules(options.rules))
    return fun, options


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
