"""Logical meshes to try: factorizations of a cluster that respect its links.

An axis is a whole level of links, a part of one, or levels together. Axes are named x,
y, z from the outermost (the slowest links) in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rhino_jax.cluster.hardware import TPU
from rhino_jax.cluster.topology import Cluster
from rhino_jax.ir.mesh import Axis, Mesh

NAMES = ("x", "y", "z")
MOST_AXES = len(NAMES)
MOST_MESHES = (3, 7)
"""By optimization level."""


def candidate_meshes(cluster: Cluster, level: int) -> tuple[Mesh, ...]:
    """Meshes over all devices of ``cluster``, those most alike its links first.

    >>> from rhino_jax.cluster.parse import parse_cluster
    >>> [str(mesh) for mesh in candidate_meshes(parse_cluster("h100:2x8"), 1)]
    ['x=16', 'x=2, y=8', 'x=4, y=4']
    >>> [str(mesh) for mesh in candidate_meshes(parse_cluster("v5e:4x4"), 1)]
    ['x=4, y=4', 'x=4, y=2, z=2', 'x=2, y=2, z=4']
    """
    if cluster.num_devices == 1:
        return (Mesh(()),)
    torus = cluster.device.platform == TPU
    shapes = _torus_shapes(cluster.grid) if torus else _switched_shapes(cluster)
    kept = list(dict.fromkeys(shapes))[: MOST_MESHES[level - 1]]
    return tuple(Mesh.of(**dict(zip(NAMES, shape, strict=False))) for shape in kept)


def meshes_around(cluster: Cluster, level: int, inner: Mesh) -> tuple[Mesh, ...]:
    """Meshes over all devices that end in the axes of ``inner``, which divide them.

    >>> from rhino_jax.cluster.parse import parse_cluster
    >>> inner = Mesh.of(tensor=4)
    >>> [str(m) for m in meshes_around(parse_cluster("h100:2x8"), 1, inner)]
    ['x=4, tensor=4', 'x=2, y=2, tensor=4']
    """
    rest = cluster.num_devices // inner.num_devices
    if rest == 1:
        return (inner,)
    free = [name for name in (*NAMES, "u", "v") if name not in inner.names]
    shapes: list[tuple[int, ...]] = [(rest,)]
    if len(inner.axes) + 2 <= MOST_AXES:
        shapes += [(rest // part, part) for part in _parts(rest)]
    axes = (
        tuple(Axis(name, size) for name, size in zip(free, shape, strict=False))
        for shape in shapes[: MOST_MESHES[level - 1]]
    )
    return tuple(Mesh((*outer, *inner.axes)) for outer in axes)


def _torus_shapes(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The torus as it is; then one of its dimensions cut in two.

    A reduce-scatter over a whole torus in one axis is none on a TPU: no dimensions are
    joined.
    """
    yield tuple(grid)
    if len(grid) >= MOST_AXES:
        return
    for place in reversed(range(len(grid))):
        for part in _parts(grid[place]):
            cut = (grid[place] // part, part)
            yield (*grid[:place], *cut, *grid[place + 1 :])


def _switched_shapes(cluster: Cluster) -> Iterator[tuple[int, ...]]:
    """One axis; one a level; two axes cut elsewhere; three."""
    count = cluster.num_devices
    levels = tuple(size for _, size in cluster.levels if size > 1)
    yield (count,)
    if len(levels) > 1:
        yield (math.prod(levels[:-1]), levels[-1])
    for part in _parts(count, least=4):
        yield (count // part, part)
    for part in _parts(count):
        yield (count // part, part)
    if len(levels) > 1:
        inner = levels[-1]
        for part in _parts(inner):
            yield (count // inner, inner // part, part)


def _parts(size: int, least: int = 2) -> Iterator[int]:
    """Proper divisors of ``size`` from ``least`` on that a machine may have: up to 16.

    Prime factors only come together as powers: 24 gives 2, 3, 4, 8 and so on.
    """
    for part in (4, 2, 8, 16, 3, 6, 5, 7):
        if least <= part < size and size % part == 0:
            yield part
