"""The cheapest sequence of collectives from one layout to another.

Every axis of the mesh is, for one value, in one of three states: *whole* (replicated),
*split* at a digit of a dimension, or *partial*. A reshard is a change of state per
axis, and digits of different axes never depend on one another, so the sequence is
found by taking, again and again, every change that is possible now, the ones that
make the value smaller first::

    whole -> split         slice, free
    whole -> partial       mask, free
    partial -> split       reduce-scatter
    partial -> whole       all-reduce
    axes change places     permute
    split -> other digit   all-to-all
    split -> whole         all-gather
    split -> partial       embed, free, but the value grows

Changes of one kind over several axes become one collective over their product, which
moves fewer bytes than one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.ir.program import itemsize
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    EMBED,
    MASK,
    PERMUTE,
    REDUCE_SCATTER,
    SLICE,
    Step,
)

WHOLE = "whole"
State = str | tuple[int, Split]
"""``"whole"``, an operator's name (partial), or a (dimension, digit)."""

_ORDER = (
    SLICE,
    MASK,
    REDUCE_SCATTER,
    ALL_REDUCE,
    PERMUTE,
    ALL_TO_ALL,
    ALL_GATHER,
    EMBED,
)


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
    steps: list[Step] = []
    now = source
    while now != target:
        kind, axes, after = _next(shape, now, target, mesh)
        size = mesh.group_size(axes)
        sent = (
            0 if size == 1 else _wire_bytes(kind, shape, dtype, now, after, mesh, size)
        )
        steps.append(Step(kind, axes, now, after, sent))
        now = after
        assert len(steps) < 64, f"no way from {source} to {target}"
    return tuple(steps)


def wire_bytes(
    shape: tuple[int, ...], dtype: str, source: Layout, target: Layout, mesh: Mesh
) -> int:
    """Bytes each device sends to take a value from ``source`` to ``target``."""
    if source == target:
        return 0
    return sum(s.wire_bytes for s in route(shape, dtype, source, target, mesh))


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
    size: int,
) -> int:
    held = local_bytes(shape, dtype, before, mesh)
    share = held * (size - 1) // size
    return {
        ALL_REDUCE: 2 * share,
        REDUCE_SCATTER: share,
        ALL_TO_ALL: share,
        PERMUTE: held,
        ALL_GATHER: local_bytes(shape, dtype, after, mesh) * (size - 1) // size,
    }.get(kind, 0)


def _state(layout: Layout, axis: str) -> State:
    return layout.find(axis) or layout.operator(axis) or WHOLE


def _with(layout: Layout, axis: str, state: State) -> Layout:
    base = layout.without((axis,))
    if state == WHOLE:
        return base
    if isinstance(state, str):
        return base.with_partial(axis, state)
    return base.with_split(*state)


def _kind(now: State, target: State) -> str:
    """The collective that changes one axis from ``now`` to ``target``."""
    if isinstance(now, tuple):
        if target == WHOLE:
            return ALL_GATHER
        return ALL_TO_ALL if isinstance(target, tuple) else EMBED
    if now == WHOLE:
        return SLICE if isinstance(target, tuple) else MASK
    if isinstance(target, tuple) and now == "sum":
        return REDUCE_SCATTER
    return ALL_REDUCE


def _operator(kind: str, now: State, target: State) -> str:
    """The operator of a change that combines terms or makes some: one to a step."""
    state = now if kind == ALL_REDUCE else target
    return state if kind in (ALL_REDUCE, MASK, EMBED) and isinstance(state, str) else ""


def _next(
    shape: tuple[int, ...], now: Layout, target: Layout, mesh: Mesh
) -> tuple[str, tuple[str, ...], Layout]:
    """The next step: its kind, its axes and the layout after it."""
    swap = _swap(now, target, mesh)
    wanted = {a: _state(target, a) for a in mesh.names}
    changes: dict[tuple[str, str], list[str]] = {}
    for axis in mesh.names:
        state = _state(now, axis)
        if state != wanted[axis] and not (swap and axis in swap[1]):
            kind = _kind(state, wanted[axis])
            changes.setdefault((kind, _operator(kind, state, wanted[axis])), []).append(
                axis
            )
    for kind in _ORDER:
        if kind == PERMUTE and swap:
            return swap
        for (other, _), axes in changes.items():
            if other != kind:
                continue
            for group in _groups(kind, axes, mesh):
                after = _apply(shape, now, wanted, group, kind, mesh)
                if after is not None:
                    return kind, tuple(group), after
    # Digits that stand in one another's way: gather one, slice it again later.
    for axis in mesh.names:
        if isinstance(_state(now, axis), tuple) and _state(now, axis) != wanted[axis]:
            after = now.without((axis,))
            if not after.problems(shape, mesh):
                return ALL_GATHER, (axis,), after
    split = mesh.in_order(iter(now.split_axes))
    return ALL_GATHER, split, now.without(split)


def _groups(kind: str, axes: list[str], mesh: Mesh) -> Iterator[list[str]]:
    """All axes at once, else one by one.

    A TPU compiler turns a reduce-scatter over its whole torus into an all-reduce and a
    slice, twice the bytes; one axis after the other sends the same and stays real.
    """
    torus = all(axis.link == TORUS for axis in mesh.axes if axis.name in axes)
    if not (torus and kind == REDUCE_SCATTER):
        yield axes
    for axis in axes:
        yield [axis]


def _apply(
    shape: tuple[int, ...],
    now: Layout,
    wanted: dict[str, State],
    axes: list[str],
    kind: str,
    mesh: Mesh,
) -> Layout | None:
    after = now.without(axes)
    if kind in (MASK, EMBED) and _waits(now, wanted, axes):
        return None
    for axis in axes:
        # A maximum has no reduce-scatter: reduce, and slice in the next step.
        state = WHOLE if kind == ALL_REDUCE else wanted[axis]
        after = _with(after, axis, state)
    if after.problems(shape, mesh):
        return None
    if kind == ALL_TO_ALL:
        both = now
        for axis in axes:
            where = after.find(axis)
            assert where is not None
            if _overlaps(both, where, axis, mesh, shape):
                return None
    return after


def _waits(now: Layout, wanted: dict[str, State], axes: list[str]) -> bool:
    """Whether terms of another operator are combined first.

    A maximum over one axis and a sum over another have no order, and the neutral
    element of the one spoils the other.
    """
    goals = {wanted[axis] for axis in axes}
    return any(op not in goals and wanted[axis] != op for axis, op in now.partial)


def _overlaps(
    layout: Layout,
    where: tuple[int, Split],
    axis: str,
    mesh: Mesh,
    shape: tuple[int, ...],
) -> bool:
    """Whether a digit can not be exposed while the present ones are still there."""
    dim, split = where
    stand_in = Split(axis + "_", split.stride)
    probe = Mesh((*mesh.axes, type(mesh.axes[0])(axis + "_", mesh.size(axis))))
    return bool(layout.with_split(dim, stand_in).problems(shape, probe))


def _swap(
    now: Layout, target: Layout, mesh: Mesh
) -> tuple[str, tuple[str, ...], Layout] | None:
    """Two axes of one size that take each other's places: one permute."""
    for a in mesh.names:
        for b in mesh.names:
            if a == b or mesh.size(a) != mesh.size(b):
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
                after = now.without((a, b))
                after = _with(_with(after, b, goal), a, moved)
                return PERMUTE, mesh.in_order((a, b)), after
    return None


def _rename(state: State, axis: str) -> State:
    if isinstance(state, tuple):
        return state[0], Split(axis, state[1].stride)
    return state
