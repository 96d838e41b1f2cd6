"""Terms that are added up as turns or ticks go by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from rhino_jax.ir.program import accumulator_dtype
from rhino_jax.lower.reshard import neutral

COMBINE: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "and": jnp.bitwise_and,
    "or": jnp.bitwise_or,
}


def empty(operator: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """The total before the first term, of narrow floating types in float32."""
    wide = jnp.dtype(accumulator_dtype(dtype))
    return jnp.broadcast_to(neutral(operator, wide), shape)
