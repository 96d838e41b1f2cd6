"""Convolutions, pooling, and the gradients of pooling.

Batch and output feature are parallel, input feature is a sum; groups are the
outermost part of the dimensions that they cut. JAX writes the gradient for a weight
as a convolution that swaps batch and feature, so the same rule reads it rightly.

Along a spatial dimension windows that do not overlap fall into blocks, one after the
other (a 1x1 kernel, the patches of a vision transformer, pooling by its own stride):
then the dimension is a product (block, place in the block). Windows that overlap are
a factor of kind *window* where equal blocks of the result (of the window, in a weight's
gradient: a sum) are equal blocks of what is read, as with "SAME" padding: each block
reads a halo of its neighbours' elements (:mod:`rhino_jax.rules.window`). Else such
dimensions are blocked, each side with a factor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rhino_jax.ir.factors import (
    PARALLEL,
    REDUCTION,
    WINDOW,
    Dims,
    Factor,
    Flow,
    Halo,
    Rule,
)
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, sums
from rhino_jax.rules.window import Scattered, Window

Dim = tuple[str, ...]
Windowed = tuple[Dim, Dim, Dim]
"""One spatial dimension in what is read, in the window, and in the result."""


@dataclass
class _Factors:
    """The factors of one rule as they are named; one of size 1 is left out."""

    found: dict[str, Factor] = field(default_factory=dict)

    def add(
        self,
        name: str,
        size: int,
        kind: str = "parallel",
        by: str = "",
        halos: tuple[Halo, ...] = (),
    ) -> Dim:
        if size == 1:
            return ()
        if kind == WINDOW and not any(h.before or h.behind for h in halos):
            # Blocks of their own, though the dimension is no plain row of them.
            kind, halos = REDUCTION if by else PARALLEL, ()
        self.found[name] = Factor(name, size, kind, by, halos=halos)
        return (name,)


def conv_general_dilated(
    op: Op, reads: Sequence[Value], makes: Sequence[Value]
) -> Rule:
    """Batch ``n``, sum over ``c``, output feature ``o``, group ``g``, spatial."""
    param = op.param
    specs = dict(param["dimension_numbers"])
    left, right, out = (specs[k] for k in ("lhs_spec", "rhs_spec", "out_spec"))
    rhs, made = reads[1].shape, makes[0].shape
    factors = _Factors()
    # At most one of the two counts is above 1.
    by_feature = factors.add("g", param["feature_group_count"])
    by_batch = factors.add("g", param["batch_group_count"])
    groups = param["feature_group_count"] * param["batch_group_count"]
    n = factors.add("n", made[out[0]])
    c = factors.add("c", rhs[right[1]], "reduction", "sum")
    o = (*by_feature, *by_batch, *factors.add("o", made[out[1]] // groups))
    sides: tuple[dict[int, Dim], ...] = (
        {left[0]: (*by_batch, *n), left[1]: (*by_feature, *c)},
        {right[0]: o, right[1]: c},
        {out[0]: n, out[1]: o},
    )
    spatial = zip(left[2:], right[2:], out[2:], strict=True)
    for window, dims in zip(convolved(op, reads, makes), spatial, strict=True):
        parts = _convolved(factors, window)
        for side, dim, part in zip(sides, dims, parts, strict=True):
            side[dim] = part
    x, w, y = (tuple(side[d] for d in range(len(side))) for side in sides)
    return Rule(tuple(factors.found.values()), (x, w), (y,), (sums(0), sums(1)))


def convolved(
    op: Op, reads: Sequence[Value], makes: Sequence[Value]
) -> tuple[Window, ...]:
    """The windows of a convolution, one for each spatial dimension."""
    param = op.param
    specs = dict(param["dimension_numbers"])
    left, right, out = (specs[k][2:] for k in ("lhs_spec", "rhs_spec", "out_spec"))
    return tuple(
        Window(
            i,
            reads[0].shape[read],
            reads[1].shape[window],
            makes[0].shape[made],
            param["window_strides"][i],
            *_ends(param["padding"][i]),
            param["lhs_dilation"][i],
            param["rhs_dilation"][i],
        )
        for i, (read, window, made) in enumerate(zip(left, right, out, strict=True))
    )


def _ends(padding: Sequence[int]) -> tuple[int, int]:
    low, high = padding
    return low, high


def _convolved(factors: _Factors, at: Window) -> Windowed:
    for form in (_blocks, _taps, _overlapping, _added):
        found = form(factors, at, "sum")
        if found is not None:
            return found
    i = at.number
    return (
        factors.add(f"x{i}", at.read, "blocked"),
        factors.add(f"k{i}", at.window, "blocked"),
        factors.add(f"y{i}", at.made, "blocked"),
    )


def _blocks(factors: _Factors, at: Window, operator: str) -> Windowed | None:
    """Windows side by side: (p, w) with w -> p. ``p`` in a gap is blocked inside.

    Without an operator the window is blocked too.
    """
    step = at.read if at.made == 1 else at.stride
    apart = at.low == at.high == 0 and at.read_dilation == 1 and at.reach <= step
    if not apart or at.read != at.made * step:
        return None
    p = factors.add(f"p{at.number}", at.made)
    if at.window == step and operator:
        w = factors.add(f"w{at.number}", step, "reduction", operator)
        return (*p, *w), w, p
    rest = factors.add(f"x{at.number}", step, "blocked")
    return (*p, *rest), factors.add(f"k{at.number}", at.window, "blocked"), p


def _taps(factors: _Factors, at: Window, operator: str) -> Windowed | None:
    """The gradient of :func:`_blocks` for its window: (p, t), p -> t, summed over p.

    Of a window smaller than the block only the first places are made.
    """
    step = at.window_dilation
    apart = at.stride == at.read_dilation == 1 and at.low == 0 and at.made <= step
    if not apart or at.read != at.window * step:
        return None
    p = factors.add(f"p{at.number}", at.window, "reduction", operator)
    if at.made == step:
        t = factors.add(f"t{at.number}", step)
        return (*p, *t), p, t
    rest = factors.add(f"x{at.number}", step, "blocked")
    return (*p, *rest), p, factors.add(f"y{at.number}", at.made, "blocked")


def _overlapping(factors: _Factors, at: Window, operator: str) -> Windowed | None:
    """Blocks of the result with halos of what is read: (h, x) or h, and h or (h, y)."""
    found = at.of_made
    if found is None:
        return None
    halos = (Halo(0, found.before, found.behind),)
    parts = _in_step(factors, at, halos)
    if parts is None:
        return None
    return parts[0], factors.add(f"k{at.number}", at.window, "blocked"), parts[1]


def _added(factors: _Factors, at: Window, operator: str) -> Windowed | None:
    """The gradient of :func:`_overlapping` for its window: blocks of the window."""
    found, few = at.of_window, min(at.read, at.window)
    if found is None or max(at.read, at.window) % few:
        return None
    halos = (Halo(0, found.before, found.behind),)
    k = factors.add(f"k{at.number}", few, WINDOW, operator, halos)
    x = factors.add(f"x{at.number}", at.read // few, "blocked")
    w = factors.add(f"w{at.number}", at.window // few, "blocked")
    return (*k, *x), (*k, *w), factors.add(f"y{at.number}", at.made, "blocked")


def _in_step(
    factors: _Factors, at: Window, halos: tuple[Halo, ...]
) -> tuple[Dim, Dim] | None:
    """What is read and what is made in blocks that lie side by side."""
    few = min(at.read, at.made)
    if not few or max(at.read, at.made) % few:
        return None
    h = factors.add(f"h{at.number}", few, WINDOW, halos=halos)
    x = factors.add(f"x{at.number}", at.read // few, "blocked")
    return (*h, *x), (*h, *factors.add(f"y{at.number}", at.made // few, "blocked"))


def pooled(op: Op, read: Sequence[int], made: Sequence[int]) -> tuple[Window, ...]:
    """The windows of pooling, one for each dimension."""
    param, ones = op.param, (1,) * len(read)
    return tuple(
        Window(
            i,
            read[i],
            param["window_dimensions"][i],
            made[i],
            param["window_strides"][i],
            *_ends(param["padding"][i]),
            param.get("base_dilation", ones)[i],
            param.get("window_dilation", ones)[i],
        )
        for i in range(len(read))
    )


Halos = Callable[[Window], tuple[Halo, ...] | None]
"""What operands need where overlapping windows are split; None: they can not be."""


def _gathering(*operands: int) -> Halos:
    """Each of ``operands`` is pooled."""

    def halos(at: Window) -> tuple[Halo, ...] | None:
        found = at.of_made
        # Of pooling no compiler takes a padding below 0.
        if found is None or min(found.padding) < 0:
            return None
        return tuple(Halo(i, found.before, found.behind) for i in operands)

    return halos


def _scattering(at: Window) -> tuple[Halo, ...] | None:
    """The first operand is scattered where the second one has its maxima."""
    found = Scattered.of(at)
    if found is None:
        return None
    return Halo(0, *found.windows), Halo(1, *found.elements)


def _pooled(
    factors: _Factors,
    op: Op,
    read: tuple[int, ...],
    made: tuple[int, ...],
    operator: str,
    halos: Halos = lambda at: None,
) -> tuple[Dims, Dims]:
    """The dimensions of what is pooled and of the result."""
    large: list[Dim] = []
    small: list[Dim] = []
    for at in pooled(op, read, made):
        i, blocks = at.number, _blocks(factors, at, operator)
        needed = None if blocks else halos(at)
        parts = (blocks[0], blocks[2]) if blocks else None
        if needed is not None:
            parts = _in_step(factors, at, needed)
        if parts is None:
            x = factors.add(f"x{i}", at.read, "blocked")
            parts = x, factors.add(f"y{i}", at.made, "blocked")
        large.append(parts[0])
        small.append(parts[1])
    # The window is no operand, so a factor of its own has no use here.
    used = {name for dim in (*large, *small) for name in dim}
    factors.found = {n: f for n, f in factors.found.items() if n in used}
    return tuple(large), tuple(small)


def _pool(operator: str) -> RuleFn:
    """Pooling by an operator that terms may be combined by, in any order."""

    def rule(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
        factors = _Factors()
        shapes = reads[0].shape, makes[0].shape
        x, y = _pooled(factors, op, *shapes, operator, _gathering(0))
        return Rule(tuple(factors.found.values()), (x,), (y,), (Flow(operator, (0,)),))

    return rule


def reduce_window(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Arrays pooled together by any function, each with an initial scalar."""
    factors = _Factors()
    count = len(makes)
    halos = _gathering(*range(count))
    x, y = _pooled(factors, op, reads[0].shape, makes[0].shape, "", halos)
    return Rule(
        tuple(factors.found.values()), (x,) * count + ((),) * count, (y,) * count
    )


def select_and_gather_add(
    op: Op, reads: Sequence[Value], makes: Sequence[Value]
) -> Rule:
    """Tangents taken where pooling found its maximum: linear in the tangents."""
    factors = _Factors()
    x, y = _pooled(factors, op, reads[0].shape, makes[0].shape, "", _gathering(0, 1))
    return Rule(tuple(factors.found.values()), (x, x), (y,), (sums(0),))


def select_and_scatter_add(
    op: Op, reads: Sequence[Value], makes: Sequence[Value]
) -> Rule:
    """Cotangents put where pooling found its maximum: linear in the cotangents."""
    source, operand = reads
    factors = _Factors()
    x, y = _pooled(factors, op, operand.shape, source.shape, "", _scattering)
    return Rule(tuple(factors.found.values()), (y, x), (x,), (sums(0),))


def select_and_scatter(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """(operand, source, initial) with any selecting and any scattering function."""
    operand, source, _ = reads
    factors = _Factors()
    x, y = _pooled(factors, op, operand.shape, source.shape, "")
    return Rule(tuple(factors.found.values()), (x, y, ()), (x,))


RULES: Mapping[str, RuleFn] = {
    "conv_general_dilated": conv_general_dilated,
    "reduce_window_sum": _pool("sum"),
    "reduce_window_max": _pool("max"),
    "reduce_window_min": _pool("min"),
    "reduce_window": reduce_window,
    "select_and_gather_add": select_and_gather_add,
    "select_and_scatter_add": select_and_scatter_add,
    "select_and_scatter": select_and_scatter,
}
