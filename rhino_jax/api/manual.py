"""The mesh that a step itself names, and the plan's mesh around it.

What a user has split by hand (``shard_map``) names mesh axes; the plan's mesh must have
them, with their sizes. It may have others: there the user's part is done whole. The
axes of sharding constraints it has where it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import jax

from rhino_jax.api.where import where
from rhino_jax.errors import MeshError, OptionsError, TraceError, problems
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.lower.devices import as_mesh
from rhino_jax.options import Options
from rhino_jax.rules.manual import AXES, REFUSED, SHARD_MAP
from rhino_jax.rules.placing import CONSTRAINTS, OPEN


def manual_ops(program: Program) -> tuple[Op, ...]:
    """Every ``shard_map`` of a step, those in loops and branches too."""
    return tuple(op for _, op in program.walk() if op.kind == SHARD_MAP)


def manual_mesh(program: Program) -> Mesh | None:
    """The axes that the step's ``shard_map`` calls name together; None without any.

    Raises:
        MeshError: two of them give one axis two sizes, or a name can not be an axis.
    """
    ops = manual_ops(program)
    sizes: dict[str, int] = {}
    for op in ops:
        sizes |= _mesh_of(op).shape
    if TIME in sizes:
        raise MeshError(
            problems(
                f"an axis named {TIME!r} is that of microbatches here:",
                _written(program),
                "Give the axis of your mesh another name.",
            )
        )
    if any(sizes[axis] != size for op in ops for axis, size in op.param[AXES]):
        raise MeshError(
            problems(
                "one mesh axis has two sizes in this step:",
                _written(program),
                "Give the axes different names, or their meshes the same sizes.",
            )
        )
    return Mesh.of(**sizes) if ops else None


def _mesh_of(op: Op) -> Mesh:
    return as_mesh(dict(op.param[AXES]))


def asked_mesh(program: Program, devices: int) -> Mesh | None:
    """The axes that the plan's mesh should have: those of ``shard_map`` calls, and of
    sharding constraints where they can be had beside them on so many devices."""
    inner = manual_mesh(program)
    sizes = dict(inner.shape) if inner else {}
    for op in _constraints(program):
        more = {**sizes, **dict(op.param[AXES])}
        clash = any(more[axis] != size for axis, size in sizes.items())
        named = TIME not in more and all(map(str.isidentifier, more))
        if named and not clash and devices % math.prod(more.values()) == 0:
            sizes = more
    return Mesh.of(**sizes) if sizes else inner


def _constraints(program: Program) -> Iterator[Op]:
    """Those that name an axis."""
    for _, op in program.walk():
        if op.kind in CONSTRAINTS and {*(op.param["spec"] or ())} - {(), OPEN}:
            yield op


def around_manual(program: Program, options: Options) -> Options:
    """``options`` of a step that names mesh axes: where its mesh is that of all
    devices, that is the plan's.

    Raises:
        MeshError: the plan's mesh can not have the axes that a ``shard_map`` names.
        OptionsError: a pipeline is asked for, of a step with a ``shard_map``.
        TraceError: one holds what can not be part of one manual program.
    """
    inner = manual_mesh(program)
    if options.lowering == "manual":
        _check_held(program)
    if options.pipeline_stages is not None:
        if inner is None:
            return options
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
        if inner is not None:
            _check_inside(program, inner, mesh)
        return options
    if inner is not None and count % inner.num_devices:
        raise MeshError(
            problems(
                f"the step's shard_map is for mesh ({inner}), {inner.num_devices} "
                f"devices, and {count} devices do not divide into such meshes:",
                _written(program),
                f"Make its mesh of {count} devices, or plan for a cluster= or mesh= "
                "that has its axes.",
            )
        )
    asked = asked_mesh(program, count)
    if asked is None or asked.num_devices != count:
        return options
    return replace(options, mesh=_devices_of(program, asked, options) or asked.shape)


def _check_held(program: Program) -> None:
    wrong = [
        f"{op.where}: {what}"
        for op in manual_ops(program)
        for what in op.param[REFUSED]
    ]
    if wrong:
        raise TraceError(
            problems(
                f"{program.name} holds a shard_map that can not be part of a plan:",
                dict.fromkeys(wrong),
                'Change that, or take JAX\'s own partitioner: lowering="auto".',
            )
        )


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


def _devices_of(
    program: Program, asked: Mesh, options: Options
) -> jax.sharding.Mesh | None:
    """The user's own mesh, if it is one of all the devices attached here."""
    if options.cluster:
        return None
    for op in (*manual_ops(program), *_constraints(program)):
        params = op.source.params
        given = params.get("mesh") or next(
            (params[name].mesh for name in _SHARDINGS if name in params), None
        )
        if (
            isinstance(given, jax.sharding.Mesh)
            and as_mesh(given) == asked
            and set(given.devices.flat) == set(jax.devices())
        ):
            return given
    return None


_SHARDINGS = ("sharding", "dst_sharding")
"""Parameters of constraints."""
