"""A step that follows another: what both have lies as the other has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from rhino_jax.api.agreeing import group_here
from rhino_jax.errors import OptionsError
from rhino_jax.options import Options
from rhino_jax.plan import Leaf, Plan
from rhino_jax.trace import Traced

ALL = "device"
"""The axis over all devices of a pipeline."""


def following(traced: Traced, plan: Plan, parent: Options, options: Options) -> Options:
    """Options by which what ``traced`` shares with ``plan`` lies as it does there.

    Args:
        plan: what was planned for the step that is followed.
        parent: that step's options; its mesh and cluster are taken over.

    The state of a pipeline lies on several meshes: a step that follows one is planned
    by itself, on all devices, and the state is brought there call by call.

    Raises:
        OptionsError: ``plan`` is a pipeline on several processes.
    """
    if plan.stages is not None:
        if group_here(options) is not None:
            raise OptionsError(
                f"{traced.program.name} can not follow {plan.program_name}, a pipeline "
                f"of {plan.stages} on several processes. Decorate {traced.program.name}"
                f" by itself and hand it {plan.program_name}.fetch(state)"
            )
        mesh = parent.mesh
        if isinstance(mesh, jax.sharding.Mesh):
            mesh = jax.sharding.Mesh(mesh.devices.reshape(-1), (ALL,))
            options = replace(options, mesh=mesh)
        return replace(options, cluster=options.cluster or parent.cluster)
    program = traced.program
    pins: dict[str, Any] = {}
    for path, v in zip(traced.input_paths, program.inputs, strict=False):
        value = program.values[v]
        alike = [
            leaf
            for leaf in plan.inputs
            if (leaf.shape, leaf.dtype) == (value.shape, value.dtype)
        ]
        leaf = _counterpart(path, alike)
        if leaf is not None:
            pins[path] = spec_of(leaf)
    return replace(
        options,
        pins={**pins, **options.pins},
        mesh=_mesh_of(plan, parent),
        cluster=options.cluster or parent.cluster,
        recipe=options.recipe,
    )


def _mesh_of(plan: Plan, parent: Options) -> Any:
    """The mesh that the state lies on: of a pipeline, options may name one stage's."""
    one_stage = plan.assignment.staged and isinstance(parent.mesh, Mapping)
    return plan.mesh if one_stage else parent.mesh or plan.mesh


def spec_of(leaf: Leaf) -> tuple[Any, ...]:
    """The layout of a leaf as the entries of a PartitionSpec."""
    return tuple(tuple(s.axis for s in dim) or None for dim in leaf.layout.dims)


def _counterpart(path: str, leaves: Sequence[Leaf]) -> Leaf | None:
    """The leaf whose path ends most like ``path``: the first of the best.

    ``params/w`` is ``state/params/w`` rather than ``state/mu/w``.
    """
    shared = [_common_end(path.split("/"), leaf.path.split("/")) for leaf in leaves]
    if not any(shared):
        return None
    return leaves[shared.index(max(shared))]


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
