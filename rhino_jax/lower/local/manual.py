"""Collectives of the user's own, inside a ``shard_map`` of theirs.

They run as they stand, over axes of the plan's mesh that bear the same names. JAX types
what a device has by the axes over which it varies; in the plan's one manual program it
does not, so what only changes that type changes nothing, and what is typed to be the
same everywhere is an ordinary collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

from rhino_jax.ir.steps import named_axes
from rhino_jax.lower.local.shard import LocalFn, Shard


def _pvary(shard: Shard, x: jax.Array) -> Any:
    return x


def _psum(shard: Shard, x: jax.Array) -> Any:
    return lax.psum(x, named_axes(shard.op))


def _all_gather(shard: Shard, x: jax.Array) -> Any:
    param = shard.params
    return lax.all_gather(
        x,
        named_axes(shard.op),
        axis=param["all_gather_dimension"],
        tiled=param["tiled"],
    )


LOCALS: Mapping[str, LocalFn] = {
    "pvary": _pvary,
    "psum_invariant": _psum,
    "all_gather_invariant": _all_gather,
}
