"""A recipe as a whole plan, with the user's pins, and the meshes it runs on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rhino_jax.errors import OptionsError
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search.pins import Spec, pinned
from rhino_jax.search.recipes import (
    RECIPES,
    Placement,
    completed,
    place,
    recipe_named,
)
from rhino_jax.search.subject import Subject


def plan_recipe(
    subject: Subject, mesh: Mesh, name: str, pins: Mapping[str, Spec]
) -> tuple[Placement, Assignment]:
    """The recipe called ``name``, with pins, as a complete plan.

    Raises:
        OptionsError: no such recipe, or it needs more axes than the mesh has.
        PinError: pins that do not fit.
    """
    recipe = recipe_named(name)
    wide = [axis for axis in mesh.axes if axis.size > 1]
    if len(wide) < recipe.least_axes:
        raise OptionsError(
            f"recipe {name!r} needs {recipe.least_axes} mesh axes of more than one "
            f"device, the mesh ({mesh}) has {len(wide)}; pass e.g. "
            'mesh={"data": 2, "tensor": 4}'
        )
    placement, named = pinned(place(recipe, subject, mesh), subject, mesh, pins)
    return placement, completed(placement, subject, mesh, named)


def default_meshes(recipe: str, grid: tuple[int, ...]) -> tuple[Mesh, ...]:
    """Meshes to try for a recipe where the user names none.

    A torus keeps its own dimensions (a reduce-scatter over all of it in one axis is
    none on a TPU); a plain row of devices is split in data and tensor where asked.

    >>> [str(mesh) for mesh in default_meshes("megatron", (8,))]
    ['data=4, tensor=2', 'data=2, tensor=4']
    >>> str(default_meshes("zero3", (4, 4))[0])
    'data0=4, data1=4'
    """
    if math.prod(grid) == 1:
        return (Mesh(()),)
    tensor = RECIPES[recipe].tensor
    if len(grid) > 1:
        names = [f"data{i}" for i in range(len(grid))]
        if tensor:
            names[-1] = "tensor"
        return (Mesh.of(**dict(zip(names, grid, strict=True))),)
    (count,) = grid
    if not tensor:
        return (Mesh.of(data=count),)
    widths = [n for n in (2, 4, 8) if count % n == 0 and count > n]
    return tuple(Mesh.of(data=count // n, tensor=n) for n in widths) or (
        Mesh.of(data=1, tensor=count),
    )
