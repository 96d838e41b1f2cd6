"""A step against its Program: traced, read, run whole, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.lower.manual import run
from rhino_jax.trace import Traced, trace


def replicated_assignment(program: Program) -> Assignment:
    """Every value whole everywhere, in nested Programs too: no choice, no move."""

    def whole(values: Sequence[int]) -> tuple[Layout, ...]:
        return tuple(Layout.replicated(len(program.values[v].shape)) for v in values)

    ops = tuple(
        OpPlan(inner=tuple(replicated_assignment(body) for body in op.programs))
        for op in program.ops
    )
    return Assignment(whole(program.inputs), whole(program.outputs), ops)


def evaluate(traced: Traced, *args: Any, **kwargs: Any) -> Any:
    """The result of the Program on arguments without the static ones."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    assert tree == traced.in_tree
    plan = replicated_assignment(traced.program)

    def step(*flat: Any) -> list[Any]:
        return run(traced.program, plan, Mesh.of(x=1), flat)

    arrays = [jax.numpy.asarray(leaf) for leaf in leaves]
    out = jax.jit(step)(*arrays, *traced.constants)
    return jax.tree.unflatten(traced.out_tree, out)


def assert_same(have: Any, want: Any, rtol: float = 1e-5) -> None:
    """Two results alike: trees, dtypes, and values to rounding."""
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(have), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        a, b = _words(a), _words(jax.numpy.asarray(b))
        assert a.dtype == b.dtype, name
        scale = float(np.max(np.abs(b), initial=0.0)) if b.dtype.kind in "fc" else 0
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale, err_msg=name)


def _words(x: Any) -> np.ndarray:
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def check_step(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    rtol: float = 1e-5,
) -> Traced:
    """Trace ``fun``, and see that its Program gives what it gives."""
    named = dict(kwargs or {})
    traced = trace(fun, args, named)
    assert_same(evaluate(traced, *args, **named), jax.jit(fun)(*args, **named), rtol)
    return traced


def paired(traced: Traced) -> dict[str, str]:
    """The state pairs by their paths."""
    return {
        traced.input_paths[i]: traced.output_paths[o] for i, o in traced.state_pairs
    }
