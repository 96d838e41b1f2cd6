"""A recipe as a whole plan, with the user's pins, and the meshes it runs on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rhino_jax.errors import InfeasibleError, OptionsError
from rhino_jax.ir.analysis.loops import accumulators
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.layout import contiguous
from rhino_jax.ir.mesh import STAGE, Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.staged import Staged
from rhino_jax.search.pins import pinned
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta
from rhino_jax.search.recipes import (
    RECIPES,
    Placement,
    completed,
    place,
    recipe_named,
)
from rhino_jax.search.specs import Spec
from rhino_jax.search.staged import Scans, Uncut, fed, staged_scans
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
    placement = place(recipe, subject, mesh)
    return completion(placement, subject, mesh, pins)


def completion(
    placement: Placement, subject: Subject, mesh: Mesh, pins: Mapping[str, Spec]
) -> tuple[Placement, Assignment]:
    """``placement`` with pins in place, and the plan that it leads to.

    Following op by op can not see that the gradients of scanned layers may stay partial
    through the user's own loop over microbatches; there the search fills in.
    """
    placement, named = pinned(placement, subject, mesh, pins)
    if accumulates_stacks(subject.program):
        return placement, filled_in(placement, subject, mesh, pins)
    return placement, completed(placement, subject, mesh, named)


def accumulates_stacks(program: Program) -> bool:
    """Whether a loop adds up what loops inside it stack."""
    return any(
        op.kind == "scan"
        and any(inner.kind == "scan" for inner in op.programs[0].ops)
        and accumulators(op.programs[0], op.param["num_consts"], op.param["num_carry"])
        for op in program.ops
    )


def filled_in(
    placement: Placement,
    subject: Subject,
    mesh: Mesh,
    pins: Mapping[str, Spec],
) -> Assignment:
    """The plan that sends least of those in which the inputs lie as placed."""
    request = Request(
        mesh,
        AlphaBeta(),
        replicate_heavy=False,
        pins=pins,
        placed=dict(enumerate(placement.inputs)),
        even=True,
    )
    return search(subject, request).assignment


def plan_staged(
    subject: Subject,
    mesh: Mesh,
    placement: Placement,
    pins: Mapping[str, Spec],
    cut: Staged,
) -> Assignment:
    """A recipe whose scanned layers are pipelined: ``placement``, of one stage's
    devices, with stacked state divided among the stages.

    Raises:
        InfeasibleError: the microbatches do not fit the placement.
    """
    scans = staged_scans(subject, cut)
    assert isinstance(scans, Scans), f"asked for stages, and {scans}"
    layouts = list(placement.inputs)
    for i in subject.pairs:
        shape = subject.shape(i)
        if shape and subject.stacked.get(subject.kin.get(i, i), False):
            here = [split.axis for split in layouts[i].dims[0]]
            dim = contiguous(shape[0], (STAGE, *here), mesh)
            layouts[i] = replace(layouts[i], dims=(dim, *layouts[i].dims[1:]))
    used = {
        i: replace(x, dims=(layouts[i].dims[0], *x.dims[1:]))
        if STAGE in layouts[i].axes
        else x
        for i, x in placement.used.items()
    }
    placed = replace(placement, inputs=tuple(layouts), used=used)
    placed, named = pinned(placed, subject, mesh, pins)
    whole = completed(placed, subject, mesh, named, scans.staged)
    found = fed(scans, subject.program, whole, mesh)
    if isinstance(found, Uncut):
        raise InfeasibleError(str(found))
    return found


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
