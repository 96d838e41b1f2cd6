"""What a local form knows of its shard: sizes, offsets, global indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rhino_jax import compat
from rhino_jax.ir.factors import Choice, Rule, layouts
from rhino_jax.ir.layout import Layout, local_size, padded_size
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Value
from rhino_jax.lower.reshard import index_along


@dataclass(frozen=True)
class Shard:
    """One op on one device: everything a local form may ask.

    ``reads`` and ``makes`` are the global values; local arrays have the shapes of
    :meth:`operand_shape` and :meth:`shape`.
    """

    op: Op
    rule: Rule
    choice: Choice
    mesh: Mesh
    reads: tuple[Value, ...]
    makes: tuple[Value, ...]

    @property
    def params(self) -> Mapping[str, Any]:
        """The equation's own parameters, as JAX wrote them."""
        return self.op.source.params

    def bind(self, *args: jax.Array, **changed: Any) -> Any:
        """Run the primitive itself on local arrays, with some parameters changed."""
        return compat.bind(self.op.source, args, changed)

    @property
    def layouts(self) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
        return layouts(self.rule, self.choice)

    def operand_shape(self, index: int) -> tuple[int, ...]:
        """The local shape of operand ``index``, pads included."""
        layout = self.layouts[0][index]
        return layout.local_shape(self.reads[index].shape, self.mesh)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The local shape of result ``index``, pads included."""
        layout = self.layouts[1][index]
        return layout.local_shape(self.makes[index].shape, self.mesh)

    def is_split(self, factor: str) -> bool:
        return bool(self.choice.on(factor))

    def size(self, factor: str) -> int:
        """How many elements of ``factor`` this shard holds, pads included."""
        whole = self.rule.factor(factor).size
        return local_size(whole, self.choice.on(factor), self.mesh)

    def is_ragged(self, factor: str) -> bool:
        whole = self.rule.factor(factor).size
        return padded_size(whole, self.choice.on(factor), self.mesh) != whole

    def index(self, factor: str) -> jax.Array:
        """int32 [size]: the global index, in ``factor``, of each local element.

        Right for strided and ragged splits too; pads have an index past the end.
        """
        whole = self.rule.factor(factor).size
        return global_index(whole, self.choice.on(factor), self.mesh)

    def operand_index(self, index: int, dim: int) -> jax.Array:
        """int32: the global index of each local element of one operand dimension."""
        layout = self.layouts[0][index]
        return global_index(self.reads[index].shape[dim], layout.dims[dim], self.mesh)

    def result_index(self, dim: int, index: int = 0) -> jax.Array:
        """int32: the global index of each local element of one result dimension."""
        layout = self.layouts[1][index]
        return global_index(self.makes[index].shape[dim], layout.dims[dim], self.mesh)


def global_index(size: int, digits: Any, mesh: Mesh) -> jax.Array:
    """int32: global indices of the local elements of a dimension split at ``digits``.

    The local elements run through the digits that are left, outermost first.
    """
    index = jnp.zeros((1,), jnp.int32)
    high = padded_size(size, digits, mesh)
    for split in digits:
        span = split.stride * mesh.size(split.axis)
        above = jnp.arange(high // span, dtype=jnp.int32) * span
        here = index_along(split.axis, mesh).astype(jnp.int32) * split.stride
        index = (index[:, None] + (above + here)[None, :]).reshape(-1)
        high = split.stride
    low = jnp.arange(high, dtype=jnp.int32)
    return (index[:, None] + low[None, :]).reshape(-1)


LocalFn = Callable[..., Any]
"""(shard, *local operands) -> the local result, or a tuple of them."""


def as_it_stands(shard: Shard, *args: jax.Array) -> Any:
    """Run the primitive on the local arrays with its parameters unchanged."""
    return shard.bind(*args)
