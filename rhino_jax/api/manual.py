"""The mesh that a step's own ``shard_map`` names, and the plan's mesh around it.

What a user has split by hand names mesh axes; the plan's mesh must have them, with
their sizes. It may have others: there the user's part is done whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax

from rhino_jax.api.where import where
from rhino_jax.errors import MeshError, OptionsError, problems
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.options import Options
from rhino_jax.rules.manual import AXES, SHARD_MAP


def manual_ops(program: Program) -> tuple[Op, ...]:
    """Every ``shard_map`` of a step, those in loops and branches too."""
    return tuple(op for _, op in program.walk() if op.kind == SHARD_MAP)


def manual_mesh(program: Program) -> Mesh | None:
    """The axes that the step's ``shard_map`` calls name together; None without any.

    Raises:
        MeshError: two of them give one axis two sizes.
    """
    ops = manual_ops(program)
    sizes: dict[str, int] = {}
    for op in ops:
        sizes |= dict(op.param[AXES])
    clashes = {
        f"{op.where}: shard_map over mesh ({_mesh_of(op)})"
        for op in ops
        if any(sizes[axis] != size for axis, size in op.param[AXES])
    }
    if clashes:
        every = sorted(clashes | {f"another over mesh ({Mesh.of(**sizes)})"})
        raise MeshError(
            problems(
                "one mesh axis has two sizes in this step:",
                every,
                "Give the axes different names, or their meshes the same sizes.",
            )
        )
    return Mesh.of(**sizes) if ops else None


def _mesh_of(op: Op) -> Mesh:
    return Mesh.of(**dict(op.param[AXES]))


def around_manual(program: Program, options: Options) -> Options:
    """``options`` of a step that has a ``shard_map``: where its mesh is that of all
    devices, that is the plan's.

    Raises:
        MeshError: the plan's mesh can not have the axes that it names.
        OptionsError: a pipeline is asked for.
    """
    inner = manual_mesh(program)
    if inner is None or options.lowering == "auto":
        return options
    if options.pipeline_stages is not None:
        raise OptionsError(
            problems(
                f"{program.name} can not be cut in pipeline stages:",
                _written(program),
                "A shard_map is written for all devices of its mesh at once. Write "
                "that part as for one device, or drop pipeline_stages.",
            )
        )
    _, mesh, count = where(options)
    if mesh is not None:
        _check_inside(program, inner, mesh)
        return options
    if count % inner.num_devices:
        raise MeshError(
            problems(
                f"the step's shard_map is for mesh ({inner}), {inner.num_devices} "
                f"devices, and {count} devices do not divide into such meshes:",
                _written(program),
                f"Make its mesh of {count} devices, or plan for a cluster= or mesh= "
                "that has its axes.",
            )
        )
    if count > inner.num_devices:
        return options
    return replace(options, mesh=_devices_of(program, options) or inner.shape)


def _written(program: Program) -> Iterator[str]:
    yield from dict.fromkeys(
        f"{op.where}: shard_map over mesh ({_mesh_of(op)})"
        for op in manual_ops(program)
    )


def _check_inside(program: Program, inner: Mesh, mesh: Mesh) -> None:
    have: Mapping[str, int] = mesh.shape
    if any(have.get(axis.name) != axis.size for axis in inner.axes):
        raise MeshError(
            problems(
                f"the step's shard_map is for mesh ({inner}), the plan's is ({mesh}):",
                _written(program),
                "Give mesh= the same axes and sizes (it may have others beside them), "
                "or drop mesh=.",
            )
        )


def _devices_of(program: Program, options: Options) -> jax.sharding.Mesh | None:
    """The user's own mesh, if it is one of all the devices attached here."""
    if options.cluster:
        return None
    for op in manual_ops(program):
        given: Any = op.source.params["mesh"]
        if isinstance(given, jax.sharding.Mesh) and set(given.devices.flat) == set(
            jax.devices()
        ):
            return given
    return None
