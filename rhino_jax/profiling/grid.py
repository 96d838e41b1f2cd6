"""Kernels and collectives whose seconds are asked for, and their grids.

A kernel is one function on one device's arrays; many in one program run one after the
other (an ``optimization_barrier`` between them), so that launching a program hardly
counts and no cache is measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rhino_jax.cluster.hardware import CPU, CUDA, TPU
from rhino_jax.cluster.kernels import (
    BATCHED,
    COLUMNS,
    CONVOLUTION,
    ELEMENTWISE,
    GATHER,
    PRODUCT,
    REDUCTION,
    SCATTER,
)
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
)

SEED = 5
FORWARD, OF_FILTER = "", ", gradient of the filter"
"""What is computed of a convolution."""
SCOPE = "kernel_"
"""The name scope of a kernel in a program of many, before its number."""


@dataclass(frozen=True)
class Kernel:
    """One function and the shapes of its arguments.

    ``flops`` are those of its product; ``num_bytes`` what it must read and write.
    ``curve`` and ``size``: the curve that its seconds are a point of, and where.
    ``ints``: arguments that are row numbers, below the first argument's rows.
    """

    kind: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    flops: int = 0
    num_bytes: int = 0
    ints: tuple[int, ...] = ()
    curve: str = ""
    size: tuple[float, ...] = ()

    @property
    def avals(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Its arguments' shapes and types."""
        return tuple(
            jax.ShapeDtypeStruct(shape, jnp.int32 if at in self.ints else self.dtype)
            for at, shape in enumerate(self.shapes)
        )


def product(m: int, k: int, n: int, dtype: str, batch: int = 0) -> Kernel:
    """``[b, m, k] @ [b, k, n]``."""
    lead = (batch,) if batch else ()
    times, item = max(batch, 1), jnp.dtype(dtype).itemsize
    return Kernel(
        "batched product" if batch else "product",
        jnp.matmul,
        ((*lead, m, k), (*lead, k, n)),
        dtype,
        2 * times * m * k * n,
        item * times * (m * k + k * n + m * n),
        (),
        BATCHED if batch else PRODUCT,
        (*lead, m, k, n),
    )


def elementwise(kind: str, f: Any, shape: tuple[int, ...], dtype: str) -> Kernel:
    """Reads one array and writes another like it."""
    size = 2 * math.prod(shape) * jnp.dtype(dtype).itemsize
    return Kernel(kind, f, (shape,), dtype, 0, size, (), ELEMENTWISE, (size,))


def summed(shape: tuple[int, ...], dtype: str, axis: int) -> Kernel:
    """A sum of squares over one axis of a matrix.

    Of squares: the TPU's compiler prices a reduction that stands alone, and is fused
    with nothing, 1.7 times as high as those of real programs.
    """
    size = math.prod(shape) * jnp.dtype(dtype).itemsize

    def f(x: Any) -> Any:
        return (x * x).sum(axis)

    curve = COLUMNS if axis == 0 else REDUCTION
    return Kernel(f"sum over {axis}", f, (shape,), dtype, 0, size, (), curve, (size,))


def gathered(rows: int, width: int, many: int, dtype: str) -> Kernel:
    """``many`` of ``rows`` rows, read and written."""
    size = 2 * many * width * jnp.dtype(dtype).itemsize
    return Kernel(
        "gather rows",
        lambda table, at: table[at] + 1,
        ((rows, width), (many,)),
        *(dtype, 0, size, (1,), GATHER, (size,)),
    )


def scattered(width: int, many: int, dtype: str) -> Kernel:
    """``many`` rows added to as many zeros: written, then what changes read and
    written, as an embedding's gradient is."""
    size = 3 * many * width * jnp.dtype(dtype).itemsize
    return Kernel(
        "scatter-add rows",
        lambda x, at: jnp.zeros_like(x).at[at].add(x),
        ((many, width), (many,)),
        *(dtype, 0, size, (1,), SCATTER, (size,)),
    )


def convolution(
    batch: int,
    side: int,
    inside: int,
    out: int,
    window: int,
    stride: int,
    dtype: str,
    of: str = FORWARD,
) -> Kernel:
    """``[batch, side, side, inside]``, channels last, same padding.

    ``of``: the convolution, or its gradient for the filter. The size is that of the
    product that it is.
    """

    def f(x: Any, w: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=numbers
        )

    item, after = jnp.dtype(dtype).itemsize, -(-side // stride)
    x, w = (batch, side, side, inside), (window, window, inside, out)
    made = (batch, after, after, out)
    pixels, taps = batch * after**2, window**2 * inside
    forward = of == FORWARD
    return Kernel(
        f"convolution {window}x{window}/{stride}{of}",
        f if forward else _gradient(f, w),
        (x, w if forward else made),
        dtype,
        2 * pixels * taps * out,
        item * (math.prod(x) + math.prod(made)),
        (),
        CONVOLUTION,
        (pixels, taps, out) if forward else (taps, pixels, out),
    )


def pointwise(m: int, k: int, n: int, dtype: str) -> Kernel:
    """A 1 x 1 convolution that is the product ``[m, k] @ [k, n]``: of ``m`` pixels, or,
    where those that are added up are more, the gradient of a filter."""
    pixels, inside, of = (m, k, FORWARD) if m >= k else (k, m, OF_FILTER)
    side = 8 if pixels >= 64 else 4
    assert pixels % side**2 == 0, pixels
    return convolution(pixels // side**2, side, inside, n, 1, 1, dtype, of)


def _gradient(f: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., Any]:
    """Of ``f(held, x)``, linear in x of this shape, the gradient for x."""

    def run(held: Any, cotangent: Any) -> Any:
        at = jnp.zeros(shape, cotangent.dtype)
        _, back = jax.vjp(lambda x: f(held, x), at)
        return back(cotangent)[0]

    return run


def chained(kernels: Sequence[Kernel]) -> Callable[..., list[Any]]:
    """One function that runs all of them, one after the other, each in a name scope."""

    def run(sets: Sequence[Sequence[Any]]) -> list[Any]:
        outs: list[Any] = []
        for number, (kernel, arguments) in enumerate(zip(kernels, sets, strict=True)):
            if outs:
                *arguments, outs[-1] = jax.lax.optimization_barrier(
                    (*arguments, outs[-1])
                )
            with jax.named_scope(f"{SCOPE}{number}_"):
                outs.append(kernel.function(*arguments))
        return outs

    return run


# ---- the grids -----------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Sizes to ask for: sides of products, batches and sides of batched ones, bytes.

    ``rows``: of the tables of gathers and scatters; ``wire_bytes`` of collectives.
    ``convolutions``: (batch, side, inside, out, window, stride). Where there are
    ``pointwise`` sides (rows, contracted, columns), these make the curve and the
    others judge it.
    """

    dtypes: tuple[str, ...]
    sides: tuple[int, ...]
    batches: tuple[int, ...]
    batched_sides: tuple[int, ...]
    moved_bytes: tuple[int, ...]
    rows: int
    width: int
    wire_bytes: tuple[int, ...]
    convolutions: tuple[tuple[int, ...], ...]
    pointwise: tuple[tuple[int, ...], ...] = ()


_RESNET = (
    *((64, 224, 3, 64, 7, 2), (64, 56, 64, 64, 1, 1), (64, 56, 64, 64, 3, 1)),
    *((64, 56, 64, 256, 1, 1), (64, 28, 128, 128, 3, 1), (64, 14, 256, 256, 3, 1)),
    *((64, 14, 256, 1024, 1, 1), (64, 7, 512, 512, 3, 1), (8, 14, 64, 64, 3, 1)),
)
_SMALL_RESNET = (
    *((2, 32, 3, 16, 3, 1), (2, 32, 16, 16, 3, 1), (8, 32, 16, 16, 3, 1)),
    *((8, 16, 32, 32, 3, 1), (8, 16, 32, 64, 1, 1), (16, 32, 32, 32, 3, 1)),
    *((8, 8, 64, 64, 3, 1), (8, 8, 64, 256, 1, 1), (8, 8, 128, 128, 3, 2)),
)
GRIDS: Mapping[str, Grid] = {
    CUDA: Grid(
        ("bfloat16", "float32"),
        (64, 256, 1024, 4096, 16384),
        (8, 128),
        (64, 256, 1024),
        tuple(4**n for n in range(6, 15)),
        32768,
        1024,
        tuple(4**n for n in range(5, 15)),
        _RESNET,
    ),
    TPU: Grid(
        ("bfloat16",),
        (128, 512, 1024, 2048, 8192),
        (8, 64, 256),
        (64, 256, 1024),
        tuple(4**n for n in range(7, 15)),
        32768,
        1024,
        (),
        _RESNET,
    ),
    CPU: Grid(
        ("float32",),
        (16, 64, 256, 1024),
        (4, 32),
        (16, 64, 256),
        tuple(4**n for n in range(5, 13)),
        4096,
        64,
        tuple(4**n for n in range(4, 13)),
        _SMALL_RESNET,
        ((16, 128, 1024, 4096), (16, 128, 1024, 4096), (8, 64, 256)),
    ),
}


def kernels(grid: Grid) -> Iterator[Kernel]:
    """Every kernel of a grid."""
    for dtype in grid.dtypes:
        for m, k, n in itertools.product(grid.sides, repeat=3):
            yield product(m, k, n, dtype)
        for b in grid.batches:
            for m, k, n in itertools.product(grid.batched_sides, repeat=3):
                yield product(m, k, n, dtype, b)
        if grid.pointwise:
            for m, k, n in itertools.product(*grid.pointwise):
                yield pointwise(m, k, n, dtype)
        else:
            yield from _convolutions(grid, dtype)
    for num_bytes in grid.moved_bytes:
        yield from _moving(grid, num_bytes)


def _convolutions(grid: Grid, dtype: str) -> Iterator[Kernel]:
    for batch, side, inside, out, window, stride in grid.convolutions:
        yield convolution(batch, side, inside, out, window, stride, dtype)


def _moving(grid: Grid, num_bytes: int) -> Iterator[Kernel]:
    """Kernels that move about ``num_bytes``."""
    yield elementwise("copy", lambda x: x + 1, (num_bytes // 8,), "float32")
    rows = max(num_bytes // 4 // grid.width, 1)
    yield summed((rows, grid.width), "float32", 1)
    yield summed((rows, grid.width), "float32", 0)
    many = num_bytes // 8 // grid.width
    if many:
        yield gathered(grid.rows, grid.width, many, "float32")
        yield scattered(grid.width, many, "float32")


def others(grid: Grid, count: int = 12, seed: int = SEED) -> tuple[Kernel, ...]:
    """Kernels beside the grid's points, to tell how good a fit is: drawn by seed."""
    rng = np.random.default_rng(seed)

    def between(sizes: Sequence[int]) -> int:
        low, high = math.log(sizes[0]), math.log(sizes[-1])
        return max(8, round(math.exp(rng.uniform(low, high)) / 8) * 8)

    found: list[Kernel] = []
    for dtype in grid.dtypes:
        for _ in range(count):
            m, k, n = (between(grid.sides) for _ in "mkn")
            found.append(product(m, k, n, dtype))
        for _ in range(count // 2):
            m, k, n = (between(grid.batched_sides) for _ in "mkn")
            found.append(product(m, k, n, dtype, between(grid.batches)))
        if grid.pointwise:
            found.extend(_convolutions(grid, dtype))
    for _ in range(count // 3):
        found.extend(_moving(grid, between(grid.moved_bytes)))
    return tuple(found)


# ---- collectives ---------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """One collective among groups of ``count``, each device sending ``wire_bytes``
    (about: whole elements)."""

    kind: str
    count: int
    wire_bytes: int

    @property
    def elements(self) -> int:
        """float32 elements that a device holds before, a multiple of ``count``."""
        n = self.count
        whole = {
            ALL_GATHER: self.wire_bytes / (n - 1),
            ALL_REDUCE: self.wire_bytes * n / (2 * (n - 1)),
            PERMUTE: float(self.wire_bytes),
        }.get(self.kind, self.wire_bytes * n / (n - 1))
        return max(round(whole / 4 / n), 1) * n

    @property
    def sent_bytes(self) -> float:
        """What a device really sends, by the counter of the house."""
        held, n = 4.0 * self.elements, self.count
        return {
            ALL_GATHER: held * (n - 1),
            ALL_REDUCE: 2 * held * (n - 1) / n,
            PERMUTE: held,
        }.get(self.kind, held * (n - 1) / n)

    def run(self, x: Any, axis: str) -> Any:
        """Inside a ``shard_map``: ``x`` is one device's ``elements``."""
        lax, n = jax.lax, self.count
        if self.kind == ALL_GATHER:
            return lax.all_gather(x, axis, tiled=True)
        if self.kind == ALL_REDUCE:
            return lax.psum(x, axis)
        if self.kind == REDUCE_SCATTER:
            return lax.psum_scatter(x, axis, tiled=True)
        if self.kind == ALL_TO_ALL:
            return lax.all_to_all(x, axis, 0, 0, tiled=True)
        assert self.kind == PERMUTE, self.kind
        return lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


EXCHANGES = (ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, PERMUTE, REDUCE_SCATTER)


def exchanges(grid: Grid, count: int) -> tuple[Exchange, ...]:
    """Every kind and size among groups of ``count``."""
    return tuple(
        Exchange(kind, count, num_bytes)
        for kind in EXCHANGES
        for num_bytes in grid.wire_bytes
    )
