"""Logical meshes laid over devices, real or described."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from rhino_jax.errors import MeshError
from rhino_jax.ir.mesh import Mesh


def device_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A ``jax.sharding.Mesh`` of ``mesh`` over ``devices`` (default: all of them).

    JAX orders the devices by their physical links.

    Raises:
        MeshError: the mesh wants another number of devices than there are.
    """
    found = list(jax.devices() if devices is None else devices)
    if mesh.num_devices != len(found):
        raise MeshError(
            f"mesh ({mesh}) wants {mesh.num_devices} devices, there are {len(found)} "
            f"({found[0].device_kind}); sizes must multiply to {len(found)}"
        )
    return jax.make_mesh(
        tuple(axis.size for axis in mesh.axes),
        mesh.names,
        devices=found,
        axis_types=(AxisType.Auto,) * len(mesh.axes),
    )


def abstract_mesh(mesh: Mesh) -> AbstractMesh:
    """The same without devices: enough to lower for hardware that is not here."""
    return AbstractMesh(
        tuple(axis.size for axis in mesh.axes),
        mesh.names,
        axis_types=(AxisType.Auto,) * len(mesh.axes),
    )


def as_mesh(given: Any) -> Mesh:
    """A Mesh of ours from a mapping of sizes, a JAX mesh, or one of ours.

    Raises:
        MeshError: it is none of these, or a size is no positive integer.

    >>> str(as_mesh({"data": 2, "tensor": 4}))
    'data=2, tensor=4'
    """
    if isinstance(given, Mesh):
        return given
    sizes = given.shape if hasattr(given, "axis_names") else given
    if not isinstance(sizes, Mapping):
        raise MeshError(
            f"mesh={given!r}: pass a mapping of axis names to sizes, such as "
            '{"data": 2, "tensor": 4}, or a jax.sharding.Mesh'
        )
    wrong = [
        f"{name!r}: {size!r}"
        for name, size in sizes.items()
        if not (isinstance(name, str) and name.isidentifier())
        or not isinstance(size, int)
        or size < 1
    ]
    if wrong:
        raise MeshError(
            f"mesh axes need a name and a positive size; not so: {', '.join(wrong)}"
        )
    return Mesh.of(**sizes)


def check_count(mesh: Mesh, count: int, what: str) -> None:
    """Raises :class:`MeshError` unless ``mesh`` has exactly ``count`` devices."""
    if math.prod(axis.size for axis in mesh.axes) != count:
        raise MeshError(
            f"mesh ({mesh}) is for {mesh.num_devices} devices, {what} has {count}; "
            f"sizes must multiply to {count}"
        )
