"""Products and their operands, dimension by dimension; what a match consists of.

Dimensions are labelled: examples ``b``, heads ``h``, queries ``t``, query heads of one
head of keys ``g``, keys ``u``, depth ``d`` and ``e`` of values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.ir.program import Op
from rhino_jax.search.recognize.scopes import SHAPES, Name, Scopes, moved, places

Labels = tuple[str, ...]
"""One for each place of an array."""


@dataclass(frozen=True)
class Array:
    """An array whose dimensions are known."""

    name: Name
    labels: Labels


@dataclass(frozen=True)
class Made:
    """A product to be replaced: where it stands, and its result's labels."""

    scope: int
    op: int
    labels: Labels


@dataclass(frozen=True)
class Gradient:
    """The products that are gradients, and the cotangent of the result."""

    cotangent: Array
    queries: Made
    keys: Made
    values: Made


@dataclass(frozen=True)
class Match:
    """One attention. ``scores`` is the product of queries and keys."""

    queries: Array
    keys: Array
    values: Array
    scores: Name
    sizes: Mapping[str, int]
    scale: float
    causal: bool
    window: int | None
    result: Made | None
    gradient: Gradient | None


@dataclass(frozen=True)
class Sides:
    """A product's operands: what each place is. ``batch`` and ``contracted`` pair
    places of both; ``free`` are (place, place of the result)."""

    batch: tuple[tuple[int, int], ...]
    contracted: tuple[tuple[int, int], ...]
    free: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]
    result: tuple[tuple[int, int], ...]
    """Of each batch dimension: place in the first operand, place in the result."""


def sides_of(op: Op, shapes: Sequence[tuple[int, ...]]) -> Sides:
    contracted, batch = op.param["dimension_numbers"]
    at = [places(shape) for shape in shapes]
    pairs = [
        tuple((at[0][i], at[1][j]) for i, j in zip(*dims, strict=True) if i in at[0])
        for dims in (batch, contracted)
    ]
    made = 0
    result = []
    for place, _ in pairs[0]:
        result.append((place, made))
        made += 1
    free = []
    for side in (0, 1):
        taken = {*batch[side], *contracted[side]}
        mine = []
        for d, place in at[side].items():
            if d not in taken:
                mine.append((place, made))
                made += 1
        free.append(tuple(mine))
    return Sides(pairs[0], pairs[1], (free[0], free[1]), tuple(result))


def operands(
    reads: Sequence[Name], sides: Sides, made: Sequence[str], inner: str
) -> tuple[Array, Array]:
    """A product's operands, given the labels of its result and the one that it sums
    over."""
    found: tuple[dict[int, str], dict[int, str]] = {}, {}
    for pair, (_, at) in zip(sides.batch, sides.result, strict=True):
        for labels, place in zip(found, pair, strict=True):
            labels[place] = made[at]
    for pair in sides.contracted:
        for labels, place in zip(found, pair, strict=True):
            labels[place] = inner
    for labels, free in zip(found, sides.free, strict=True):
        labels.update((place, made[at]) for place, at in free)
    one, other = (tuple(x[i] for i in range(len(x))) for x in found)
    return Array(reads[0], one), Array(reads[1], other)


def views(scopes: Scopes, array: Array) -> list[Array]:
    """An array, what it is a rearrangement of, what that is one of, and so on."""
    found = [array]
    while True:
        last = found[-1]
        op = scopes.maker(last.name)
        if op is None or op.kind not in SHAPES or op.kind == "broadcast_in_dim":
            return found
        (read,) = scopes.reads(last.name, op)
        before, after = scopes.value(read).shape, scopes.value(last.name).shape
        to = moved(op, before, after)
        if to is None:
            return found
        labels = tuple(last.labels[to[place]] for place in range(len(to)))
        found.append(Array(read, labels))
