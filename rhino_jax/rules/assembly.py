"""Primitives that cut dimensions apart and put them together.

What is cut or joined along a dimension need not be whole: where every size and offset
is a multiple of a common *period*, the dimension is a product (blocked blocks,
parallel period), and the period may be split. Slicing ``[0:h]`` out of ``3h`` or
joining three ``h`` keeps h split inside each third: the strided layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import Dims, Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, elementwise, names, plain, sums

Dim = tuple[str, ...]


def periodic(
    name: str, sizes: Sequence[int], offsets: Sequence[int] = ()
) -> tuple[list[Factor], list[Dim]]:
    """Dimensions of these sizes as (blocked, parallel) with their longest period.

    The period is the greatest common divisor of all sizes and offsets. It is the
    factor ``name``; dimension k has ``name.k`` blocked outside it, if anything. Beside
    an empty dimension there is no period: splitting nothing would pad it.

    >>> periodic("i", (12, 4), (8,))[1]
    [('i.0', 'i'), ('i',)]
    """
    period = 1 if 0 in sizes else math.gcd(*sizes, *offsets)
    if set(sizes) <= {period}:
        return [Factor(name, period)], [(name,)] * len(sizes)
    factors = [Factor(name, period)] if period > 1 else []
    inner = (name,) if period > 1 else ()
    dims: list[Dim] = []
    for k, size in enumerate(sizes):
        blocks = size // period
        if blocks == 1:
            dims.append(inner)
            continue
        factors.append(Factor(f"{name}.{k}", blocks, "blocked"))
        dims.append((f"{name}.{k}", *inner))
    return factors, dims


def _stepped(
    name: str, long: int, short: int, offset: int, step: int
) -> tuple[list[Factor], Dim, Dim]:
    """The long and the short dimension where element j of the short one is element
    ``offset + step * j`` of the long one: a strided slice, or a dilating pad.

    Steps that fill the long dimension are a blocked innermost factor of it.
    """
    if long % step:
        return (
            [
                Factor(f"{name}.0", long, "blocked"),
                Factor(f"{name}.1", short, "blocked"),
            ],
            (f"{name}.0",),
            (f"{name}.1",),
        )
    factors, dims = periodic(name, (long // step, short), (offset // step,))
    if step == 1:
        return factors, dims[0], dims[1]
    inner = f"{name}.s"
    return [*factors, Factor(inner, step, "blocked")], (*dims[0], inner), dims[1]


def slice_(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Every dimension keeps the period of its start, its limit and itself."""
    shape, rank = reads[0].shape, len(reads[0].shape)
    steps = op.param["strides"] or (1,) * rank
    factors: list[Factor] = []
    operand: list[Dim] = []
    result: list[Dim] = []
    for name, long, short, start, step in zip(
        names("i", rank),
        shape,
        makes[0].shape,
        op.param["start_indices"],
        steps,
        strict=True,
    ):
        more, big, small = _stepped(name, long, short, start, step)
        factors += more
        operand.append(big)
        result.append(small)
    return Rule(tuple(factors), (tuple(operand),), (tuple(result),), (sums(0),))


def pad(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Every dimension keeps the period of both its pads and itself.

    A term of a sum is padded with a term: with its own zeros where that is the
    padding value, with a term of the padding value where it is not known.
    """
    factors: list[Factor] = []
    operand: list[Dim] = []
    result: list[Dim] = []
    for name, short, long, (low, _, interior) in zip(
        names("i", len(reads[0].shape)),
        reads[0].shape,
        makes[0].shape,
        op.param["padding_config"],
        strict=True,
    ):
        more, big, small = _stepped(name, long, short, low, interior + 1)
        factors += more
        operand.append(small)
        result.append(big)
    value = reads[1].literal
    flows = (sums(0, 1),) if value is None else (sums(0),) if value == 0 else ()
    return Rule(tuple(factors), (tuple(operand), ()), (tuple(result),), flows)


def concatenate(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """The joined dimension keeps the common period of the parts."""
    axis, shape = op.param["dimension"], makes[0].shape
    letters = names("i", len(shape))
    sizes = [value.shape[axis] for value in (*reads, *makes)]
    factors, joined = periodic(letters[axis], sizes)
    factors += [Factor(n, shape[d]) for d, n in enumerate(letters) if d != axis]

    def dims(dim: Dim) -> Dims:
        return tuple(dim if d == axis else (n,) for d, n in enumerate(letters))

    operands = tuple(dims(dim) for dim in joined[:-1])
    flow = sums(*range(len(reads)))
    return Rule(tuple(factors), operands, (dims(joined[-1]),), (flow,))


def _one_more(part: Value, whole: Value, axis: int) -> tuple[tuple[Factor, ...], Dims]:
    """Factors of values that are stacked along ``axis``, and the stack's dimensions.

    A part has the factors i0, i1, ...; the new dimension is blocked.
    """
    letters = names("i", len(part.shape))
    factors = [Factor(n, size) for n, size in zip(letters, part.shape, strict=True)]
    factors.append(Factor("p", whole.shape[axis], "blocked"))
    return tuple(factors), plain((*letters[:axis], "p", *letters[axis:]))


def stack(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    factors, whole = _one_more(reads[0], makes[0], op.param["axis"])
    part = plain(names("i", len(reads[0].shape)))
    flow = sums(*range(len(reads)))
    return Rule(factors, (part,) * len(reads), (whole,), (flow,))


def unstack(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    factors, whole = _one_more(makes[0], reads[0], op.param["axis"])
    part = plain(names("i", len(makes[0].shape)))
    flow = sums(0, results=tuple(range(len(makes))))
    return Rule(factors, (whole,), (part,) * len(makes), (flow,))


def rev(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Reversed dimensions are whole: a shard's elements end up on another."""
    rank = len(reads[0].shape)
    turned = {d % rank for d in op.param["dimensions"]}
    letters = names("i", rank)
    factors = tuple(
        Factor(n, size, "blocked" if d in turned else "parallel")
        for d, (n, size) in enumerate(zip(letters, reads[0].shape, strict=True))
    )
    return Rule(factors, (plain(letters),), (plain(letters),), (sums(0),))


def tile(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """A repeated dimension is (repeats, itself); repeats are the result's alone."""
    factors: list[Factor] = []
    operand: list[Dim] = []
    result: list[Dim] = []
    for d, (size, count) in enumerate(
        zip(reads[0].shape, op.param["reps"], strict=True)
    ):
        factors.append(Factor(f"i{d}", size))
        operand.append((f"i{d}",))
        repeats: Dim = ()
        if count != 1:
            factors.append(Factor(f"r{d}", count))
            repeats = (f"r{d}",)
        result.append((*repeats, f"i{d}"))
    return Rule(tuple(factors), (tuple(operand),), (tuple(result),), (sums(0),))


def bitcast(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Elementwise; what one wide element is in narrow ones is a whole last dimension.

    No partial value flows through: the bits of a term are not a term of the bits.
    """
    (read,), (made,) = reads, makes
    short, long = sorted((read.shape, made.shape), key=len)
    if len(short) == len(long):
        return elementwise(reads, makes)
    letters = names("i", len(short))
    factors = [Factor(n, size) for n, size in zip(letters, short, strict=True)]
    factors.append(Factor("w", long[-1], "blocked"))
    wide, narrow = plain(letters), plain((*letters, "w"))
    widening = len(read.shape) > len(made.shape)
    operand, result = (narrow, wide) if widening else (wide, narrow)
    return Rule(tuple(factors), (operand,), (result,))


RULES: Mapping[str, RuleFn] = {
    "slice": slice_,
    "pad": pad,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "rev": rev,
    "tile": tile,
    "bitcast_convert_type": bitcast,
}
