"""A step function traced: its Program, its trees, its names, what may be donated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.errors import TraceError, problems
from rhino_jax.ir.program import Op, Program
from rhino_jax.trace import nnx
from rhino_jax.trace.arguments import (
    abstract,
    check_call,
    few,
    function_name,
    join,
    keys,
    mixed_faults,
    not_arrays,
    positional_names,
    static_positions,
)
from rhino_jax.trace.blame import explain, is_call_error, is_result_error, leaked
from rhino_jax.trace.pairs import state_pairs
from rhino_jax.trace.reader import read_jaxpr
from rhino_jax.trace.watch import examine, watched


@dataclass(frozen=True)
class Traced:
    """One step traced for one signature.

    ``program.inputs`` are the flat leaves of ``(args, kwargs)``, then ``constants``.
    Paths name leaves: ``state/params/w`` of an argument, ``0/params/w`` of the result
    (``result`` where that is one array). ``state_pairs`` are (input leaf, output leaf)
    where a part of the result is an argument's successor, see
    :mod:`rhino_jax.trace.pairs`. ``donated`` are the inputs whose buffers a call may
    take: those pairs, or what the function's own ``jax.jit`` says. ``avals`` are the
    abstract leaves of the arguments as JAX saw them; ``static`` the arguments that have
    no leaves for being baked in, by position or keyword.
    """

    program: Program
    constants: tuple[Any, ...]
    in_tree: Any
    out_tree: Any
    input_paths: tuple[str, ...]
    output_paths: tuple[str, ...]
    state_pairs: tuple[tuple[int, int], ...]
    donated: tuple[int, ...]
    avals: tuple[Any, ...] = ()
    static: tuple[int | str, ...] = ()

    @property
    def num_inputs(self) -> int:
        """Leaves of the arguments: the Program's inputs without constants."""
        return len(self.input_paths)

    @property
    def state_inputs(self) -> frozenset[int]:
        return frozenset(i for i, _ in self.state_pairs)

    @property
    def batch_inputs(self) -> tuple[int, ...]:
        """Leaves of arguments that are no state: what a call brings anew."""
        return tuple(i for i in range(self.num_inputs) if i not in self.state_inputs)


def trace(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    static_argnums: Sequence[int] = (),
    donate: bool = True,
    rules: Mapping[str, Any] | None = None,
) -> Traced:
    """Trace ``fun`` on arrays or ``jax.ShapeDtypeStruct`` leaves.

    ``fun`` is a plain function or one jitted by ``jax.jit``, whose static and donated
    arguments stand. Donated are the arguments that it names; where it names none, the
    state that is found. ``donate=False`` donates nothing. ``rules`` are the user's for
    ops of their own (:class:`rhino_jax.extend.OpRule` by name).

    Raises:
        TraceError: the step can not be traced as it is written or called. What the
            step's own code raises passes through unchanged.
    """
    keywords = dict(kwargs or {})
    _check_function(fun)
    check_call(fun, args, keywords)
    way = _trace_jitted if isinstance(fun, _jitted_type()) else _trace_plain
    with compat.cudnn_traceable():
        traced = way(fun, args, keywords, static_argnums)
    found = _read(traced, function_name(fun), donate, rules or {})
    return replace(found, static=_baked_in(fun, args, keywords, found.input_paths))


def _jitted_type() -> type:
    return type(jax.jit(lambda: None))


_FOREIGN = {
    "flax": (
        "nnx.jit",
        " Nnx modules are pytrees: write a plain function that returns what it "
        "changes, `return model, optimizer, loss`.",
    ),
    "equinox": (
        "equinox.filter_jit",
        " Keep what is no array out of the arguments: `arrays, static = "
        "equinox.partition(model, equinox.is_array)` outside the step, "
        "`equinox.combine(arrays, static)` inside it.",
    ),
}


def _check_function(fun: Any) -> None:
    if not callable(fun):
        raise TraceError(f"A step must be a function; {fun!r} is {type(fun).__name__}.")
    if isinstance(fun, _jitted_type()) or not hasattr(fun, "lower"):
        return
    if not hasattr(fun, "__wrapped__"):
        return
    package = type(fun).__module__.split(".")[0]
    maker, next_step = _FOREIGN.get(package, ("another transformation", ""))
    name = function_name(fun.__wrapped__)
    raise TraceError(
        f"{name} is compiled by {maker} already. Give the function itself, without "
        f"that decorator: it is compiled here.{next_step}"
    )


def _trace_plain(
    fun: Any, args: Sequence[Any], kwargs: dict[str, Any], static: Sequence[int]
) -> Any:
    positions = static_positions(fun, len(args), static)
    new_args, new_kwargs = abstract(fun, args, kwargs, positions)
    shared = nnx.shared_paths(nnx.variables(fun, args, kwargs, states=False))
    jitted = jax.jit(watched(fun, shared), static_argnums=sorted(positions))
    try:
        return jitted.trace(*new_args, **new_kwargs)
    except TraceError as error:
        found = str(error)
    # Raised anew: the other one has passed through JAX.
    raise TraceError(found)


def _trace_jitted(
    fun: Any, args: Sequence[Any], kwargs: dict[str, Any], static: Sequence[int]
) -> Any:
    name = function_name(fun)
    if static:
        raise TraceError(
            f"static_argnums {list(static)}: {name} is jitted already. Give "
            "static_argnums to its jax.jit."
        )
    wrong = mixed_faults(fun, args, kwargs)
    if wrong:
        raise not_arrays(fun, wrong)
    if nnx.variables(fun, args, kwargs):
        examine(fun, args, kwargs)
    try:
        return fun.trace(*args, **kwargs)
    except Exception as error:
        found = explain(error)
        of_result = is_result_error(error)
        if found is None and not of_result and not is_call_error(error):
            raise
        found = found or str(error).strip()
    # From here on, out of the handler, so that JAX's own error is not shown.
    if of_result:
        examine(fun, args, kwargs)
    raise TraceError(f"{name}: {found}")


def _read(traced: Any, name: str, donate: bool, rules: Mapping[str, Any]) -> Traced:
    leaves = jax.tree.leaves_with_path(traced.in_avals)
    _check_leaks(traced.jaxpr, len(leaves), name)
    labels = traced.jaxpr.jaxpr.debug_info.arg_names
    names = tuple(
        _input_path(label, path)
        for label, (path, _) in zip(labels, leaves, strict=True)
    )
    outs = jax.tree.leaves_with_path(traced.out_info)
    program, constants = read_jaxpr(traced.jaxpr, name, names, rules=rules)
    _check_supported(program)
    pairs = state_pairs(
        program, [keys(path) for path, _ in leaves], [keys(path) for path, _ in outs]
    )
    donated = tuple(traced.donate_argnums) or tuple(i for i, _ in pairs)
    return Traced(
        program,
        constants,
        traced.in_tree,
        jax.tree.structure(traced.out_info),
        names,
        tuple(join(*keys(path)) or "result" for path, _ in outs),
        pairs,
        donated if donate else (),
        tuple(leaf for _, leaf in leaves),
    )


def _baked_in(
    fun: Any, args: Sequence[Any], kwargs: Mapping[str, Any], paths: Sequence[str]
) -> tuple[int | str, ...]:
    """Arguments that the jit of ``fun`` keeps static: no leaf bears their name."""
    names = enumerate(positional_names(fun, len(args)))
    every: list[tuple[int | str, str]] = [*names, *((k, k) for k in kwargs)]
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    seen = {path for path in paths}
    for path in paths:
        while "/" in path:
            path = path.rpartition("/")[0]
            seen.add(path)
    return tuple(
        key for key, name in every if name not in seen and jax.tree.leaves(given[key])
    )


def _check_leaks(closed: Any, count: int, name: str) -> None:
    """Arrays of other traces come in as inputs before, or constants beside, our own."""
    jaxpr = closed.jaxpr
    strange = set(jaxpr.invars[: len(jaxpr.invars) - count])
    pairs = zip(jaxpr.constvars, closed.consts, strict=True)
    strange |= {var for var, c in pairs if isinstance(c, jax.core.Tracer)}
    if strange:
        reads = [
            compat.source_line(eqn)
            for eqn in jaxpr.eqns
            if any(v in strange for v in eqn.invars if isinstance(v, compat.Var))
        ]
        raise TraceError(f"{name}: {leaked(reads)}")


_MUTABLE = frozenset(("ReadEffect", "WriteEffect", "AccumEffect"))


def _check_supported(program: Program) -> None:
    """Raise :class:`TraceError` for ops that no plan can carry out."""
    wrong = [
        f"{op.where}: {what}"
        for _, op in program.walk()
        if not op.programs and (what := _unsupported(op))
    ]
    if wrong:
        title = f"{program.name} does what can not be spread over devices:"
        raise TraceError(
            problems(
                title,
                few(wrong),
                "Drop ordered=True, or move the side effect out of the step; write "
                "`x = x.at[i].set(y)` in place of a mutable reference.",
            )
        )


def _unsupported(op: Op) -> str:
    if any(effect.startswith("Ordered") for effect in op.effects):
        return f"{op.kind} must keep the order of its side effects (ordered=True)"
    if op.kind == "new_ref" or not _MUTABLE.isdisjoint(op.effects):
        return f"{op.kind} works on a mutable reference (jax.new_ref)"
    return ""


_LABEL = re.compile(r"^(\w+)(?:\[(\d+)\])?")


def _input_path(label: str | None, path: tuple[Any, ...]) -> str:
    """``state/params/w``: the argument's name, then the path inside it.

    JAX labels a leaf ``state.params['w']``, and ``rest[1]['w']`` in the second of
    variadic arguments; the path is ``(0, number, ...)`` or ``(1, keyword, ...)``.
    """
    rest = keys(path[2:])
    found = _LABEL.match(label or "")
    if keys(path[:1]) == ("1",) or not found:
        return join(*keys(path[1:]))
    name, number = found.groups()
    inside = label == name + jax.tree_util.keystr(path[2:])
    return join(name, "" if inside or number is None else number, *rest)
