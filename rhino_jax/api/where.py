"""Where a step runs: the cluster, the mesh and the devices that options speak of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from rhino_jax.api.attached import attached_cluster
from rhino_jax.api.cache import folder_of
from rhino_jax.api.profiles import kept_profile, profiled
from rhino_jax.api.staging import workers_of
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster, part
from rhino_jax.errors import MeshError
from rhino_jax.ir.mesh import STAGE, Axis, Mesh
from rhino_jax.ir.staged import Staged
from rhino_jax.lower.devices import abstract_mesh, as_mesh, check_count, device_mesh
from rhino_jax.options import Options
from rhino_jax.plan import Stages


def cluster_of(options: Options) -> Cluster:
    """What a plan is priced for: the described cluster, or the attached devices; with
    the profile that prices it."""
    if options.cluster:
        return profiled(parse_cluster(options.cluster), options.profile)
    given, folder = options.mesh, folder_of(options)
    devices = jax.devices()
    if isinstance(given, jax.sharding.Mesh):
        devices = list(given.devices.flat)
    cluster = attached_cluster(devices, folder)
    if options.profile:
        return profiled(cluster, options.profile)
    return kept_profile(cluster, devices, folder)


def platform_of(options: Options) -> str:
    if options.cluster:
        return parse_cluster(options.cluster).device.platform
    given = options.mesh
    if isinstance(given, jax.sharding.Mesh):
        return str(given.devices.flat[0].platform)
    return jax.default_backend()


def where(
    options: Options, stages: Stages | None = None
) -> tuple[Any, Mesh | None, int]:
    """The user's JAX mesh if one was given, the mesh if fixed, the device count.

    Of a pipeline (``stages``: of a plan that there is) the mesh of one worker.
    """
    given = options.mesh
    mesh = None if given is None else as_mesh(given)
    workers = stages.num_workers if stages else workers_of(options)
    jax_mesh = None
    if options.cluster:
        count = parse_cluster(options.cluster).num_devices
        what = options.cluster
    elif isinstance(given, jax.sharding.Mesh):
        jax_mesh, count, what = given, given.size, "the mesh"
    else:
        count, what = len(jax.devices()), f"this machine ({jax.devices()[0].platform})"
    if stages is None and options.stages is None:
        if mesh is not None and jax_mesh is None:
            check_count(mesh, count, what)
        return jax_mesh, mesh, count
    if count % workers:
        raise MeshError(
            f"{workers} pipeline stages side by side do not divide the {count} devices "
            f"of {what}; ask for a number that does, or for other devices by mesh="
        )
    if mesh is not None:
        mesh = _of_worker(mesh, workers, jax_mesh is not None)
        check_count(mesh, count // workers, f"each of {workers} shares of {what}")
    return jax_mesh, mesh, count if stages else count // workers


def in_one_program(options: Options, cut: Staged) -> Options:
    """``options`` of a pipeline, for the program that it is: its mesh with the axis of
    the stages, and a batch that is divided inside the loops.

    Raises:
        MeshError: the mesh or the devices can not be divided so.
    """
    jax_mesh, mesh, _ = where(options)
    whole: Any = jax_mesh
    if mesh is not None and jax_mesh is None:
        whole = with_stages(mesh, cut).shape
    return replace(options, pipeline_stages=None, microbatches=None, mesh=whole)


def with_stages(mesh: Mesh, cut: Staged) -> Mesh:
    """The mesh of one stage's devices, with a leading axis over the stages."""
    return Mesh((Axis(STAGE, cut.stages), *mesh.axes))


def _of_worker(mesh: Mesh, workers: int, whole: bool) -> Mesh:
    """The mesh of one pipeline worker, of one that may have a leading stage axis.

    Raises:
        MeshError: it has another size than there are workers, or must be there.
    """
    if mesh.names[:1] != (STAGE,):
        if whole:
            raise MeshError(
                f"mesh ({mesh}): the leading axis of a pipeline's jax.sharding.Mesh "
                f'is named "{STAGE}" and has {workers} places'
            )
        return mesh
    if mesh.size(STAGE) != workers:
        raise MeshError(
            f"mesh ({mesh}): the axis {STAGE!r} has {mesh.size(STAGE)} places, and "
            f"{workers} stages run side by side; make it {workers}"
        )
    return Mesh(mesh.axes[1:])


def laid(jax_mesh: Any, mesh: Mesh, options: Options) -> Any:
    if not mesh.axes:
        return None
    if options.cluster:
        return abstract_mesh(mesh)
    if jax_mesh is not None:
        return jax.sharding.Mesh(jax_mesh.devices, jax_mesh.axis_names)
    return device_mesh(mesh)


def grid_of(options: Options, count: int) -> tuple[int, ...]:
    """How the devices of one share are linked: a TPU's torus, or all in a row."""
    if options.cluster:
        return part(parse_cluster(options.cluster), workers_of(options)).grid
    return (count,)
