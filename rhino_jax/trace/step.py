"""A step function traced: its Program, its trees, its names, what may be donated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rhino_jax.ir.program import Program
from rhino_jax.trace.reader import read_jaxpr


@dataclass(frozen=True)
class Traced:
    """One step traced for one signature.

    ``program.inputs`` are the flat leaves of ``(args, kwargs)``, then ``constants``.
    ``state_pairs`` are (input leaf, output leaf) where an output tree is an argument's
    successor: same structure, shapes and dtypes. Those inputs may be donated.
    ``avals`` are the abstract leaves of the arguments as JAX saw them.
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
) -> Traced:
    """Trace ``fun`` on arrays or ``jax.ShapeDtypeStruct`` leaves.

    Raises :class:`TraceError` when the step gives something that is no array.
    """
    jitted = (
        fun
        if hasattr(fun, "trace")
        else jax.jit(fun, static_argnums=tuple(static_argnums))
    )
    traced = jitted.trace(*args, **(kwargs or {}))
    debug = traced.jaxpr.jaxpr.debug_info
    leaves = jax.tree.leaves_with_path(traced.in_avals)
    names = tuple(
        _input_path(root, path)
        for root, (path, _) in zip(debug.arg_names, leaves, strict=True)
    )
    outs = jax.tree.leaves_with_path(traced.out_info)
    program, constants = read_jaxpr(traced.jaxpr, traced.fun_name, names)
    pairs = _state_pairs(traced.in_avals, traced.out_info)
    return Traced(
        program,
        constants,
        traced.in_tree,
        jax.tree.structure(traced.out_info),
        names,
        tuple(_join(path) for path, _ in outs),
        pairs,
        tuple(i for i, _ in pairs) if donate else (),
        tuple(jax.tree.leaves(traced.in_avals)),
    )


_ROOT = re.compile(r"^\w+")


def _join(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _input_path(label: str, path: tuple[Any, ...]) -> str:
    """``state/params/w``: the argument's name, then the path inside it."""
    root = _ROOT.match(label or "")
    rest = _join(path[2:])
    name = root.group() if root else _join(path[1:2])
    return f"{name}/{rest}" if rest else name


def _state_pairs(in_avals: Any, out_info: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of input and output leaves where a result succeeds an argument.

    An argument and a part of the result (the whole result, or one entry of a tuple)
    match when their trees, shapes and dtypes do. Each is matched once, in order.
    """
    arguments = [(i, a) for i, a in enumerate(in_avals[0])]
    parts = list(out_info) if isinstance(out_info, tuple) else [out_info]
    starts, at = [], 0
    for part in parts:
        starts.append(at)
        at += len(jax.tree.leaves(part))
    found: list[tuple[int, int]] = []
    free = set(range(len(parts)))
    at = 0
    for _, argument in arguments:
        size = len(jax.tree.leaves(argument))
        for number in sorted(free):
            if size and _signature(argument) == _signature(parts[number]):
                free.discard(number)
                found += [(at + k, starts[number] + k) for k in range(size)]
                break
        at += size
    return tuple(found)


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((tuple(x.shape), str(x.dtype)) for x in leaves)
