"""Equations that are read as others: what a primitive does, in primitives of loops.

A loop whose condition is an array (a ``while`` under ``vmap``) goes on while any
element does, and keeps what is done: that is written out here. A linear solve is its
solver (it is differentiated already), and gamma draws are the rejection loop that they
run. Mutable references become values that are handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax import compat


def _while(eqn: Any) -> Callable[..., Any] | None:
    """A ``while`` with an array for its condition; None for an ordinary one."""
    params = eqn.params
    if not params["cond_jaxpr"].out_avals[0].shape:
        return None
    test, body = map(compat.as_fun, (params["cond_jaxpr"], params["body_jaxpr"]))
    split = params["cond_nconsts"]
    first = split + params["body_nconsts"]

    def run(*args: Any) -> Any:
        def goes_on(held: tuple[Any, ...]) -> Any:
            return test(*args[:split], *held)[0]

        def turn(held: tuple[Any, ...]) -> tuple[Any, ...]:
            mask = goes_on(held)
            new = body(*args[split:first], *held)
            return tuple(_where(mask, x, y) for x, y in zip(new, held, strict=True))

        return lax.while_loop(lambda held: jnp.any(goes_on(held)), turn, args[first:])

    return run


def _where(mask: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """``x`` where ``mask`` (whose dimensions are leading ones of both), else ``y``."""
    spread = lax.broadcast_in_dim(mask, x.shape, tuple(range(mask.ndim)))
    return lax.select(spread, x, y)


def _linear_solve(eqn: Any) -> Callable[..., Any]:
    """``custom_linear_solve`` by its solver: the constants of the others fall away."""
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    before = lengths.matvec + lengths.vecmat
    after = before + lengths.solve + lengths.transpose_solve
    solve = compat.as_fun(jaxprs.solve)
    return lambda *args: solve(*args[before : before + lengths.solve], *args[after:])


def _gamma(eqn: Any) -> Callable[..., Any]:
    return lambda keys, a: compat.gamma_samples(keys, a, eqn.params["log_space"])


def _mulhi(eqn: Any) -> Callable[..., Any]:
    return high_half


def high_half(x: jax.Array, y: jax.Array) -> jax.Array:
    """The upper half of ``x * y``, by halves of words.

    ``lax.mulhi`` has no lowering inside a ``shard_map`` in jax 0.10.2.
    """
    bits = x.dtype.itemsize * 8
    half, unsigned = bits // 2, jnp.dtype(f"uint{bits}")
    mask = jnp.asarray(2**half - 1, unsigned)
    a, b = x.astype(unsigned), y.astype(unsigned)
    above = (a >> half) * (b & mask) + ((a & mask) * (b & mask) >> half)
    below = (a & mask) * (b >> half) + (above & mask)
    high = (a >> half) * (b >> half) + (above >> half) + (below >> half)
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        high -= jnp.where(x < 0, b, 0) + jnp.where(y < 0, a, 0)
    return high.astype(x.dtype)


REWRITES: Mapping[str, Callable[[Any], Callable[..., Any] | None]] = {
    "while": _while,
    "custom_linear_solve": _linear_solve,
    "random_gamma": _gamma,
    "mulhi": _mulhi,
}
"""Primitive -> from its equation a function of the same operands, or None."""


def rewritten(eqn: Any) -> Any:
    """The closed jaxpr that ``eqn`` is read as; None where it is read as it stands."""
    make = REWRITES.get(eqn.primitive.name)
    fun = make(eqn) if make else None
    if fun is None:
        return None
    with compat.as_written(eqn):
        return jax.make_jaxpr(fun)(*_shapes(eqn.invars))


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(
            v.aval.shape, v.aval.dtype, weak_type=getattr(v.aval, "weak_type", False)
        )
        for v in variables
    ]
