"""How many bytes an array takes as a device lays it out.

A TPU stores an array in tiles of 8 x 128 elements of its two innermost dimensions
(XLA's ``T(8,128)``), with fewer rows where there are fewer (``T(4,128)``,
``T(2,128)``), and a vector in up to 1,024 elements. Which dimensions are innermost the
compiler chooses; it takes those that waste least: ``f32[3000,7]`` as an argument is
laid out ``{0,1}``, in 3072 x 8 elements. Read off programs compiled for v5e and v5p
(libtpu 0.0.42).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program, itemsize

Size = Callable[[tuple[int, ...], float, bool], int]
"""(local shape, bytes of an element, whether a convolution's) -> bytes."""

LANES, ROWS = 128, 8


def flat_bytes(shape: tuple[int, ...], item_bytes: float, of_window: bool) -> int:
    """Without any padding: GPUs and CPUs."""
    return math.ceil(math.prod(shape) * item_bytes)


@lru_cache(maxsize=100_000)
def tiled_bytes(
    shape: tuple[int, ...], item_bytes: float, of_window: bool = False
) -> int:
    """In a TPU's tiles, under the order of dimensions that wastes least.

    Of three dimensions and more the first, a batch, is left outside, unless a
    convolution reads or writes the array (``of_window``).

    >>> tiled_bytes((3000, 7), 4) == 3072 * 8 * 4
    True
    >>> tiled_bytes((256, 1000), 4) == 256 * 1000 * 4  # 1000 rows of 256
    True
    >>> tiled_bytes((256, 16, 196, 196), 2) == 256 * 16 * 196 * 256 * 2
    True
    >>> tiled_bytes((512, 112, 112, 64), 2, True) == 512 * 112 * 112 * 64 * 2
    True
    """
    count = math.prod(shape)
    if not count:
        return 0
    first = 1 if len(shape) > 2 and not of_window else 0
    inner = [side for side in shape[first:] if side > 1]
    if len(inner) < 2:
        inner = [side for side in shape if side > 1]
    if len(inner) < 2:
        padded = _up(count, min(LANES * ROWS, LANES * _power(-(-count // LANES))))
        return math.ceil(padded * item_bytes)
    padded = min(
        count // (minor * second) * _up(minor, LANES) * _up(second, _power(second))
        for minor, second in itertools.permutations(inner, 2)
    )
    return math.ceil(padded * item_bytes)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _power(rows: int) -> int:
    """The rows of a tile that holds ``rows``: 1, 2, 4 or 8."""
    return min(ROWS, 1 << (rows - 1).bit_length())


@lru_cache(maxsize=200_000)
def stored_bytes(
    shape: tuple[int, ...],
    dtype: str,
    layout: Layout,
    mesh: Mesh,
    size: Size,
    of_window: bool,
) -> int:
    """Bytes of one shard as it is laid out, pads included."""
    return size(layout.local_shape(shape, mesh), itemsize(dtype), of_window)


def window_shapes(program: Program) -> frozenset[tuple[int, ...]]:
    """Shapes of what convolutions read and write."""
    return frozenset(
        value.shape
        for op in program.ops
        if op.kind == "conv_general_dilated"
        for value in (*program.operand_values(op), *program.result_values(op))
    )
