"""How many bytes an array takes as a device lays it out.

A TPU stores an array in tiles of 8 x 128 elements of its two innermost dimensions
(XLA's ``T(8,128)``), with fewer rows where there are fewer (``T(4,128)``,
``T(2,128)``), and a vector in up to 1,024 elements. Which dimensions are innermost the
compiler chooses; it takes those that waste least: ``f32[3000,7]`` as an argument is
laid out ``{0,1}``, in 3072 x 8 elements. Read off programs compiled for v5e and v5p
(libtpu 0.0.42).
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable
from functools import lru_cache

from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program, itemsize

Size = Callable[[tuple[int, ...], float, "Use"], int]
"""(local shape, bytes of an element, what the array is used for) -> bytes."""


class Use(enum.Enum):
    """What decides how an array is laid out."""

    PLAIN = enum.auto()
    WINDOW = enum.auto()  # a convolution reads or writes it
    ROWS = enum.auto()  # rows of tables, as they are looked up or added to


_CARRIES_ROWS = frozenset(
    "convert_element_type concatenate reshape squeeze broadcast_in_dim".split()
)
_TAKES_ROWS = _CARRIES_ROWS | frozenset(("slice", "split"))

LANES, ROWS = 128, 8


def flat_bytes(shape: tuple[int, ...], item_bytes: float, use: Use) -> int:
    """Without any padding: GPUs and CPUs."""
    return math.ceil(math.prod(shape) * item_bytes)


@lru_cache(maxsize=100_000)
def tiled_bytes(shape: tuple[int, ...], item_bytes: float, use: Use = Use.PLAIN) -> int:
    """In a TPU's tiles, under the order of dimensions that wastes least.

    Of three dimensions and more the first, a batch, is left outside, unless a
    convolution reads or writes the array. Rows of tables stay rows, however short.

    >>> tiled_bytes((3000, 7), 4) == 3072 * 8 * 4
    True
    >>> tiled_bytes((256, 1000), 4) == 256 * 1000 * 4  # 1000 rows of 256
    True
    >>> tiled_bytes((256, 16, 196, 196), 2) == 256 * 16 * 196 * 256 * 2
    True
    >>> tiled_bytes((512, 112, 112, 64), 2, Use.WINDOW) == 512 * 112 * 112 * 64 * 2
    True
    >>> tiled_bytes((4096, 8, 8), 2, Use.ROWS) == 4096 * 8 * 128 * 2
    True
    """
    count = math.prod(shape)
    if not count:
        return 0
    first = 0 if len(shape) < 3 or use is Use.WINDOW else 1
    inner = [side for side in shape[first:] if side > 1]
    if len(inner) < 2:
        inner = [side for side in shape if side > 1]
    if len(inner) < 2:
        padded = _up(count, min(LANES * ROWS, LANES * _power(-(-count // LANES))))
        return math.ceil(padded * item_bytes)
    rows = use is Use.ROWS and shape[-1] > 1
    padded = min(
        count // (minor * second) * _up(minor, LANES) * _up(second, _power(second))
        for minor, second in itertools.permutations(inner, 2)
        if not rows or minor == shape[-1]
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
    use: Use,
) -> int:
    """Bytes of one shard as it is laid out, pads included."""
    return size(layout.local_shape(shape, mesh), itemsize(dtype), use)


def window_shapes(program: Program) -> frozenset[tuple[int, ...]]:
    """Shapes of what convolutions read and write."""
    return frozenset(
        value.shape
        for op in program.ops
        if op.kind == "conv_general_dilated"
        for value in (*program.operand_values(op), *program.result_values(op))
    )


def row_values(program: Program) -> frozenset[int]:
    """Values that are rows of tables: what was looked up, as it is gathered, and what
    is added to a table, as far back as it is cut out of something."""
    found: set[int] = set()
    sides = {v: value.shape[-1:] for v, value in enumerate(program.values)}
    for op in program.ops:
        if op.kind == "gather":
            found |= {v for v in op.results if sides[v] == sides[op.operands[0]]}
        elif op.kind in _CARRIES_ROWS:
            given = {sides[v] for v in op.operands if v in found}
            found |= {v for v in op.results if sides[v] in given}
    for op in reversed(program.ops):
        if op.kind == "scatter-add" and sides[op.operands[2]] == sides[op.operands[0]]:
            found.add(op.operands[2])
        elif op.kind in _TAKES_ROWS and not found.isdisjoint(op.results):
            taken = {sides[v] for v in op.results if v in found}
            found |= {v for v in op.operands if sides[v] in taken}
    return frozenset(found)
