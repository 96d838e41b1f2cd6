"""The table of all local forms, and the one way to run them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp

from rhino_jax.ir.factors import INDEXED
from rhino_jax.lower.local import (
    assembly,
    attention,
    contraction,
    convolution,
    effects,
    elementwise,
    indexing,
    kernels,
    linalg,
    manual,
    placing,
    ragged,
    random,
    reduction,
    shape,
    sorting,
)
from rhino_jax.lower.local.shard import LocalFn, Shard, as_it_stands
from rhino_jax.lower.reshard import neutral

FAMILIES: tuple[ModuleType, ...] = (
    elementwise,
    contraction,
    attention,
    ragged,
    convolution,
    reduction,
    shape,
    assembly,
    sorting,
    random,
    indexing,
    linalg,
    manual,
    kernels,
    placing,
    effects,
)


def _merged() -> Mapping[str, LocalFn]:
    table: dict[str, LocalFn] = {}
    for family in FAMILIES:
        for kind, form in family.LOCALS.items():
            assert kind not in table, f"two local forms for {kind!r}"
            table[kind] = form
    return table


LOCALS: Mapping[str, LocalFn] = _merged()


ALWAYS = frozenset(
    name for family in (placing, effects, attention, manual) for name in family.LOCALS
)
"""Primitives with a form of their own even where nothing is split."""


def run_local(shard: Shard, args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The results of one op on one shard.

    Pads of operands along a ragged reduction are filled with the neutral element
    first, so no local form has to think of them. An op with no local form, or whose
    choice splits nothing, runs as the primitive itself; one that a rewrite has added
    is no primitive, and some are never run as they stand.
    """
    split_something = any(axis for _, axis in shard.choice.splits)
    own = split_something or shard.op.source is None or shard.op.kind in ALWAYS
    form = LOCALS.get(shard.op.kind, as_it_stands) if own else as_it_stands
    out = form(shard, *_filled(shard, args))
    return tuple(out) if isinstance(out, list | tuple) else (out,)


def _filled(shard: Shard, args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Operands with the pads of ragged reduction factors made neutral.

    Nobody looks up an index in the pads of an indexed one.
    """
    ragged = [
        f
        for f in shard.rule.factors
        if f.operator and f.kind != INDEXED and shard.is_ragged(f.name)
    ]
    filled = list(args)
    for factor in ragged:
        inside = shard.index(factor.name) < factor.size
        for i, dims in enumerate(shard.rule.operands):
            for d, dim in enumerate(dims):
                if factor.name in dim:
                    assert dim[0] == factor.name, "a ragged factor inside a product"
                    inner = math.prod(shard.size(n) for n in dim[1:])
                    keep = jnp.expand_dims(
                        jnp.repeat(inside, inner),
                        [k for k in range(len(dims)) if k != d],
                    )
                    fill = neutral(factor.operator, filled[i].dtype)
                    filled[i] = jnp.where(keep, filled[i], fill)
    return tuple(filled)
