"""Gather, scatter and dynamic slices: which loops are looked up.

A dimension that is addressed one element at a time is *indexed*: split, each shard
answers for the positions it holds, so a gather leaves terms of a sum (zero where a
position is not held) and a scatter drops the updates of others. Dimensions taken
whole and batching dimensions are parallel. A dimension taken in windows of several
elements is blocked in gather and scatter; the dynamic slices can split it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rhino_jax.ir.factors import (
    BLOCKED,
    INDEXED,
    PARALLEL,
    POSITIONAL,
    REDUCTION,
    Dims,
    Factor,
    Flow,
    Rule,
)
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, sums


@dataclass(frozen=True)
class Numbers:
    """The dimension numbers of a gather or a scatter, under one set of names.

    ``window`` are dimensions of a gather's result, or of a scatter's updates;
    ``collapsed``, ``mapped`` (by the index vector) and ``batching`` are dimensions of
    the operand, ``index_batching`` of the indices.
    """

    window: tuple[int, ...]
    collapsed: tuple[int, ...]
    mapped: tuple[int, ...]
    batching: tuple[int, ...]
    index_batching: tuple[int, ...]

    @staticmethod
    def of(op: Op) -> Numbers:
        # Both kinds of dimension numbers list the same five things in this order.
        return Numbers(*(dims for _, dims in op.param["dimension_numbers"]))


def slice_sizes(op: Op, reads: Sequence[Value]) -> tuple[int, ...]:
    """How many elements of each operand dimension one index vector addresses."""
    if "slice_sizes" in op.param:
        return tuple(op.param["slice_sizes"])
    numbers = Numbers.of(op)
    updates = reads[2].shape
    windows = iter(updates[d] for d in numbers.window)
    single = (*numbers.collapsed, *numbers.batching)
    return tuple(
        1 if d in single else next(windows) for d in range(len(reads[0].shape))
    )


def is_key(value: Value) -> bool:
    """Whether a value holds typed random keys, which can be neither added nor zero."""
    return value.dtype.startswith("key<")


def term_operator(value: Value) -> str:
    """The operator under which a masked element (zero, false) adds nothing."""
    return "or" if value.dtype == "bool" else "sum"


@dataclass
class _Loops:
    """Factors under construction, and the dimensions made of them."""

    factors: list[Factor] = field(default_factory=list)

    def add(
        self,
        prefix: str,
        size: int,
        kind: str = PARALLEL,
        operator: str = "",
        addends: tuple[int, ...] = (),
    ) -> tuple[str, ...]:
        """A dimension that is a new factor (none, if there is nothing to address)."""
        if size == 1 and kind != PARALLEL:
            return ()
        name = f"{prefix}{len(self.factors)}"
        self.factors.append(Factor(name, size, kind, operator, addends))
        return (name,)


@dataclass(frozen=True)
class _Sides:
    """The dimensions of a gather or scatter: operand, indices, windows put together."""

    operand: Dims
    indices: Dims
    windows: Dims


def _sides(
    op: Op,
    reads: Sequence[Value],
    loops: _Loops,
    indexed: tuple[str, str],
    batch: tuple[str, str, tuple[int, ...]],
) -> _Sides:
    """What gather and scatter share.

    ``indexed`` is kind and operator of a looked-up dimension, ``batch`` kind, operator
    and addends of the loops over index vectors. ``windows`` of the answer is the
    gather's result or the scatter's updates.
    """
    numbers = Numbers.of(op)
    shape, vectors = reads[0].shape, reads[1].shape
    operand: list[tuple[str, ...]] = []
    windows: list[tuple[str, ...]] = []
    for d, (n, taken) in enumerate(zip(shape, slice_sizes(op, reads), strict=True)):
        if d in numbers.batching:
            operand.append(loops.add("b", n))
            continue
        if n == taken and d not in numbers.collapsed:
            # Also right where an index points here: only zero is in bounds.
            operand.append(loops.add("w", n))
            windows.append(operand[-1])
            continue
        looked_up = taken == 1 and d in numbers.mapped
        kind, operator = indexed if looked_up else (BLOCKED, "")
        operand.append(loops.add("x", n, kind, operator))
        if d not in numbers.collapsed:
            windows.append(loops.add("s", taken, BLOCKED))
    shared = {
        mine: operand[theirs]
        for mine, theirs in zip(numbers.index_batching, numbers.batching, strict=True)
    }
    heads = [
        shared[d] if d in shared else loops.add("i", n, *batch)
        for d, n in enumerate(vectors[:-1])
    ]
    depth = loops.add("v", vectors[-1], BLOCKED)
    rank = len(windows) + len(heads)
    inside, outside = iter(windows), iter(heads)
    whole = tuple(next(inside if d in numbers.window else outside) for d in range(rank))
    return _Sides(tuple(operand), (*heads, depth), whole)


def gather(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """``x w, i v -> i w``: x looked up, so a split of it leaves terms of a sum."""
    loops = _Loops()
    indexed = (BLOCKED, "") if is_key(reads[0]) else (INDEXED, term_operator(reads[0]))
    sides = _sides(op, reads, loops, indexed, (PARALLEL, "", ()))
    flows = (sums(0),) if _adds_up(op, reads[0]) else ()
    return Rule(
        tuple(loops.factors), (sides.operand, sides.indices), (sides.windows,), flows
    )


def _adds_up(op: Op, operand: Value) -> bool:
    """Whether what stands in for out-of-bounds elements is the sum of its terms."""
    if is_key(operand):
        return False
    if op.param["mode"] != "FILL_OR_DROP":
        return True
    fill = op.param["fill_value"]
    # Not a number stays so, and nothing else but zero does.
    return isinstance(fill, int | float | complex) and (fill == 0 or fill != fill)


_MERGES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "scatter-add": ("sum", (0,)),
    "scatter-sub": ("sum", (0,)),
    # A maximum does not mind that every shard counts the operand.
    "scatter-max": ("max", ()),
    "scatter-min": ("min", ()),
}
"""Scatters whose updates may be split: what merges them, and what is added once."""


def scatter(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """``x w, i v, i w -> x w``: every shard of x keeps the updates that are its own.

    The loops over updates are reductions where their terms can be merged; a plain
    scatter depends on the order of updates, and a product has no collective.
    """
    loops = _Loops()
    operator, addends = _MERGES.get(op.kind, ("", ()))
    merges = operator and reads[0].dtype != "bool" and not _unordered(op, reads[0])
    batch = (REDUCTION, operator, addends) if merges else (BLOCKED, "", ())
    indexed = BLOCKED if is_key(reads[0]) else INDEXED
    sides = _sides(op, reads, loops, (indexed, ""), batch)
    return Rule(
        tuple(loops.factors),
        (sides.operand, sides.indices, sides.windows),
        (sides.operand,),
        _scatter_flows(op, reads[0]),
    )


def _unordered(op: Op, operand: Value) -> bool:
    # Complex numbers have a maximum on one device, but no collective for it.
    ordered = op.kind in ("scatter-max", "scatter-min")
    return ordered and operand.dtype.startswith("complex")


def _scatter_flows(op: Op, operand: Value) -> tuple[Flow, ...]:
    if is_key(operand) or _unordered(op, operand):
        return ()
    linear: Mapping[str, Flow] = {
        "scatter-add": sums(0, 2),
        "scatter-sub": sums(0, 2),
        "scatter-mul": sums(0),
        "scatter-max": Flow("max", (0, 2)),
        "scatter-min": Flow("min", (0, 2)),
    }
    if op.kind in linear:
        return (linear[op.kind],)
    # Of two updates of one element either may win, on each device another; and with
    # a computation of its own a scatter applies a function of the user's.
    return (
        (sums(0, 2),)
        if op.param["unique_indices"] and op.param["update_jaxpr"] is None
        else ()
    )


def dynamic_slice(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Whole dimensions are parallel; of others each shard gives what it holds."""
    loops, key = _Loops(), is_key(reads[0])
    operand, result = [], []
    for n, taken in zip(reads[0].shape, op.param["slice_sizes"], strict=True):
        if n == taken:
            operand.append(loops.add("w", n))
            result.append(operand[-1])
            continue
        operand.append(
            loops.add("x", n, BLOCKED)
            if key
            else loops.add("x", n, INDEXED, term_operator(reads[0]))
        )
        result.append(loops.add("s", taken, BLOCKED if key else POSITIONAL))
    starts: tuple[Dims, ...] = ((),) * (len(reads) - 1)
    return Rule(
        tuple(loops.factors),
        (tuple(operand), *starts),
        (tuple(result),),
        () if key else (sums(0),),
    )


def dynamic_update_slice(
    op: Op, reads: Sequence[Value], makes: Sequence[Value]
) -> Rule:
    """Every shard writes the part of the (whole) update that falls on it."""
    loops = _Loops()
    operand, update = [], []
    for n, taken in zip(reads[0].shape, reads[1].shape, strict=True):
        if n == taken:
            operand.append(loops.add("w", n))
            update.append(operand[-1])
            continue
        kind = BLOCKED if is_key(reads[0]) else POSITIONAL
        operand.append(loops.add("x", n, kind))
        update.append(loops.add("s", taken, BLOCKED))
    starts: tuple[Dims, ...] = ((),) * (len(reads) - 2)
    return Rule(
        tuple(loops.factors),
        (tuple(operand), tuple(update), *starts),
        (tuple(operand),),
        () if is_key(reads[0]) else (sums(0, 1),),
    )


SCATTERS = (
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
)

RULES: Mapping[str, RuleFn] = {
    "gather": gather,
    **dict.fromkeys(SCATTERS, scatter),
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
}
