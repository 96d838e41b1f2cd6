"""Random layouts, and what a layout means, read off element by element.

The oracle knows nothing of reshapes: a device holds those indices of a dimension whose
digits are its coordinates, in rising order, pads past the end included.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np

from rhino_jax.ir.layout import Layout, Split, contiguous
from rhino_jax.ir.mesh import Mesh

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 24)
SIZES_OF_AXES = ((2,), (3,), (4,), (8,), (2, 2), (2, 4), (3, 2), (2, 2, 2), (2, 3, 4))


def random_mesh(rng: random.Random, most_devices: int = 64) -> Mesh:
    """A mesh of one to three axes called x, y, z."""
    fitting = [s for s in SIZES_OF_AXES if math.prod(s) <= most_devices]
    sizes = rng.choice(fitting)
    return Mesh.of(**dict(zip("xyz", sizes, strict=False)))


def random_shape(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choice(SIZES) for _ in range(rng.randint(1, 3)))


def random_layout(
    rng: random.Random, shape: Sequence[int], mesh: Mesh, operators: Sequence[str] = ()
) -> Layout:
    """Contiguous, strided and ragged splits, and terms of one of ``operators``."""
    operator = rng.choice(operators) if operators else ""
    found = Layout.replicated(len(shape))
    for axis in rng.sample(mesh.names, len(mesh.names)):
        what = rng.choice(["whole", "split", "split", "partial"])
        if what == "partial" and operator:
            found = found.with_partial(axis, operator)
        elif what == "split" and shape:
            options = list(_splits(found, shape, axis, mesh))
            found = rng.choice(options) if options else found
    assert not found.problems(tuple(shape), mesh)
    return found


def _splits(
    layout: Layout, shape: Sequence[int], axis: str, mesh: Mesh
) -> Iterator[Layout]:
    for d, n in enumerate(shape):
        block = contiguous(n, (axis,), mesh)[0].stride
        for stride in dict.fromkeys((block, *(s for s in range(1, n) if not n % s))):
            tried = layout.with_split(d, Split(axis, stride))
            if not tried.problems(tuple(shape), mesh):
                yield tried


def coordinates(mesh: Mesh) -> list[dict[str, int]]:
    """Where every device lies: axis -> coordinate, row-major."""
    ranges = [range(axis.size) for axis in mesh.axes]
    return [dict(zip(mesh.names, at, strict=True)) for at in itertools.product(*ranges)]


def held(
    layout: Layout, shape: Sequence[int], mesh: Mesh, at: dict[str, int]
) -> list[list[int]]:
    """Per dimension the global indices that the device at ``at`` holds, in order.

    Pads have indices past the end.
    """
    found = []
    for n, dim in zip(shape, layout.dims, strict=True):
        tops = [s.stride * mesh.size(s.axis) for s in dim]
        found.append(
            [
                i
                for i in range(max([n, *tops]))
                if all(i // s.stride % mesh.size(s.axis) == at[s.axis] for s in dim)
            ]
        )
    return found


def shards(terms: np.ndarray, layout: Layout, mesh: Mesh, pad: object) -> np.ndarray:
    """[devices, *local shape]: what each device holds of a value.

    ``terms`` [devices along the partial axes (1 for none), *shape] are combined to the
    value; each device takes the one of its coordinates on those axes.
    """
    shape = terms.shape[1:]
    found = []
    for at in coordinates(mesh):
        term = 0
        for axis in layout.partial_axes:
            term = term * mesh.size(axis) + at[axis]
        indices = held(layout, shape, mesh, at)
        top = [
            max(n, *(i + 1 for i in ii)) for n, ii in zip(shape, indices, strict=True)
        ]
        padded = np.full(top, pad, terms.dtype)
        padded[tuple(slice(n) for n in shape)] = terms[term]
        found.append(padded[np.ix_(*indices)])
    return np.stack(found)


COMBINE = {
    "sum": lambda a, b: a + b,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.logical_and,
    "or": np.logical_or,
}


def recombined(
    locals_: np.ndarray, shape: tuple[int, ...], layout: Layout, mesh: Mesh
) -> list[np.ndarray]:
    """The value as each group of devices sees it, one per replica.

    Terms are combined; every element must be held by some device of each replica.
    """
    free = [a for a in mesh.names if a not in layout.axes]
    replicas: dict[tuple[int, ...], np.ndarray] = {}
    seen: dict[tuple[int, ...], np.ndarray] = {}
    for at, local in zip(coordinates(mesh), locals_, strict=True):
        who = tuple(at[a] for a in free)
        whole = replicas.setdefault(who, np.zeros(shape, local.dtype))
        count = seen.setdefault(who, np.zeros(shape, int))
        indices = held(layout, shape, mesh, at)
        inside = [
            [k for k, i in enumerate(ii) if i < n]
            for n, ii in zip(shape, indices, strict=True)
        ]
        here = np.ix_(
            *([i for i in ii if i < n] for n, ii in zip(shape, indices, strict=True))
        )
        part = local[np.ix_(*inside)]
        if layout.partial:
            combine = COMBINE[layout.partial[0][1]]
            part = np.where(count[here] > 0, combine(whole[here], part), part)
        whole[here] = part
        count[here] += 1
    terms = mesh.group_size(layout.partial_axes)
    assert all((count == terms).all() for count in seen.values()), (
        f"{layout} is no cover"
    )
    return list(replicas.values())
