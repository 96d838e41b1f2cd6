"""The best of the recipes: the one whose plan sends the fewest bytes.

This stands in for the search: no price but bytes, no memory limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rhino_jax.errors import OptionsError
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.plan import collectives
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


def best_recipe(
    subject: Subject,
    mesh: Mesh | None,
    num_devices: int,
    pins: Mapping[str, Spec],
    link: str = "",
) -> tuple[str, Mesh, Assignment]:
    """Of all recipes (and meshes, where none is given) the plan that sends least."""
    best: tuple[int, int] | None = None
    answer: tuple[str, Mesh, Assignment] | None = None
    for rank, (name, shape) in enumerate(_candidates(mesh, num_devices)):
        tried = shape.linked(link)
        recipe = RECIPES[name]
        if len([a for a in tried.axes if a.size > 1]) < recipe.least_axes:
            continue
        placement = place(recipe, subject, tried)
        if not placement.found:
            continue
        placement, named = pinned(placement, subject, tried, pins)
        assignment = completed(placement, subject, tried, named)
        sent = sum(c.total_bytes for c in collectives(subject.program, assignment))
        if best is None or (sent, rank) < best:
            best, answer = (sent, rank), (name, tried, assignment)
    assert answer is not None, "data parallelism always applies"
    return answer


def _candidates(mesh: Mesh | None, num_devices: int) -> Iterator[tuple[str, Mesh]]:
    for name, recipe in RECIPES.items():
        if mesh is not None:
            yield name, mesh
        elif num_devices == 1:
            yield name, Mesh(())
            return
        elif recipe.tensor:
            for tensor in (2, 4, 8):
                if num_devices % tensor == 0 and num_devices > tensor:
                    yield name, Mesh.of(data=num_devices // tensor, tensor=tensor)
        else:
            yield name, Mesh.of(data=num_devices)
