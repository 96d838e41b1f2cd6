"""How one value lies on the mesh.

A dimension of size ``n`` is read as a number in mixed radix. Splitting it over an
axis of size ``k`` hands one *digit* of that number to the axis::

    coordinate along the axis = (index // stride) % k

so a split is just ``(axis, stride)``. The ordinary contiguous split has
``stride = n / k``; a smaller stride keeps everything above it whole, which is the
*strided* layout of a fused projection (split the heads inside each third). Several
axes on one dimension take disjoint digits, so they never depend on one another's
order. A *ragged* split is the outermost digit of a dimension that does not divide:
its stride is the ceiling, and the last shards are padded.

A value may also be *partial* over an axis: every device along it holds a term, and
the value is the terms combined by an operator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from rhino_jax.ir.mesh import Mesh

OPERATORS = ("sum", "max", "min", "and", "or")


@dataclass(frozen=True, order=True)
class Split:
    """One digit of a dimension (or of a factor), handed to one mesh axis."""

    axis: str
    stride: int


Dim = tuple[Split, ...]
"""The splits of one dimension, by falling stride."""
Use = str | tuple[int, Split]
"""What an axis does: an operator's name (partial), or a dimension and a digit of it."""


@dataclass(frozen=True)
class Layout:
    """Per dimension the digits handed to axes, and the axes it is partial over.

    >>> from rhino_jax.ir.mesh import Mesh
    >>> layout = Layout.of((("d", 4),), ())
    >>> str(layout), layout.local_shape((8, 3), Mesh.of(d=2))
    ('[d/4,-]', (4, 3))
    """

    dims: tuple[Dim, ...]
    partial: tuple[tuple[str, str], ...] = ()

    def __hash__(self) -> int:
        # Layouts are keys everywhere: the hash is taken once. (A cached_property takes
        # a lock in Python 3.11, and most layouts of a search live shortly.)
        known = self.__dict__
        if "_hash" not in known:
            known["_hash"] = hash((self.dims, self.partial))
        found: int = known["_hash"]
        return found

    @staticmethod
    def replicated(rank: int) -> Layout:
        return Layout(((),) * rank)

    @staticmethod
    def of(
        *dims: Iterable[tuple[str, int]], partial: Iterable[tuple[str, str]] = ()
    ) -> Layout:
        """A layout in normal form from plain (axis, stride) pairs."""
        return Layout(
            tuple(sorted_dim(Split(a, s) for a, s in dim) for dim in dims),
            tuple(sorted(partial)),
        )

    @property
    def rank(self) -> int:
        return len(self.dims)

    @cached_property
    def split_axes(self) -> tuple[str, ...]:
        return tuple(split.axis for dim in self.dims for split in dim)

    @cached_property
    def partial_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.partial)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        return self.split_axes + self.partial_axes

    @property
    def uses(self) -> Mapping[str, Use]:
        """What each axis does here: its operator, or the dimension and digit it splits.

        >>> Layout.of((), (("d", 4),), partial=[("t", "sum")]).uses
        {'d': (1, Split(axis='d', stride=4)), 't': 'sum'}
        """
        known = self.__dict__
        if "_uses" not in known:
            known["_uses"] = {
                split.axis: (index, split)
                for index, dim in enumerate(self.dims)
                for split in dim
            } | dict(self.partial)
        found: Mapping[str, Use] = known["_uses"]
        return found

    def find(self, axis: str) -> tuple[int, Split] | None:
        """The dimension and digit that ``axis`` splits, if it splits one."""
        use = self.uses.get(axis)
        return use if isinstance(use, tuple) else None

    def operator(self, axis: str) -> str | None:
        """The operator this value is partial with over ``axis``, if it is."""
        use = self.uses.get(axis)
        return use if isinstance(use, str) else None

    def without(self, axes: Iterable[str]) -> Layout:
        """This layout, neither split nor partial over ``axes``."""
        return self.using(dict.fromkeys(axes))

    def using(self, changes: Mapping[str, Use | None]) -> Layout:
        """This layout with axes doing something else; None is nothing.

        >>> str(Layout.of((("d", 4),), ()).using({"d": (1, Split("d", 2)), "t": "sum"}))
        '[-,d/2]+sum(t)'
        """
        dims, partial = list(self.dims), self.partial
        for axis in changes:
            was = self.uses.get(axis)
            if isinstance(was, tuple):
                dims[was[0]] = tuple(s for s in dims[was[0]] if s.axis != axis)
            elif was is not None:
                partial = tuple(pair for pair in partial if pair[0] != axis)
        for axis, use in changes.items():
            if isinstance(use, tuple):
                index, split = use
                dims[index] = sorted_dim((*dims[index], split))
            elif use is not None:
                partial = tuple(sorted((*partial, (axis, use))))
        return Layout(tuple(dims), partial)

    def settled(self) -> Layout:
        """This layout with nothing left partial."""
        return replace(self, partial=())

    def with_split(self, dim: int, split: Split) -> Layout:
        dims = list(self.dims)
        dims[dim] = sorted_dim((*dims[dim], split))
        return replace(self, dims=tuple(dims))

    def with_partial(self, axis: str, operator: str) -> Layout:
        return replace(self, partial=tuple(sorted((*self.partial, (axis, operator)))))

    def only(self, axis: str) -> Layout:
        """What this layout says of one axis, and nothing else."""
        return self.without(a for a in self.axes if a != axis)

    def prepended(self, dim: Dim = ()) -> Layout:
        """The layout of a stack of such values (a scanned input or output)."""
        return replace(self, dims=(dim, *self.dims))

    def dropped_first(self) -> Layout:
        """The layout of one slice of a stacked value."""
        return replace(self, dims=self.dims[1:])

    def local_shape(self, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
        """The shape each device holds, pads of ragged splits included."""
        return tuple(
            local_size(n, dim, mesh) for n, dim in zip(shape, self.dims, strict=True)
        )

    def ragged_dims(self, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
        """The dimensions whose last shards are padded."""
        return tuple(
            i
            for i, (n, dim) in enumerate(zip(shape, self.dims, strict=True))
            if padded_size(n, dim, mesh) != n
        )

    def fits(self, shape: tuple[int, ...], mesh: Mesh) -> bool:
        """Whether the splits of each dimension fit it and one another.

        :meth:`problems` says more, and looks at the axes too.
        """
        return not any(
            dim and _dim_problem(n, dim, mesh)
            for n, dim in zip(shape, self.dims, strict=True)
        )

    def problems(self, shape: tuple[int, ...], mesh: Mesh) -> list[str]:
        """Everything that keeps this layout from fitting ``shape`` on ``mesh``."""
        if len(shape) != self.rank:
            return [f"layout {self} has {self.rank} dimensions, shape {shape}"]
        found = [
            f"axis {axis!r} of layout {self} is not in the mesh ({mesh})"
            for axis in self.axes
            if axis not in mesh.names
        ]
        if len(set(self.axes)) != len(self.axes):
            found.append(f"an axis is used twice in layout {self}")
        found += [
            f"operator {op!r} of layout {self} is unknown"
            for _, op in self.partial
            if op not in OPERATORS
        ]
        if found:
            return found
        for index, (n, dim) in enumerate(zip(shape, self.dims, strict=True)):
            problem = _dim_problem(n, dim, mesh)
            if problem:
                found.append(f"dimension {index} of size {n} in {self}: {problem}")
        return found

    def __str__(self) -> str:
        dims = ",".join(
            ".".join(f"{s.axis}/{s.stride}" for s in dim) or "-" for dim in self.dims
        )
        tail = "".join(f"+{op}({axis})" for axis, op in self.partial)
        return f"[{dims}]{tail}"


def parse_layout(text: str) -> Layout:
    """The inverse of ``str(layout)``.

    >>> str(parse_layout("[d/4.t/2,-]+sum(x)"))
    '[d/4.t/2,-]+sum(x)'
    """
    body, _, tail = text.partition("]")
    assert body.startswith("["), f"no layout: {text!r}"
    dims: list[Dim] = []
    for piece in body[1:].split(",") if body != "[" else []:
        pairs = [p.split("/") for p in piece.split(".")] if piece != "-" else []
        dims.append(tuple(Split(axis, int(stride)) for axis, stride in pairs))
    partial = []
    for piece in tail.split("+")[1:]:
        operator, _, axis = piece.rstrip(")").partition("(")
        partial.append((axis, operator))
    return Layout(tuple(dims), tuple(partial))


def sorted_dim(splits: Iterable[Split]) -> Dim:
    found = tuple(splits)
    if len(found) < 2:
        return found
    return tuple(sorted(found, key=lambda s: (-s.stride, s.axis)))


def padded_size(size: int, dim: Dim, mesh: Mesh) -> int:
    """The size a dimension has once its ragged outermost split is padded."""
    if not dim:
        return size
    return max(size, dim[0].stride * mesh.size(dim[0].axis))


def local_size(size: int, dim: Dim, mesh: Mesh) -> int:
    """Elements of a dimension that each device holds, pads included."""
    return padded_size(size, dim, mesh) // math.prod(mesh.size(s.axis) for s in dim)


def contiguous(size: int, axes: Iterable[str], mesh: Mesh) -> Dim:
    """Split ``size`` over ``axes``, the first outermost, each shard one block.

    Where the sizes do not divide the result is ragged: strides are ceilings.

    >>> from rhino_jax.ir.mesh import Mesh
    >>> contiguous(12, ("d", "t"), Mesh.of(d=2, t=3))
    (Split(axis='d', stride=6), Split(axis='t', stride=2))
    """
    names = tuple(axes)
    rest = math.prod(mesh.size(name) for name in names)
    stride = -(-size // rest) * rest
    splits = []
    for name in names:
        stride //= mesh.size(name)
        splits.append(Split(name, stride))
    return tuple(splits)


@lru_cache(maxsize=200_000)
def _dim_problem(size: int, dim: Dim, mesh: Mesh) -> str:
    if not dim:
        return ""
    if dim != sorted_dim(dim):
        return "its splits are not in order of falling stride"
    top = dim[0].stride * mesh.size(dim[0].axis)
    if top < size and size % top:
        return f"{size} is not a multiple of {top}"
    for upper, lower in itertools.pairwise(dim):
        span = lower.stride * mesh.size(lower.axis)
        if upper.stride % span:
            return f"stride {upper.stride} is not a multiple of {span}"
    if any(split.stride < 1 for split in dim):
        return "a stride below 1"
    return ""
