"""What kernels of a device reach of its data sheet's peaks: curves over sizes.

A :class:`Curve` gives a share of peak by size, on a grid: between its points the
logarithm of the share runs straight over the logarithms of the sizes. A product's size
is (rows, contracted, columns), a batched product's starts with the batch, a
convolution's is that of the product that it is; all other sizes are the bytes that a
kernel moves. A curve without axes is one share for all.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

PRODUCT, BATCHED, CONVOLUTION = "product", "batched product", "convolution"
"""Shares of the matrix units' peak."""
OPERANDS, ELEMENTWISE, REDUCTION = "operands", "elementwise", "reduction"
COLUMNS = "column reduction"
"""A reduction that keeps the last dimension: rows apart are added up."""
GATHER, SCATTER = "gather", "scatter"
"""Shares of the memory's bandwidth; operands: products and convolutions that wait for
what they read."""
FUSING = (ELEMENTWISE, REDUCTION, COLUMNS)
ARITHMETIC = (PRODUCT, BATCHED, CONVOLUTION)
AXES: Mapping[str, int] = {PRODUCT: 3, BATCHED: 4, CONVOLUTION: 3}
"""Numbers of a size; one, bytes, where none is named."""
KINDS = (*ARITHMETIC, OPERANDS, ELEMENTWISE, REDUCTION, COLUMNS, GATHER, SCATTER)
LIKE: Mapping[str, str] = {
    BATCHED: PRODUCT,
    CONVOLUTION: PRODUCT,
    OPERANDS: ELEMENTWISE,
    REDUCTION: ELEMENTWISE,
    COLUMNS: REDUCTION,
    GATHER: ELEMENTWISE,
    SCATTER: ELEMENTWISE,
}
"""Whose share a kind without a curve takes."""


@dataclass(frozen=True)
class Curve:
    """Shares of peak of one kind of kernel over its sizes.

    ``dtype`` is a column of the catalogue, "" for every type. ``axes`` are the grid's
    coordinates, ascending, ``shares`` row-major over them. ``error`` is the median
    relative error of its seconds, where it was fitted.
    """

    kind: str
    dtype: str
    axes: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    error: float = 0.0

    def share(self, *size: float) -> float:
        """The share at ``size``.

        Below the grid the first cell goes on (small kernels take as long as less small
        ones, and no longer), above it the last share holds.

        >>> curve = Curve("elementwise", "", ((10.0, 1000.0),), (0.01, 1.0))
        >>> [round(curve.share(size), 4) for size in (1, 10, 100, 1000, 1e9)]
        [0.001, 0.01, 0.1, 1.0, 1.0]
        """
        on_grid = [max(x, axis[0]) for axis, x in zip(self.axes, size, strict=False)]
        smaller = math.prod(
            max(x, 1.0) / y for x, y in zip(size, on_grid, strict=False)
        )
        found = self._straight(size)
        if smaller < 1.0:  # else cells of several axes may fall without end
            found = max(found, smaller * self._straight(on_grid))
        return min(found, 1.0)

    def _straight(self, size: Sequence[float]) -> float:
        places = [_place(axis, at) for axis, at in zip(self.axes, size, strict=False)]
        total = 0.0
        for corner in itertools.product((0, 1), repeat=len(places)):
            weight, index = 1.0, 0
            for (low, part), up, axis in zip(places, corner, self.axes, strict=True):
                weight *= part if up else 1.0 - part
                index = index * len(axis) + min(low + up, len(axis) - 1)
            if weight:
                total += weight * self._logs[index]
        return math.exp(total)

    @cached_property
    def _logs(self) -> tuple[float, ...]:
        return tuple(math.log(share) for share in self.shares)


def _place(axis: tuple[float, ...], at: float) -> tuple[int, float]:
    """The cell of ``at`` and how far it lies in it; below 0 before the first."""
    if len(axis) == 1 or at >= axis[-1]:
        return len(axis) - 1, 0.0
    low = max(bisect_right(axis, at) - 1, 0)
    return low, math.log(max(at, 1.0) / axis[low]) / math.log(axis[low + 1] / axis[low])


@dataclass(frozen=True)
class Kernels:
    """All that is known of a device's kernels.

    ``launch_seconds`` is what a kernel takes however little it does; ``source`` says
    how all this was found. ``traffic``: of the bytes that elementwise kernels and
    reductions of a whole step are predicted to move, how many really are (a compiler
    fuses more, or fetches ahead), as a share.
    """

    curves: tuple[Curve, ...]
    launch_seconds: float
    source: str
    traffic: float = 1.0

    def share(self, kind: str, dtype: str, size: tuple[float, ...]) -> float:
        """Share of the peak that a kernel reaches (the nearest curve that there is)."""
        curve = self._curve(kind, dtype)
        return curve.share(*size[-len(curve.axes) :]) if curve.axes else curve.shares[0]

    def _curve(self, kind: str, dtype: str) -> Curve:
        found = self._table.get((kind, dtype)) or self._table.get((kind, ""))
        if found is not None:
            return found
        others = [curve for curve in self.curves if curve.kind == kind]
        return others[0] if others else self._curve(LIKE[kind], dtype)

    @cached_property
    def _table(self) -> dict[tuple[str, str], Curve]:
        return {(curve.kind, curve.dtype): curve for curve in self.curves}
