"""Masks as functions of the distance between two indices.

``i >= j`` over iotas, and all that is made of such by elementwise ops and moves of
dimensions, is one array over ``i - j``: it is worked out whole, in memory linear in
the sequence, so that two masks are equal exactly where their arrays are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rhino_jax.ir.program import Op
from rhino_jax.search.recognize.scopes import (
    SHAPES,
    Name,
    Scopes,
    moved,
    places,
    spread,
)

LONGEST = 2**24
"""Distances worked out at most, and up to where float32 counts exactly."""


@dataclass(frozen=True)
class Indexed:
    """An array made of indices alone.

    Either ``steps`` (for a place, how much one index more adds) and a ``start``; or,
    where ``between`` names two places, ``by_distance``: its elements by the first
    index less the second, which begin at one less than the second one's size, below 0.
    """

    steps: Mapping[int, int]
    start: Any = 0
    between: tuple[int, int] = (-1, -1)
    by_distance: np.ndarray | None = None

    def at(self, to: Mapping[int, int]) -> Indexed:
        """The same under other places."""
        if self.by_distance is None:
            return replace(self, steps={to[p]: n for p, n in self.steps.items()})
        p, q = (to[place] for place in self.between)
        if p < q:
            return replace(self, between=(p, q))
        return replace(self, between=(q, p), by_distance=self.by_distance[::-1])


ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
}
DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint32 float16 bfloat16 float32 float64".split()
)
COUNTED = frozenset("int32 int64 float32 float64".split())
LINEAR = frozenset("add add_any sub".split())
COMPARED = frozenset("eq ne lt le gt ge".split())
SAME = frozenset("copy stop_gradient".split())


class Masks:
    """What is known of arrays made of indices.

    ``constants`` are arrays that come in with the trace, by value of the outermost
    Program.
    """

    def __init__(self, scopes: Scopes, constants: Mapping[int, Any]) -> None:
        self.scopes = scopes
        self.constants = constants
        self.known: dict[Name, Indexed | None] = {}

    def of(self, name: Name) -> Indexed | None:
        """What an array is; None where more than two indices' distance decides."""
        if name not in self.known:
            self.known[name] = None
            self.known[name] = self._read(name)
        return self.known[name]

    def _read(self, name: Name) -> Indexed | None:
        value = self.scopes.value(name)
        if value.literal is not None:
            plain = isinstance(value.literal, bool | int | float)
            plain = plain and value.dtype in DTYPES
            return Indexed({}, _as(value.literal, value.dtype)) if plain else None
        op = self.scopes.maker(name)
        if op is None and name[0] == 0 and name[1] in self.constants:
            return _held(np.asarray(self.constants[name[1]]), value.dtype)
        if op is None or op.programs:
            return None
        if op.kind == "iota":
            at = places(value.shape).get(op.param["dimension"])
            counted = {} if at is None else {at: 1}
            return Indexed(counted) if value.dtype in COUNTED else None
        known = op.kind in SHAPES or op.kind in SAME or op.kind in ELEMENTWISE
        if not known and op.kind != "convert_element_type":
            return None
        reads = self.scopes.reads(name, op)
        # Operands that are whole inputs are told first: most that is asked for is.
        found = []
        for read in reversed(reads):
            one = self.of(read)
            if one is None:
                return None
            found.append(one)
        found.reverse()
        if op.kind in SHAPES:
            to = moved(op, self.scopes.value(reads[0]).shape, value.shape)
            return None if to is None else found[0].at(to)
        if op.kind in SAME:
            return found[0]
        if op.kind == "convert_element_type":
            return _converted(found[0], value.dtype)
        shapes = (self.scopes.value(read).shape for read in reads)
        found = [
            one.at(spread(shape, value.shape))
            for one, shape in zip(found, shapes, strict=True)
        ]
        return _combined(op, found, [n for n in value.shape if n != 1])


def _held(array: np.ndarray, dtype: str) -> Indexed | None:
    """An array by its values: a count, or what goes by distance."""
    if dtype not in DTYPES or array.size > LONGEST:
        return None
    array = array.astype(_numpy(dtype)).reshape([n for n in array.shape if n != 1])
    if array.ndim == 1 and dtype in COUNTED:
        step = int(array[1] - array[0])
        if np.array_equal(array, array[0] + step * np.arange(len(array))):
            return Indexed({0: step}, array[0])
    if array.ndim == 2 and np.array_equal(array[1:, 1:], array[:-1, :-1]):
        return Indexed({}, 0, (0, 1), np.concatenate([array[0, ::-1], array[1:, 0]]))
    return None


def _as(x: Any, dtype: str) -> Any:
    return np.asarray(x, _numpy(dtype))[()]


def _numpy(dtype: str) -> str:
    """Only small numbers and those for minus infinity are kept in bfloat16."""
    return "float32" if dtype.startswith("bfloat") else dtype


def _converted(x: Indexed, dtype: str) -> Indexed | None:
    if dtype not in DTYPES:
        return None
    if x.by_distance is not None:
        return replace(x, by_distance=x.by_distance.astype(_numpy(dtype)))
    if x.steps:
        return x if dtype in COUNTED else None
    return replace(x, start=_as(x.start, dtype))


def _combined(op: Op, reads: list[Indexed], sizes: list[int]) -> Indexed | None:
    apply = ELEMENTWISE[op.kind]
    if not any(x.steps or x.by_distance is not None for x in reads):
        return Indexed({}, apply(*(x.start for x in reads)))
    if op.kind in LINEAR and all(x.by_distance is None for x in reads):
        one, other = reads
        sign = -1 if op.kind == "sub" else 1
        both = {*one.steps, *other.steps}
        steps = {p: one.steps.get(p, 0) + sign * other.steps.get(p, 0) for p in both}
        start = apply(one.start, other.start)
        return Indexed({p: n for p, n in steps.items() if n}, start)
    if op.kind == "mul" and all(x.by_distance is None for x in reads):
        one, other = reads if not reads[0].steps else reads[::-1]
        by = int(one.start)
        if not one.steps and by == one.start:
            steps = {p: n * by for p, n in other.steps.items() if by}
            return Indexed(steps, by * other.start)
    if op.kind in COMPARED and all(x.by_distance is None for x in reads):
        one, other = reads
        both = {*one.steps, *other.steps}
        steps = {p: one.steps.get(p, 0) - other.steps.get(p, 0) for p in both}
        less = Indexed({p: n for p, n in steps.items() if n}, one.start - other.start)
        return _by_distance(less, sizes, lambda x: apply(x, 0))
    alike = [_by_distance(x, sizes, lambda x: x) for x in reads]
    between = {x.between for x in alike if x is not None and x.by_distance is not None}
    if None in alike or len(between) != 1:
        return None
    args = [x.start if x.by_distance is None else x.by_distance for x in alike if x]
    return Indexed({}, 0, between.pop(), np.asarray(apply(*args)))


def _by_distance(
    x: Indexed, sizes: list[int], apply: Callable[[Any], Any]
) -> Indexed | None:
    """``apply`` of ``x``, where that is a constant or goes by distance."""
    if x.by_distance is not None:
        return replace(x, by_distance=apply(x.by_distance))
    if not x.steps:
        return Indexed({}, apply(x.start))
    p, q = min(x.steps), max(x.steps)
    if len(x.steps) != 2 or x.steps[p] != -x.steps[q]:
        return None
    far = np.arange(1 - sizes[q], sizes[p])
    if len(far) > LONGEST or max(map(abs, x.steps.values())) != 1:
        return None
    return Indexed({}, 0, (p, q), apply(x.start + x.steps[p] * far))
