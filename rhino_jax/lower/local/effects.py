"""Calls out of the program: by every device, or by the first one for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.mesh import TIME
from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands
from rhino_jax.lower.reshard import index_along
from rhino_jax.rules import effects


def _once(shard: Shard, *args: jax.Array) -> Any:
    """Run on the first device; what comes back is summed up over all."""
    axes = [axis for axis in shard.mesh.names if axis != TIME]
    if not axes:
        return shard.bind(*args)
    first = jnp.bool_(True)
    for axis in axes:
        first &= index_along(axis, shard.mesh) == 0

    def elsewhere(*args: jax.Array) -> list[jax.Array]:
        return [jnp.zeros(v.shape, v.dtype) for v in shard.makes]

    outs = lax.cond(first, lambda *args: list(shard.bind(*args)), elsewhere, *args)
    return [_sum(out, axes) for out in outs]


def _sum(x: jax.Array, axes: list[str]) -> jax.Array:
    if x.dtype == jnp.bool_:
        return lax.psum(x.astype(jnp.int32), axes).astype(jnp.bool_)
    return lax.psum(x, axes)


LOCALS: Mapping[str, LocalFn] = {
    **dict.fromkeys(effects.RULES, as_it_stands),
    **dict.fromkeys(effects.ONCE, _once),
}
