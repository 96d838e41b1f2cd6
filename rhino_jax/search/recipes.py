"""The expert plans everyone knows, as ordinary plans.

A recipe places the inputs of a step: the batch over data axes, parameters and
optimizer state whole, sharded over the data axes (ZeRO), split for tensor parallelism
(Megatron) or by expert. :mod:`rhino_jax.search.complete` writes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rhino_jax.errors import OptionsError, nearest, problems
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.layout import Layout, contiguous, sorted_dim
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.ir.staged import Staged
from rhino_jax.search.complete import Request, complete
from rhino_jax.search.state import Marks
from rhino_jax.search.subject import Subject


@dataclass(frozen=True)
class Recipe:
    """Which parts of the state are sharded, and over which axes.

    ``tensor``: the last axis of the mesh is a tensor axis; otherwise every axis
    carries data. ``parameters`` and ``slots``: these are sharded over the data axes.
    ``expert``: weights with an expert dimension are split by it over the data axes.
    ``least_axes``: how many axes of more than one device it needs.
    """

    tensor: bool = False
    parameters: bool = False
    slots: bool = False
    expert: bool = False
    least_axes: int = 0


RECIPES: Mapping[str, Recipe] = {
    "data_parallel": Recipe(),
    "zero1": Recipe(slots=True),
    "zero3": Recipe(slots=True, parameters=True),
    "megatron": Recipe(tensor=True),
    "zero3 x megatron": Recipe(tensor=True, slots=True, parameters=True, least_axes=2),
    "expert": Recipe(expert=True),
}


TILE = 8 * 128
"""Elements: a TPU compiler scatters whole tiles, more than one, or it all-reduces."""


@dataclass(frozen=True)
class Placement:
    """The layouts of a step's inputs, and the roles of the axes.

    ``found``: the recipe found what it is for (weights to split, experts). ``used``
    are parameters computed with in another layout than they are stored in.
    """

    inputs: tuple[Layout, ...]
    data_axes: tuple[str, ...]
    keep: Mapping[int, frozenset[str]]
    found: bool = True
    used: Mapping[int, Layout] = field(default_factory=dict)


def recipe_named(name: str) -> Recipe:
    """The recipe called ``name``. Raises :class:`OptionsError` for an unknown one."""
    if name not in RECIPES:
        near = nearest(name, RECIPES) or list(RECIPES)
        raise OptionsError(problems(f"unknown recipe {name!r}; did you mean:", near))
    return RECIPES[name]


def applies(recipe: Recipe, subject: Subject, mesh: Mesh) -> bool:
    """Whether ``recipe`` has something to do on this step and mesh."""
    wide = [axis for axis in mesh.axes if axis.size > 1]
    if len(wide) < recipe.least_axes or not subject.parameters:
        return False
    return place(recipe, subject, mesh).found


def place(recipe: Recipe, subject: Subject, mesh: Mesh) -> Placement:
    """Layouts for every input of ``subject`` as ``recipe`` would have them."""
    data, tensor = _roles(recipe, mesh)
    layouts = {
        i: Layout.replicated(len(subject.program.values[v].shape))
        for i, v in enumerate(subject.program.inputs)
    }
    for i in subject.batch_inputs:
        layouts[i] = _batch_layout(subject, i, data, mesh)
    keep: dict[int, frozenset[str]] = {}
    found = True
    if tensor or recipe.expert:
        asked = frozenset((tensor,)) if tensor else frozenset(data)
        wishes = _discovered(subject, mesh, layouts, data, asked, recipe.expert)
        for i, wish in wishes.items():
            layouts[i] = _storable(wish, subject, i, mesh)
        keep = {i: asked for i in wishes if layouts[i] == wishes[i]}
        found = bool(wishes)
    else:
        wishes = {}
    for i in subject.pairs:
        leader = subject.kin[i]
        is_parameter = i in subject.parameters
        layouts[i] = layouts[leader] if leader in subject.parameters else layouts[i]
        keep[i] = keep.get(leader, frozenset())
    for i in subject.pairs:
        is_parameter = i in subject.parameters
        wanted = recipe.parameters if is_parameter else recipe.slots
        if wanted:
            leader = subject.kin[i]
            dims = wishes[leader].dims if leader in wishes else ()
            avoid = [d for d, dim in enumerate(dims) if dim]
            layouts[i] = _zero(subject, i, layouts[i], data, mesh, avoid)
    inputs = tuple(layouts[i] for i in range(len(subject.program.inputs)))
    used = {
        i: replace(
            wish,
            dims=tuple(
                sorted_dim((*mine, *(s for s in dim if s.axis not in wish.axes)))
                for mine, dim in zip(wish.dims, inputs[i].dims, strict=True)
            ),
        )
        for i, wish in wishes.items()
    }
    used = {
        i: layout
        for i, layout in used.items()
        if layout != inputs[i]
        and inputs[i].axes
        and wishes[i].axes
        and not layout.problems(subject.shape(i), mesh)
    }
    return Placement(inputs, data, keep, found, used)


def completed(
    placement: Placement,
    subject: Subject,
    mesh: Mesh,
    named: Mapping[str, tuple[tuple[str, ...], ...]] | None = None,
    staged: Mapping[int, Staged] = MappingProxyType({}),
) -> Assignment:
    """The complete plan that a placement leads to.

    The next state lies as the state does. Other outputs come as they fall, if JAX can
    store them so, else whole.
    """
    request = _request(subject, mesh, placement, named or {})
    request = replace(request, staged=staged)
    done = complete(subject.program, request).assignment
    outputs = tuple(
        goal if goal is not None or _stored(found, subject, o, mesh) else found.only("")
        for o, (goal, found) in enumerate(
            zip(request.outputs, done.outputs, strict=True)
        )
    )
    if outputs == request.outputs:
        return done
    return complete(subject.program, replace(request, outputs=outputs)).assignment


def _stored(layout: Layout, subject: Subject, output: int, mesh: Mesh) -> bool:
    """Whether JAX can hold an output in this layout: contiguous and even."""
    shape = subject.program.values[subject.program.outputs[output]].shape
    return all(
        contiguous(n, [s.axis for s in dim], mesh) == dim
        and n % mesh.group_size(tuple(s.axis for s in dim)) == 0
        for n, dim in zip(shape, layout.dims, strict=True)
    )


def _request(
    subject: Subject,
    mesh: Mesh,
    placement: Placement,
    named: Mapping[str, tuple[tuple[str, ...], ...]],
) -> Request:
    program = subject.program
    outputs: list[Layout | None] = [
        None if program.values[v].shape else Layout(()) for v in program.outputs
    ]
    for i, o in subject.state_pairs:
        outputs[o] = placement.inputs[i]
    batch = set(subject.batch_inputs)
    marks = tuple(
        Marks(batch=i in batch, keep=placement.keep.get(i, frozenset()))
        for i in range(len(program.inputs))
    )
    return Request(
        mesh,
        placement.data_axes,
        placement.inputs,
        tuple(outputs),
        marks,
        named=named,
        used=placement.used,
    )


def _roles(recipe: Recipe, mesh: Mesh) -> tuple[tuple[str, ...], str]:
    """The data axes, and the tensor axis ("" for none)."""
    if not recipe.tensor or not mesh.axes:
        return mesh.names, ""
    return mesh.names[:-1], mesh.names[-1]


def _batch_layout(
    subject: Subject, i: int, data: tuple[str, ...], mesh: Mesh
) -> Layout:
    """The leading dimension over as many data axes as divide it."""
    shape = subject.shape(i)
    whole = Layout.replicated(len(shape))
    if not shape or shape[0] != subject.batch_size:
        return whole
    axes = data
    while axes and shape[0] % mesh.group_size(axes):
        axes = axes[1:]
    return replace(whole, dims=(contiguous(shape[0], axes, mesh), *whole.dims[1:]))


def _discovered(
    subject: Subject,
    mesh: Mesh,
    layouts: Mapping[int, Layout],
    data: tuple[str, ...],
    asked: frozenset[str],
    expert: bool,
) -> Mapping[int, Layout]:
    """The layouts that the parameters' first heavy readers wish on ``asked``."""
    program = subject.program
    parameters, batch = set(subject.parameters), set(subject.batch_inputs)
    marks = tuple(
        Marks(batch=i in batch, open=asked if i in parameters else frozenset())
        for i in range(len(program.inputs))
    )
    request = Request(
        mesh,
        data,
        tuple(layouts[i] for i in range(len(program.inputs))),
        (None,) * len(program.outputs),
        marks,
        expert_axes=asked if expert else frozenset(),
    )
    return complete(program, request).wishes


def _storable(wish: Layout, subject: Subject, i: int, mesh: Mesh) -> Layout:
    """``wish``, or a contiguous layout near it: inputs are stored in blocks.

    A strided wish is stored split along another dimension, one all-to-all away.
    """
    shape = subject.shape(i)
    whole = Layout.replicated(len(shape))
    result = whole
    for d, dim in enumerate(wish.dims):
        axes = tuple(s.axis for s in dim)
        if not axes:
            continue
        if contiguous(shape[d], axes, mesh) == dim:
            result = replace(
                result, dims=(*result.dims[:d], dim, *result.dims[d + 1 :])
            )
            continue
        others = [
            e
            for e in _free_dims(subject, i, result)
            if e != d and not wish.dims[e] and not shape[e] % mesh.group_size(axes)
        ]
        if others:
            result = _with_dim(result, others[0], shape, axes, mesh)
    return result


def _with_dim(
    layout: Layout, d: int, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh
) -> Layout:
    dims = list(layout.dims)
    dims[d] = contiguous(shape[d], (*(s.axis for s in dims[d]), *axes), mesh)
    return replace(layout, dims=tuple(dims))


def _free_dims(subject: Subject, i: int, layout: Layout) -> list[int]:
    """Dimensions that may be sharded: not the layer dimension of a scan."""
    first = 1 if subject.stacked.get(subject.kin.get(i, i), False) else 0
    return list(range(first, layout.rank))


def _zero(
    subject: Subject,
    i: int,
    layout: Layout,
    data: tuple[str, ...],
    mesh: Mesh,
    avoid: Sequence[int] = (),
) -> Layout:
    """``layout`` sharded over the data axes too, if a matrix divides by them.

    Dimensions to ``avoid`` (those that a strided use splits) come last. Vectors stay
    whole: their bytes are few, and a gather of them is a collective of its own.
    """
    shape = subject.shape(i)
    dims = _free_dims(subject, i, layout)
    axes = tuple(a for a in data if a not in layout.axes)
    if len(dims) < 2 or not axes:
        return layout
    group = mesh.group_size(axes)
    local = layout.local_shape(shape, mesh)
    torus = all(axis.link == TORUS for axis in mesh.axes if axis.name in axes)
    shard = math.prod(local) // group
    if torus and (shard <= TILE or shard % TILE):
        return layout
    for d in sorted(dims, key=lambda d: (d in avoid, bool(layout.dims[d]), d)):
        if local[d] % group == 0:
            return _with_dim(layout, d, shape, axes, mesh)
    return layout
