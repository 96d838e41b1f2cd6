"""The collectives a plan writes, as data.

A :class:`Step` moves every shard of one value over one group of axes; a
:class:`Move` is the sequence of steps that takes a value from one layout to another.
:mod:`rhino_jax.cost.reshard` finds the cheapest sequence, :mod:`rhino_jax.lower`
carries it out, and nobody else talks between devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rhino_jax.ir.layout import Layout
from rhino_jax.ir.program import Op

ALL_REDUCE = "all-reduce"
REDUCE_SCATTER = "reduce-scatter"
ALL_GATHER = "all-gather"
ALL_TO_ALL = "all-to-all"
PERMUTE = "collective-permute"
RAGGED = "ragged-all-to-all"
"""Only of the user's own, since what it sends is known when it runs."""
SLICE = "slice"
MASK = "mask"
EMBED = "embed"

PASSED, COLLECTED = "passed", "collected"
"""How a product treats what it gathers or scatters by itself: it is never there in one
piece, or it is put together beside."""

FREE = (SLICE, MASK, EMBED)
"""Steps that send nothing: keep one's own part; be zero but on the first shard;
put one's own part into zeros, as one term of a sum."""

COLLECTIVES: Mapping[str, str] = {
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin"), ALL_REDUCE),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), ALL_GATHER),
    "reduce_scatter": REDUCE_SCATTER,
    "all_to_all": ALL_TO_ALL,
    "ragged_all_to_all": RAGGED,
    "ppermute": PERMUTE,
}
"""Primitives that a user's ``shard_map`` sends by, and the kind of step each is."""


def named_axes(op: Op) -> tuple[str, ...]:
    """The mesh axes over which a collective of the user's talks."""
    named = op.param.get("axes", op.param.get("axis_name"))
    return (named,) if isinstance(named, str) else tuple(named)


@dataclass(frozen=True)
class Step:
    """One move of a value along one or more axes, from one layout to the next.

    ``source`` and ``target`` differ on ``axes`` only. ``wire_bytes`` is what each
    device sends, by the one counter of the house: all-gather out·(n-1)/n, all-reduce
    2B(n-1)/n, reduce-scatter in·(n-1)/n, all-to-all B(n-1)/n, permute B.
    """

    kind: str
    axes: tuple[str, ...]
    source: Layout
    target: Layout
    wire_bytes: int


def changed_dim(step: Step) -> int:
    """The dimension that a gather or scatter over one axis makes whole, or splits."""
    ends = zip(step.source.dims, step.target.dims, strict=True)
    (dim,) = (number for number, (old, new) in enumerate(ends) if old != new)
    return dim


@dataclass(frozen=True)
class Move:
    """A value taken from one layout to another by an explicit sequence of steps.

    ``again``: the same move was made before and its result let go (a weight gathered
    for the forward and once more for the backward pass). Compilers merge equal
    collectives; a barrier keeps this one apart.

    ``within``: its one step is no collective of its own. The product that it stands
    beside does it while it works, shard by shard around a ring ("collective matmul");
    the whole is :data:`PASSED`, or :data:`COLLECTED` for others that read it too.
    """

    value: int
    source: Layout
    target: Layout
    steps: tuple[Step, ...]
    again: bool = False
    within: str = ""

    @property
    def wire_bytes(self) -> int:
        return sum(step.wire_bytes for step in self.steps)
