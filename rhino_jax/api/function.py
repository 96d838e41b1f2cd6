"""The decorated step: planned at its first call, then called like a jitted one."""

from __future__ import annotations

import functools
import sys
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from rhino_jax.api.entry import Entry, Returned, aval_of, split
from rhino_jax.api.passing import Call, Key, walked
from rhino_jax.errors import DonationError, SignatureError, TraceError
from rhino_jax.options import Options
from rhino_jax.runtime.status import began, this_status

# What plans is imported where it is used: importing rhino_jax must cost little.
if TYPE_CHECKING:
    from rhino_jax.api.planned import Planned
    from rhino_jax.plan import Plan

REMEMBERED_CALLS = 256
MOST_TIGHTENED = 4
"""How often a plan that runs out of memory is made again for less."""


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
        self._ready: list[Entry] = []
        self._returned: Returned = None
        self._gifts: deque[tuple[tuple[Any, ...], types.CodeType, int]] = deque(
            maxlen=REMEMBERED_CALLS
        )
        self._noticed = False
        self._status = this_status()
        self._calls = 0

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    # ---- calling ------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = None
        if self._status is not None:
            self._calls += 1
            self._status.began(self.__name__, self._calls)
        for entry in self._ready:
            call = entry.read(args, kwargs, self._returned)
            if call is not None:
                break
        if call is None:
            entry, call = self._prepared(args, kwargs)
        failed = None
        try:
            result, self._returned = entry.call(call)
        except Exception as error:
            failed = error
        if failed is not None:
            result, call, entry = self._again(entry, args, kwargs, call, failed)
        if entry.donates:
            frame = sys._getframe(1)
            given = call[0]
            refs = tuple([_reference(walked(given, way)) for way in entry.given])
            self._gifts.append((refs, frame.f_code, frame.f_lineno))
        if entry is not self._ready[0]:
            self._ready.remove(entry)
            self._ready.insert(0, entry)
        return result

    def _prepared(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry, Call]:
        """A call that is not as the last one: its entry, and its leaves in place."""
        from rhino_jax.api import placing

        entry, leaves = self._made_ready(args, kwargs)
        leaves = self._moved(entry, leaves)
        entry.learn(leaves)
        return entry, entry.arranged(placing.given_once(entry, leaves))

    def _made_ready(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry, list[Any]]:
        """The entry of a call, ready for it, and the call's leaves.

        Raises:
            DonationError: an argument was given away before.
        """
        from rhino_jax.api import placing

        placing.check_alive(self.fun, args, kwargs, self._given_away)
        entry, leaves = self._find(args, kwargs) or self._add(args, kwargs)
        if entry.run is None:
            _make_ready(entry)
            self._ready.append(entry)
        return entry, leaves

    def _again(
        self,
        entry: Entry,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        failed: Call,
        error: Exception,
    ) -> tuple[Any, Call, Entry]:
        """A call that failed: once more, looked at leaf by leaf, or the error itself.

        Raises:
            DonationError: an argument was given away before.
        """
        try:
            return self._retried(entry, args, kwargs, failed, error)
        except DonationError:
            if "deleted" in str(error):
                raise
        raise error  # it came when the buffers were on their way already

    def _retried(
        self,
        entry: Entry,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        failed: Call,
        error: Exception,
    ) -> tuple[Any, Call, Entry]:
        from rhino_jax.lower.program import SignatureChanged

        for _ in range(MOST_TIGHTENED):
            if not out_of_memory(error) or entry.planned.plan.predicted is None:
                break
            if entry.across:  # the others may have had enough: there is no one plan
                break
            entry, call = self._tightened(entry, args, kwargs)
            try:
                result, self._returned = entry.call(call)
                return result, call, entry
            except Exception as again:
                error = again
        before = entry
        entry, call = self._prepared(args, kwargs)
        if not isinstance(error, SignatureChanged) and entry is before:
            if _same(failed, call):
                raise error
        result, self._returned = entry.call(call)
        return result, call, entry

    def _tightened(
        self, entry: Entry, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry, Call]:
        """The step planned again for less memory, because its plan did not fit.

        Raises:
            InfeasibleError: no plan fits the tighter limit.
        """
        predicted = entry.planned.plan.predicted
        assert predicted is not None
        # What stands beside the plan is not known: take away what was thought to be
        # free first, then a fifth at a time.
        limit = min(predicted.limit_bytes, predicted.peak_bytes) * 4 // 5
        warnings.warn(
            f"{self.__name__}: out of memory with a plan predicted to need "
            f"{predicted.peak_bytes / 2**30:.2f} of {predicted.limit_bytes / 2**30:.2f}"
            f" GiB a device; planned again for {limit / 2**30:.2f} GiB (set "
            "memory_limit_bytes to say so at once)",
            stacklevel=_users_level(),
        )
        self.options = replace(self.options, memory_limit_bytes=limit)
        self._entries.remove(entry)
        self._ready.remove(entry)
        return self._prepared(args, kwargs)

    def _moved(self, entry: Entry, leaves: list[Any]) -> list[Any]:
        """Committed arrays that lie elsewhere, moved; the first time with a notice."""
        from rhino_jax.api import placing

        found, moved = placing.placed(entry, leaves)
        if moved and not self._noticed:
            self._noticed = True
            warnings.warn(
                placing.notice(self.__name__, moved), stacklevel=_users_level()
            )
        return found

    def _given_away(self, x: Any) -> str:
        """Where the buffer of ``x`` was given to a new state, in words."""
        for refs, code, line in reversed(self._gifts):
            if any(ref is not None and ref() is x for ref in refs):
                return f"given away in the call at {code.co_filename}:{line}"
        if self._gifts:
            _, code, line = self._gifts[-1]
            return (
                f"given away in the call at {code.co_filename}:{line}, or an earlier "
                "one"
            )
        return ""

    def trace(self, path: str | Path, /, *args: Any, **kwargs: Any) -> Any:
        """One step of a pipeline, like a call, recorded to ``path`` for Perfetto.

        ``state, metrics = train_step.trace("trace.json", state, batch)``: when every
        worker really ran which half of which stage for which microbatch, and what it
        sent, to be seen beside the predicted ``planned.timeline(path)``; also what is
        done before and behind the loop, but for handing over the batch and, on several
        processes, the metrics. Halves that are empty are left out.

        Call the step once before: compiling counts as work. The arguments are waited
        for before the step, its results after. Times are good to the few milliseconds
        for which threads of Python wait for their turn. On several processes all must
        call it: each writes what its devices do, in its own time, to trace.0.json ...

        Raises:
            OptionsError: the step is no pipeline, or ``path`` can not be written.
        """
        entry, leaves = self._made_ready(args, kwargs)
        jax.block_until_ready(leaves)
        with entry.planned.recording(path):
            result = self(*args, **kwargs)
        if entry.donates:  # not from here, but from where this was called
            frame = sys._getframe(1)
            self._gifts.append((self._gifts.pop()[0], frame.f_code, frame.f_lineno))
        return result

    # ---- signatures ---------------------------------------------------------------

    def _find(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry, list[Any]] | None:
        """The entry of this signature, and the leaves of the call."""
        for keys in dict.fromkeys(entry.keys for entry in self._entries):
            try:
                leaves, tree, static, avals = _signature(args, kwargs, keys)
                for entry in self._entries:
                    if entry.keys == keys and entry.matches(tree, static, avals):
                        return entry, leaves
            except (TypeError, ValueError):
                # No arrays: static under other keys, or an error for trace/ to tell.
                continue
        return None

    def _add(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry, list[Any]]:
        """A new entry: the step planned for these arguments (arrays or shapes)."""
        planned = self._plan_for(args, kwargs)
        keys = planned.traced.static
        leaves, tree, static, avals = _signature(args, kwargs, keys)
        entry = Entry(planned, tree, static, keys, avals)
        self._entries.insert(0, entry)
        return entry, leaves

    def _plan_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Planned:
        from rhino_jax.api.agreeing import plan_for_all
        from rhino_jax.api.following import following
        from rhino_jax.api.planning import traced_bare

        parent, options = self._parent, self.options
        if parent is not None and parent.plan is None:
            raise SignatureError(
                f"follow: {parent.__name__} is not planned yet; call it (or its init) "
                "first"
            )
        began(f"planning {self.__name__}")
        traced = traced_bare(self.fun, args, kwargs, options)
        if parent is not None and parent.plan is not None:
            options = following(traced, parent.plan, parent.options, options)
        return plan_for_all(self.__name__, traced, options, self._given_plan)

    def planned(self, *args: Any, **kwargs: Any) -> Planned:
        """The plan for these arguments (arrays or shapes); made if it is new.

        On several processes all must ask for a new one: the first plans for all.

        Raises:
            ProcessError: a process has another program, package or option, or does not
                ask (within 300 seconds).
        """
        entry, _ = self._find(args, kwargs) or self._add(args, kwargs)
        self._entries.remove(entry)
        self._entries.insert(0, entry)
        return entry.planned

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest signature; None before the first."""
        return self._entries[0].planned.plan if self._entries else None

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The lowered step for these arguments, on flat leaves.

        A list, of every stage's programs, where it is a pipeline.
        """
        return self.planned(*args, **kwargs).lower()

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        """The compiled step for these arguments, on flat leaves.

        Raises:
            MeshError: it is planned for other devices than there are.
        """
        return self.planned(*args, **kwargs).attached().compile()

    # ---- placing ------------------------------------------------------------------

    def init(self, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The state, created already sharded: never whole on one device.

        ``train_step.init(init_fn, rng, batch)``: ``init_fn`` takes as many of ``args``
        as its signature does; what follows the first is the rest of the step's
        arguments, needed to plan, as are keyword arguments.
        """
        from rhino_jax.api.placing import taken

        given = taken(init_fn, args)
        shapes = jax.eval_shape(init_fn, *given)
        planned = self.planned(shapes, *args[1:], **kwargs).attached()
        return planned.create(init_fn, given)

    def place(self, state: Any, *rest: Any, **kwargs: Any) -> Any:
        """``state`` (host arrays, a checkpoint) moved to the plan's layout.

        ``rest`` and ``kwargs`` are the step's other arguments, needed only before the
        first plan. What is given stays alive when the state is donated, unless it lies
        there already.

        Raises:
            SignatureError: there is no plan yet, or the state is not what was planned.
        """
        if rest or kwargs:
            self.planned(state, *rest, **kwargs)
        return self._put("place", state, "place(state, batch)", False)

    def shard_batch(self, batch: Any) -> Any:
        """This process's rows of the global batch as global arrays.

        Every process brings as many rows, the first process the first, however the
        plan lays them (:func:`rhino_jax.global_shapes` to plan). What has the planned
        shape already is taken for whole. On one process the batch is the whole batch.

        Raises:
            SignatureError: there is no plan yet, or the batch is not what was planned.
        """
        return self._put("shard_batch", batch, "init(init_fn, rng, batch)", True)

    def fetch(self, tree: Any) -> Any:
        """``tree`` (a state, metrics) as NumPy arrays, whole in every process.

        On several processes all must call it.
        """
        from rhino_jax.api.across import fetched

        staged = [e.planned for e in self._entries if e.planned.plan.stages]
        return fetched(tree, staged[0].attached().devices if staged else frozenset())

    def save(
        self, folder: str | Path, state: Any, step: int, keep: int | None = None
    ) -> None:
        """Write ``state`` to ``folder`` as the checkpoint of ``step``.

        It appears there when all of it is written: whatever happens meanwhile (a full
        disk, a killed process) leaves the older ones as they are. On several processes
        all must call it, on a folder that all see; each writes its own part.

        Args:
            keep: how many checkpoints to keep, the newest; None keeps all.

        Raises:
            CheckpointError: it can not be written, or ``step`` is saved already.
        """
        from rhino_jax.api.checkpoint import save

        began(f"saving step {step} of {self.__name__}")
        if self._entries:
            state = self._entries[0].planned.attached().spread(state)
        save(folder, state, step, keep)

    def restore(
        self, folder: str | Path, *args: Any, step: int | None = None, **kwargs: Any
    ) -> Any:
        """The state of the checkpoint of ``step`` (None: the last), placed as planned.

        Another plan or number of devices may have saved it. ``args`` and ``kwargs`` are
        the step's arguments, arrays or shapes (the state's by ``jax.eval_shape``),
        needed only before the first plan.

        Raises:
            SignatureError: there is no plan yet.
            CheckpointError: there is no such checkpoint, or it is of another model
                (which leaves differ).
        """
        from rhino_jax.api.checkpoint import restore

        if not (args or kwargs or self._entries):
            raise SignatureError(
                "restore: nothing is planned yet; call "
                f"{self.__name__}.restore(folder, state_shapes, batch)"
            )
        known = self.planned(*args, **kwargs) if args or kwargs else None
        planned = (known or self._entries[0].planned).attached()
        began(f"restoring {self.__name__}")
        homes, tree = jax.tree.flatten(planned.saved_shardings)
        kinds = planned.traced.avals[: len(homes)]
        return planned.brought_back(restore(folder, step, tree, kinds, homes))

    def _put(self, method: str, tree: Any, hint: str, last: bool) -> Any:
        from rhino_jax.api import placing

        hint = f"{self.__name__}.{hint}"
        return placing.put(method, self._entries, tree, hint, self.__name__, last)


def _signature(
    args: Sequence[Any], kwargs: Mapping[str, Any], keys: Sequence[Key]
) -> tuple[list[Any], Any, Any, tuple[Any, ...]]:
    rest, keywords, static = split(args, kwargs, keys)
    leaves, tree = jax.tree.flatten((rest, keywords))
    return leaves, tree, static, tuple(map(aval_of, leaves))


def _same(call: Call, other: Call) -> bool:
    """Whether two calls of one entry hand on the very same arrays."""
    pairs = zip(jax.tree.leaves(call), jax.tree.leaves(other), strict=True)
    return all(a is b for a, b in pairs)


def out_of_memory(error: Exception) -> bool:
    """Whether a device had not the memory that a call needs.

    >>> out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying"))
    True
    """
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _make_ready(entry: Entry) -> None:
    """Bind an entry to the devices that are here: from now on it can be called."""
    from rhino_jax.api.across import laid

    planned = entry.planned = entry.planned.attached()
    entry.aim(planned.input_shardings)
    constants = planned.traced.constants
    if constants and planned.plan.whole_mesh.axes:
        count = planned.traced.num_inputs
        pairs = zip(constants, planned.input_shardings[count:], strict=True)
        constants = tuple(laid(c, where) for c, where in pairs)
    entry.constants = constants
    entry.run = planned.jit_call(entry.passing)


def _reference(x: Any) -> Any:
    return weakref.ref(x) if isinstance(x, jax.Array) else None


def _users_level() -> int:
    """The ``stacklevel`` of the innermost frame that is not Rhino's own."""
    home = f"{Path(__file__).parent}/"
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(home):
        level, frame = level + 1, frame.f_back
    return level
