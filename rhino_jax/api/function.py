"""The decorated step: planned at its first call, then called like a jitted one."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from rhino_jax.api.planned import (
    Planned,
    bind,
    make_planned,
    plan_traced,
    traced_bare,
)
from rhino_jax.errors import (
    DonationError,
    SignatureError,
    TraceError,
    problems,
)
from rhino_jax.lower.program import SignatureChanged
from rhino_jax.options import Options
from rhino_jax.plan import Plan


@dataclass(frozen=True)
class Entry:
    """What a call needs, for one signature of the step.

    ``brought`` are (leaf, shape, dtype) of the arguments that are no state: they tell
    signatures apart, since a state rarely changes shape. ``probes`` are a few donated
    leaves, looked at before every call.
    """

    planned: Planned
    tree: Any
    static: tuple[Any, ...]
    jitted: Callable[..., tuple[jax.Array, ...]]
    constants: tuple[Any, ...]
    brought: tuple[tuple[int, tuple[int, ...], Any], ...]
    probes: tuple[int, ...]

    def takes(self, tree: Any, leaves: Sequence[Any], static: tuple[Any, ...]) -> bool:
        if tree != self.tree or static != self.static:
            return False
        for i, shape, dtype in self.brought:
            leaf = leaves[i]
            if getattr(leaf, "shape", ()) != shape:
                return False
            if getattr(leaf, "dtype", dtype) != dtype:
                return False
        return True


class ParallelFunction:
    """A train step that runs on every device. Made by ``auto_parallel``.

    It is planned once for every signature (tree, shapes, dtypes, static arguments).
    The old state's buffers go to the new one, unless ``donate=False``.
    """

    __name__: str

    def __init__(
        self,
        fun: Callable[..., Any],
        options: Options,
        plan: Plan | None = None,
        parent: ParallelFunction | None = None,
    ) -> None:
        if not callable(fun):
            raise TraceError(
                f"auto_parallel needs a function, got {type(fun).__name__}: {fun!r}"
            )
        functools.update_wrapper(self, fun)
        self.__name__ = getattr(fun, "__name__", type(fun).__name__)
        self.fun = fun
        self.options = options
        self._given_plan = plan
        self._parent = parent
        self._entries: list[Entry] = []
        self._latest: Entry | None = None
        self._donated_at = ""
        self._noticed = False

    # ---- calling ------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        static: tuple[Any, ...] = ()
        if self.options.static_argnums:
            args, static = self._split_static(args)
        leaves, tree = jax.tree.flatten((args, kwargs))
        entry = self._latest
        if entry is None or not entry.takes(tree, leaves, static):
            entry = self._entry(args, kwargs, tree, leaves, static)
            leaves = self._moved(entry, leaves)
        for i in entry.probes:
            # JAX itself would notice too late: some devices would already wait.
            if isinstance(leaves[i], jax.Array) and leaves[i].is_deleted():
                self._check_alive(leaves, entry)
        try:
            out = entry.jitted(*leaves, *entry.constants)
        except (SignatureChanged, ValueError, RuntimeError, TypeError) as error:
            entry, out = self._again(entry, args, kwargs, tree, leaves, static, error)
        if entry.planned.traced.donated:
            frame = sys._getframe(1)
            self._donated_at = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return jax.tree.unflatten(entry.planned.traced.out_tree, out)

    def _entry(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tree: Any,
        leaves: Sequence[Any],
        static: tuple[Any, ...],
        all_leaves: bool = False,
    ) -> Entry:
        """The entry of this signature, planned if it is new."""
        for entry in self._entries:
            if entry.takes(tree, leaves, static) and not all_leaves:
                self._latest = entry
                return entry
        self._check_alive(leaves, None)
        planned = self._planned(self._joined(args, static), kwargs)
        traced = planned.traced
        state = traced.state_inputs
        brought = tuple(
            (i, tuple(np.shape(leaf)), getattr(leaf, "dtype", None))
            for i, leaf in enumerate(leaves)
            if all_leaves or i not in state
        )
        constants = traced.constants
        if constants and planned.plan.mesh.axes:
            where = planned._shardings(planned.plan.assignment.inputs)
            constants = tuple(
                jax.device_put(c, s)
                for c, s in zip(constants, where[traced.num_inputs :], strict=True)
            )
        entry = Entry(
            planned,
            tree,
            static,
            planned.jitted,
            constants,
            brought,
            _spread(traced.donated),
        )
        self._entries.insert(0, entry)
        self._latest = entry
        return entry

    def _again(
        self,
        entry: Entry,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tree: Any,
        leaves: list[Any],
        static: tuple[Any, ...],
        error: Exception,
    ) -> tuple[Entry, Any]:
        """A call that failed: say why, or mend the arguments and call once more."""
        self._check_alive(leaves, entry)
        if isinstance(error, SignatureChanged):
            # Shapes of the state changed: tell signatures apart by every leaf.
            entry = self._entry(args, kwargs, tree, leaves, static, all_leaves=True)
        moved = self._moved(entry, leaves)
        changed = any(a is not b for a, b in zip(moved, leaves, strict=True))
        if not changed and not isinstance(error, SignatureChanged):
            raise error
        return entry, entry.jitted(*moved, *entry.constants)

    def _check_alive(self, leaves: Sequence[Any], entry: Entry | None) -> None:
        dead = [
            i
            for i, x in enumerate(leaves)
            if isinstance(x, jax.Array)
            and not isinstance(x, jax.core.Tracer)
            and x.is_deleted()
        ]
        if not dead:
            return
        paths: Sequence[str] = [f"argument leaf {i}" for i in dead]
        if entry is not None:
            paths = [entry.planned.traced.input_paths[i] for i in dead]
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        raise DonationError(
            f"{', '.join(paths[:3])}{more}: this array was given away. Its buffer went "
            f"to the new state in the call at {self._donated_at or 'an earlier line'}. "
            "Use the state which that call returned, or decorate with donate=False."
        )

    def _moved(self, entry: Entry, leaves: list[Any]) -> list[Any]:
        """Committed arrays that lie elsewhere, moved to the plan's layout."""
        planned = entry.planned
        if not planned.plan.mesh.axes:
            return leaves
        wanted = planned._shardings(planned.plan.assignment.inputs)
        found = list(leaves)
        elsewhere = []
        for i, (x, where) in enumerate(zip(leaves, wanted, strict=False)):
            if not isinstance(x, jax.Array) or not getattr(x, "committed", False):
                continue
            if not x.sharding.is_equivalent_to(where, x.ndim):
                found[i] = jax.device_put(x, where)
                elsewhere.append(planned.traced.input_paths[i])
        if elsewhere and not self._noticed:
            self._noticed = True
            more = f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else ""
            warnings.warn(
                f"{', '.join(elsewhere[:3])}{more} lay elsewhere and was moved to the "
                f"plan's layout; {self.__name__}.place(...) does so once.",
                stacklevel=4,
            )
        return found

    # ---- static arguments ---------------------------------------------------------

    def _split_static(
        self, args: Sequence[Any]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        numbers = {n % len(args) for n in self.options.static_argnums} if args else ()
        return (
            tuple(a for i, a in enumerate(args) if i not in numbers),
            tuple(a for i, a in enumerate(args) if i in numbers),
        )

    def _joined(self, args: Sequence[Any], static: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse of splitting: the arguments as the user gave them."""
        if not static:
            return tuple(args)
        count = len(args) + len(static)
        numbers = {n % count for n in self.options.static_argnums}
        rest, fixed = iter(args), iter(static)
        return tuple(next(fixed) if i in numbers else next(rest) for i in range(count))

    # ---- planning -----------------------------------------------------------------

    def _planned(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Planned:
        options = self.options
        if self._parent is not None:
            traced = traced_bare(self.fun, args, kwargs, options)
            return _followed(traced, self._parent, options)
        if self._given_plan is not None:
            traced = traced_bare(self.fun, args, kwargs, options)
            return bind(self._given_plan, traced, options)
        return make_planned(self.fun, args, kwargs, options)

    def planned(self, *args: Any, **kwargs: Any) -> Planned:
        """The plan for these arguments (arrays or shapes); made if it is new."""
        dynamic, static = args, ()
        if self.options.static_argnums:
            dynamic, static = self._split_static(args)
        leaves, tree = jax.tree.flatten((dynamic, kwargs))
        return self._entry(dynamic, kwargs, tree, leaves, static).planned

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest signature; None before the first."""
        return self._latest.planned.plan if self._latest else None

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The lowered step for these arguments, on flat leaves."""
        return self.planned(*args, **kwargs).lower()

    def compile(self, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
        """The compiled step for these arguments, on flat leaves."""
        return self.lower(*args, **kwargs).compile()

    # ---- placing ------------------------------------------------------------------

    def init(self, init_fn: Callable[..., Any], *args: Any) -> Any:
        """The state, created already sharded: never whole on one device.

        ``train_step.init(init_fn, rng, batch)``: ``init_fn`` takes as many of ``args``
        as its signature does; what follows the first is the rest of the step's
        arguments, needed to plan.
        """
        taken = _taken(init_fn, args)
        rest = args[1:]
        shapes = jax.eval_shape(init_fn, *taken)
        planned = self.planned(shapes, *rest)
        if not planned.plan.mesh.axes:
            return jax.jit(init_fn)(*taken)
        where = planned.in_shardings[0][0]
        return jax.jit(init_fn, out_shardings=where)(*taken)

    def place(self, state: Any, *rest: Any) -> Any:
        """``state`` (host arrays, a checkpoint) moved to the plan's layout.

        ``rest`` are the step's other arguments, needed only before the first plan.

        Raises:
            SignatureError: there is no plan yet, or the state is not what was planned.
        """
        if rest:
            self.planned(state, *rest)
        return self._put(state, "place", "train_step.place(state, batch)")

    def shard_batch(self, batch: Any) -> Any:
        """This process's part of the global batch as global arrays.

        On one process the batch is the whole batch.

        Raises:
            SignatureError: there is no plan yet, or the batch is not what was planned.
        """
        return self._put(batch, "shard_batch", "train_step.init(init_fn, rng, batch)")

    def _put(self, tree: Any, method: str, hint: str) -> Any:
        if self._latest is None:
            raise SignatureError(f"{method}: nothing is planned yet; call {hint} first")
        planned = self._latest.planned
        if not planned.plan.mesh.axes:
            return jax.tree.map(jax.numpy.asarray, tree)
        args, kwargs = planned.in_shardings
        structure: Any = jax.tree.structure(tree)
        for given in (*args, *kwargs.values()):
            if jax.tree.structure(given) == structure:
                return jax.tree.map(_put_leaf, tree, given)
        raise SignatureError(
            problems(
                f"{method}: no argument of {self.__name__} has this tree; it takes:",
                [str(jax.tree.structure(given)) for given in args],
                f"given: {structure}",
            )
        )


def _put_leaf(x: Any, where: Any) -> jax.Array:
    if jax.process_count() == 1 or isinstance(x, jax.Array):
        return jax.device_put(x, where)
    return jax.make_array_from_process_local_data(where, np.asarray(x))


def _taken(init_fn: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
    """As many of ``args`` as the signature of ``init_fn`` takes."""
    try:
        signature = inspect.signature(init_fn)
    except (TypeError, ValueError):
        return args[:1]
    for count in range(len(args), -1, -1):
        try:
            signature.bind(*args[:count])
        except TypeError:
            continue
        return args[:count]
    raise SignatureError(
        f"init_fn takes {signature}; it was given up to {len(args)} arguments"
    )


def _followed(traced: Any, parent: ParallelFunction, options: Options) -> Planned:
    """A step planned so that what it shares with ``parent`` lies as it does there."""
    if parent.plan is None:
        raise SignatureError(
            f"follow: {parent.__name__} is not planned yet; call it (or its init) first"
        )
    known = {
        (_tail(leaf.path), leaf.shape, leaf.dtype): leaf.layout
        for leaf in parent.plan.inputs
    }
    pins = {}
    program = traced.program
    for path, v in zip(traced.input_paths, program.inputs, strict=False):
        value = program.values[v]
        layout = known.get((_tail(path), value.shape, value.dtype))
        if layout is not None:
            pins[path] = tuple(
                tuple(s.axis for s in dim) or None for dim in layout.dims
            )
    options = replace(
        options,
        pins={**pins, **options.pins},
        mesh=parent.options.mesh or parent.plan.mesh,
        recipe=options.recipe or "data_parallel",
    )
    return plan_traced(traced, options)


def _tail(path: str) -> str:
    return path.partition("/")[2] or path


def _spread(items: Sequence[int], count: int = 8) -> tuple[int, ...]:
    """At most ``count`` of ``items``, evenly spread, first and last among them."""
    if len(items) <= count:
        return tuple(items)
    step = (len(items) - 1) / (count - 1)
    return tuple(items[round(k * step)] for k in range(count))
