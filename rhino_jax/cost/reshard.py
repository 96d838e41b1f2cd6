"""The cheapest sequence of collectives from one layout to another.

Every axis of the mesh is, for one value, in one of three states: *whole* (replicated),
*split* at a digit of a dimension, or *partial*. A reshard is a change of state per
axis. One step changes axes of one kind together::

    whole -> split         slice, free
    whole -> partial       mask, free
    partial -> split       reduce-scatter (of sums)
    partial -> whole       all-reduce
    axes change places     permute
    split -> other digit   all-to-all
    split -> whole         all-gather
    split -> partial       embed, free, but the value grows

On the way an axis is as it was, whole, or as it will be: at most 27 layouts on a mesh
of three axes, and the sequence is a shortest path among them. In bytes; among equals
the fewest steps, then the order above (what makes the value smaller comes first).
Digits of different axes may stand in one another's way: what lies between two steps
must be a lawful layout.

The time axis crosses no link: its steps cost nothing, take no other axis along and
come first (terms are accumulated before they are sent). Turns of a loop exchange
nothing, so over time there are only slices, masks, embeddings, and at the loop's end
all-reduces (a sum accumulated) and all-gathers (rows put together again).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

from rhino_jax.ir.layout import Layout, Split, Use
from rhino_jax.ir.mesh import TIME, TORUS, Axis, Mesh
from rhino_jax.ir.program import itemsize
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    EMBED,
    FREE,
    MASK,
    PERMUTE,
    REDUCE_SCATTER,
    SLICE,
    Step,
)

WHOLE = "whole"
State = Use
"""``"whole"``, an operator's name (partial), or a (dimension, digit)."""

_ORDER = (
    SLICE,
    MASK,
    REDUCE_SCATTER,
    PERMUTE,
    ALL_TO_ALL,
    ALL_REDUCE,
    ALL_GATHER,
    EMBED,
)
_FIRST = -1
"""The rank of steps over time."""

Rank = tuple[int, int]

Change = tuple[str, tuple[str, ...], Layout]
"""One step to take: its kind, its axes, the layout after it."""


@lru_cache(maxsize=200_000)
def route(
    shape: tuple[int, ...], dtype: str, source: Layout, target: Layout, mesh: Mesh
) -> tuple[Step, ...]:
    """The steps that take a value of ``shape`` from ``source`` to ``target``.

    >>> mesh = Mesh.of(d=4)
    >>> whole, rows = Layout.replicated(1), Layout.of((("d", 2),))
    >>> term = whole.with_partial("d", "sum")
    >>> [(s.kind, s.wire_bytes) for s in route((8,), "float32", term, rows, mesh)]
    [('reduce-scatter', 24)]
    """
    alone = _alone(shape, dtype, source, target, mesh)
    if alone is not None:
        return alone
    number = itertools.count()
    # (bytes, steps, their ranks) decide; the number only keeps layouts uncompared.
    queue: list[tuple[int, int, tuple[Rank, ...], int, Layout, tuple[Step, ...]]]
    queue = [(0, 0, (), next(number), source, ())]
    done: set[Layout] = set()
    while queue:
        sent, count, ranks, _, now, steps = heapq.heappop(queue)
        if now == target:
            return steps
        if now in done:
            continue
        done.add(now)
        for kind, axes, after in _changes(shape, now, target, mesh):
            if after not in done:
                more = _wire_bytes(kind, shape, dtype, now, after, mesh, axes)
                step = Step(kind, axes, now, after, more)
                rank = (*ranks, _rank(kind, axes, now))
                entry = (sent + more, count + 1, rank, next(number), after)
                heapq.heappush(queue, (*entry, (*steps, step)))
    raise AssertionError(f"no way from {source} to {target} for {shape} on ({mesh})")


def _rank(kind: str, axes: tuple[str, ...], now: Layout) -> Rank:
    """What is done first, of ways that are equal else: by kind; gathers from the
    innermost axis out, so that what is there lies in a row."""
    digit = now.find(axes[0]) if kind == ALL_GATHER else None
    stride = digit[1].stride if digit else 0
    return _FIRST if TIME in axes else _ORDER.index(kind), stride


def _alone(
    shape: tuple[int, ...], dtype: str, source: Layout, target: Layout, mesh: Mesh
) -> tuple[Step, ...] | None:
    """The one step where a single axis changes; None where it takes a search."""
    changed = [a for a in mesh.names if _state(source, a) != _state(target, a)]
    if len(changed) != 1:
        return None
    (axis,) = changed
    if axis == TIME:
        return None
    kind = _kind(_state(source, axis), _state(target, axis))
    if not kind or (kind in (MASK, EMBED) and source.partial):
        return None
    axes = (axis,)
    if kind == ALL_TO_ALL and _overlaps(shape, source, target, axes, mesh):
        return None
    sent = _wire_bytes(kind, shape, dtype, source, target, mesh, axes)
    return (Step(kind, axes, source, target, sent),)


def wire_bytes(
    shape: tuple[int, ...], dtype: str, source: Layout, target: Layout, mesh: Mesh
) -> int:
    """Bytes each device sends to take a value from ``source`` to ``target``."""
    if source == target:
        return 0
    return sum(s.wire_bytes for s in route(shape, dtype, source, target, mesh))


@lru_cache(maxsize=200_000)
def local_bytes(shape: tuple[int, ...], dtype: str, layout: Layout, mesh: Mesh) -> int:
    """Bytes of one shard, pads included."""
    return math.ceil(math.prod(layout.local_shape(shape, mesh)) * itemsize(dtype))


def _wire_bytes(
    kind: str,
    shape: tuple[int, ...],
    dtype: str,
    before: Layout,
    after: Layout,
    mesh: Mesh,
    axes: tuple[str, ...],
) -> int:
    size = mesh.group_size(axes)
    if size == 1 or kind in FREE or TIME in axes:
        return 0
    layout = after if kind == ALL_GATHER else before
    return sent_bytes(kind, local_bytes(shape, dtype, layout, mesh), size)


def sent_bytes(kind: str, num_bytes: int, size: int) -> int:
    """Bytes each of ``size`` devices sends, by the one counter of the house.

    ``num_bytes`` are those of what a device reads; of an all-gather, of what it gets.
    """
    share = num_bytes * (size - 1) // size
    return {PERMUTE: num_bytes, ALL_REDUCE: 2 * share}.get(kind, share)


def _state(layout: Layout, axis: str) -> State:
    return layout.uses.get(axis, WHOLE)


def _with(layout: Layout, states: Iterable[tuple[str, State]]) -> Layout:
    return layout.using({axis: None if x == WHOLE else x for axis, x in states})


def _kind(now: State, goal: State) -> str:
    """The step that changes one axis from ``now`` to ``goal``; "" where none does.

    A maximum has no reduce-scatter: it is reduced, and sliced in a later step.
    """
    if isinstance(now, tuple):
        if goal == WHOLE:
            return ALL_GATHER
        return ALL_TO_ALL if isinstance(goal, tuple) else EMBED
    if now == WHOLE:
        return SLICE if isinstance(goal, tuple) else MASK
    if goal == WHOLE:
        return ALL_REDUCE
    return REDUCE_SCATTER if isinstance(goal, tuple) and now == "sum" else ""


def _changes(
    shape: tuple[int, ...], now: Layout, target: Layout, mesh: Mesh
) -> Iterator[Change]:
    """Every step that may be taken from ``now``."""
    swap = _swap(now, target, mesh)
    if swap:
        yield swap
    wanted = {axis: _state(target, axis) for axis in mesh.names}
    alike: dict[tuple[str, str], list[tuple[str, State]]] = {}
    for axis in mesh.names:
        state = _state(now, axis)
        for goal in dict.fromkeys((wanted[axis], WHOLE)):
            kind = "" if goal == state else _kind(state, goal)
            if kind and not (axis == TIME and kind in (ALL_TO_ALL, REDUCE_SCATTER)):
                key = kind, _operator(kind, state, goal)
                alike.setdefault(key, []).append((axis, goal))
    for (kind, operator), single in alike.items():
        if kind in (MASK, EMBED) and _waits(now, wanted, operator):
            continue
        for group in _groups(kind, single, mesh):
            axes = tuple(axis for axis, _ in group)
            after = _with(now, group)
            if after.fits(shape, mesh) and not (
                kind == ALL_TO_ALL and _overlaps(shape, now, after, axes, mesh)
            ):
                yield kind, axes, after


SINGLY = (REDUCE_SCATTER, ALL_GATHER)
"""Collectives that take the axes of a torus one after the other."""


def _operator(kind: str, now: State, goal: State) -> str:
    """The operator of a step that combines terms or makes some: one to a step."""
    state = now if kind == ALL_REDUCE else goal
    return state if kind in (ALL_REDUCE, MASK, EMBED) and isinstance(state, str) else ""


def _groups(
    kind: str, single: list[tuple[str, State]], mesh: Mesh
) -> Iterator[tuple[tuple[str, State], ...]]:
    """The sets of axes that one collective of ``kind`` may take together.

    A TPU compiler turns a reduce-scatter over its whole torus into an all-reduce and a
    slice, a small gather into an all-reduce: twice the bytes. One axis after the other
    sends the same and stays real.
    """
    links = {axis.name: axis.link for axis in mesh.axes}
    for count in range(1, len(single) + 1):
        for group in itertools.combinations(single, count):
            torus = all(links[axis] == TORUS for axis, _ in group)
            if count > 1 and any(axis == TIME for axis, _ in group):
                continue
            if count == 1 or not (torus and kind in SINGLY):
                yield group


def _waits(now: Layout, wanted: dict[str, State], operator: str) -> bool:
    """Whether terms of another operator are combined before new terms are made.

    A maximum over one axis and a sum over another have no order, and the neutral
    element of the one spoils the other.
    """
    return any(op not in (operator, wanted[axis]) for axis, op in now.partial)


def _overlaps(
    shape: tuple[int, ...],
    now: Layout,
    after: Layout,
    axes: tuple[str, ...],
    mesh: Mesh,
) -> bool:
    """Whether a digit can not be exposed while the present ones are still there."""
    for axis in axes:
        where = after.find(axis)
        assert where is not None
        dim, split = where
        both = now.with_split(dim, Split(_stand_in(axis), split.stride))
        if not both.fits(shape, _probe(mesh, axis)):
            return True
    return False


def _stand_in(axis: str) -> str:
    return axis + "_"


@lru_cache(maxsize=1000)
def _probe(mesh: Mesh, axis: str) -> Mesh:
    """``mesh`` and another axis like ``axis``."""
    return Mesh((*mesh.axes, Axis(_stand_in(axis), mesh.size(axis))))


def _swap(now: Layout, target: Layout, mesh: Mesh) -> Change | None:
    """Two axes of one size that take each other's places: one permute."""
    for a in mesh.names:
        for b in mesh.names:
            if a == b or mesh.size(a) != mesh.size(b) or TIME in (a, b):
                continue
            mine, other = _state(now, a), _state(now, b)
            if not isinstance(mine, tuple):
                continue
            goal = _state(target, b)
            if not isinstance(goal, tuple):
                continue
            if (goal[0], goal[1].stride) != (mine[0], mine[1].stride):
                continue
            back = _state(target, a)
            moved = _rename(other, a)
            if back == moved and (other == WHOLE or isinstance(other, tuple)):
                after = _with(now, ((b, goal), (a, moved)))
                return PERMUTE, mesh.in_order((a, b)), after
    return None


def _rename(state: State, axis: str) -> State:
    if isinstance(state, tuple):
        return state[0], Split(axis, state[1].stride)
    return state
