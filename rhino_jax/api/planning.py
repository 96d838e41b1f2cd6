"""From a traced step and options to a Planned: search, recipe, or a saved plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.api.attached import attached_cluster, more_memory
from rhino_jax.api.cache import folder_of, key_of, read_plan, write_plan
from rhino_jax.api.planned import Planned, subject_of
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import (
    InfeasibleError,
    MeshError,
    OptionsError,
    PinError,
    TraceError,
    problems,
)
from rhino_jax.extend import as_rules, registered
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.spans import EVERY, numbers, spans
from rhino_jax.lower.devices import abstract_mesh, as_mesh, check_count, device_mesh
from rhino_jax.options import Options
from rhino_jax.plan import Plan, Predicted, make_plan
from rhino_jax.search.auto import Candidate, Wish, plan_search
from rhino_jax.search.choose import default_meshes, plan_recipe
from rhino_jax.search.meshes import candidate_meshes
from rhino_jax.search.microbatch import microbatched
from rhino_jax.search.notes import plan_notes
from rhino_jax.search.recipes import recipe_named
from rhino_jax.search.remat import NONE, apply_remat
from rhino_jax.search.specs import Spec
from rhino_jax.search.timing import Refusal
from rhino_jax.trace import Traced, trace
from rhino_jax.trace.arguments import leaves_of
from rhino_jax.verify.targets import parse_target

MARGIN = 0.92
"""Share of a device's memory that a plan may be predicted to need."""


def make_planned(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
) -> Planned:
    """Trace ``fun`` and plan it."""
    return plan_traced(traced_bare(fun, args, kwargs, options), options)


def traced_bare(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
) -> Traced:
    """``fun`` traced on shapes: where the arguments lie now must not matter."""
    bare = {name: _bare(tree) for name, tree in kwargs.items()}
    return trace(
        fun,
        [_bare(a) for a in args],
        bare,
        options.static_argnums,
        options.donate,
        {**registered(), **as_rules(options.rules)},
    )


def _bare(tree: Any) -> Any:
    """Arrays as shapes. An argument without any, maybe static, stays what it is."""
    if not any(isinstance(leaf, jax.Array) for _, leaf in leaves_of(tree)):
        return tree
    return jax.tree.map(_shape, tree)


def _shape(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    weak = bool(getattr(x, "weak_type", False))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=weak)


def plan_traced(traced: Traced, options: Options) -> Planned:
    """The plan of a traced step: searched, or by a recipe where one is asked for.

    Raises:
        MeshError, ClusterError, PinError, OptionsError, InfeasibleError: what was
            asked for can not be.
    """
    _check_lowering(traced, options)
    if options.recipe:
        return _by_recipe(traced, options)
    _where(options)  # what is wrong with a mesh is said before anything is looked up
    cluster, folder = cluster_of(options), folder_of(options)
    if folder is None:
        return _by_search(traced, options, cluster)
    key = key_of(traced, cluster, options)
    kept = read_plan(folder, key)
    if kept is not None:
        return replace(bind(kept, traced, options), cluster=cluster)
    found = _by_search(traced, options, cluster)
    write_plan(folder, key, found.plan)
    return found


def _check_lowering(traced: Traced, options: Options) -> None:
    """Raises :class:`TraceError` for what the manual program can not hold."""
    inside = [op for _, op in traced.program.walk() if op.kind == "shard_map"]
    if inside and options.lowering == "manual":
        raise TraceError(
            problems(
                f"{traced.program.name} holds a shard_map, and the plan is one itself:",
                [f"{op.where}: shard_map" for op in inside],
                "Write that part as for one device, and it is sharded with the rest; "
                'or keep it, and take lowering="auto" with its mesh as mesh=.',
            )
        )


def _by_search(traced: Traced, options: Options, cluster: Cluster) -> Planned:
    subject = subject_of(traced)
    jax_mesh, mesh, _ = _where(options)
    limit = options.memory_limit_bytes or int(cluster.device.memory_bytes * MARGIN)
    level = options.optimization_level
    found = plan_search(
        subject,
        Wish(
            cluster,
            (mesh,) if mesh is not None else candidate_meshes(cluster, level),
            limit,
            level,
            options.microbatches or 0,
            options.remat or "",
            _specs(options.pins),
            traced.donated,
            "" if options.memory_limit_bytes else more_memory(cluster),
        ),
    )
    best: Candidate = found.best
    planned = _planned(
        replace(traced, program=best.subject.program),
        best.assignment,
        best.mesh,
        options,
        jax_mesh,
        remat=_policies(best.remat, best.segments),
        microbatches=best.microbatches,
        predicted=_predicted(best, limit),
        notes=found.notes,
        cluster=cluster,
    )
    return replace(planned, cluster=cluster)


def _predicted(best: Candidate, limit_bytes: int) -> Predicted:
    one = best.prediction
    return Predicted(
        one.step_seconds,
        one.compute_seconds,
        one.comm_seconds,
        one.peak_bytes,
        limit_bytes,
        one.flops,
        best.byte_seconds,
    )


def _by_recipe(traced: Traced, options: Options) -> Planned:
    """The recipe's plan, microbatches and remat as asked for."""
    recipe = options.recipe
    recipe_named(recipe)
    jax_mesh, mesh, count = _where(options)
    if mesh is None:
        mesh = default_meshes(recipe, _grid(options, count))[-1]
    mesh = mesh.linked(TORUS if _platform(options) == "tpu" else "")
    remat = options.remat or NONE
    traced = rewritten(traced, remat)
    subject = subject_of(traced)
    placement, assignment = plan_recipe(subject, mesh, recipe, _specs(options.pins))
    if mesh.num_devices > 1 and not placement.found:
        raise OptionsError(
            f"recipe {recipe!r} needs weights that it could split on mesh ({mesh})"
            f", and {traced.program.name} has none; use another recipe, such as "
            "'zero3', or leave it out to search"
        )
    batches = options.microbatches or 1
    if batches > 1:
        timed = microbatched(subject, assignment, mesh, batches)
        if isinstance(timed, Refusal):
            raise InfeasibleError(
                problems(f"{batches} microbatches can not be:", timed.reasons)
            )
        assignment = timed[0]
    return _planned(
        traced,
        assignment,
        mesh,
        options,
        jax_mesh,
        recipe=recipe,
        remat=_policies(remat),
        microbatches=batches,
    )


def _planned(
    traced: Traced,
    assignment: Assignment,
    mesh: Mesh,
    options: Options,
    jax_mesh: Any,
    remat: tuple[tuple[str, str], ...] = (),
    notes: Sequence[str] = (),
    cluster: Cluster | None = None,
    **more: Any,
) -> Planned:
    plan = make_plan(
        traced.program,
        assignment,
        mesh,
        traced.input_paths,
        traced.output_paths,
        lowering=options.lowering,
        cluster=options.cluster,
        remat=remat,
        made_with=(("jax", jax.__version__),),
        **more,
    )
    predicted = plan.predicted
    said = plan_notes(
        traced.program,
        assignment,
        mesh,
        cluster,
        predicted.step_seconds if predicted and cluster else 0.0,
    )
    plan = replace(plan, notes=(*said, *notes))
    return Planned(plan, traced, _laid(jax_mesh, mesh, options))


def _policies(
    remat: str, segments: Sequence[int] | None = None
) -> tuple[tuple[str, str], ...]:
    """A plan's remat policies: which segments, and the policy.

    >>> _policies("boundary", (0, 1, 2, 5)), _policies("boundary"), _policies("none")
    ((('0-2,5', 'boundary'),), (('*', 'boundary'),), ())
    """
    if remat == NONE:
        return ()
    return ((EVERY if segments is None else spans(segments), remat),)


def rewritten(traced: Traced, remat: str, segments: str = EVERY) -> Traced:
    """``traced`` with its Program under a remat policy."""
    subject = subject_of(traced)
    program: Program = apply_remat(
        traced.program,
        subject.pairs,
        subject.batch_inputs,
        remat,
        None if segments == EVERY else numbers(segments),
    )
    return replace(traced, program=program)


def cluster_of(options: Options) -> Cluster:
    """What a plan is priced for: the described cluster, or the attached devices."""
    if options.cluster:
        return parse_cluster(options.cluster)
    given = options.mesh
    if isinstance(given, jax.sharding.Mesh):
        return attached_cluster(list(given.devices.flat), folder_of(options))
    return attached_cluster(jax.devices(), folder_of(options))


def bind(plan: Plan, traced: Traced, options: Options) -> Planned:
    """A plan from a file bound to a traced step.

    Raises:
        PlanFileError: it is another program's plan.
        MeshError: its mesh is not that of the options, the devices or the cluster.
    """
    for segments, policy in plan.remat:
        traced = rewritten(traced, policy, segments)
    plan.fits(traced.program)
    jax_mesh, mesh, count = _where(options)
    if mesh is not None and mesh.shape != plan.mesh.shape:
        raise MeshError(
            f"the plan is for mesh ({plan.mesh}), mesh=({mesh}) is asked for; drop "
            "mesh=, or plan again without the saved plan"
        )
    cluster = options.cluster or plan.cluster
    what = options.cluster or f"this machine ({jax.default_backend()})"
    if plan.mesh.num_devices != count and (options.cluster or not cluster):
        raise MeshError(
            f"the plan is for {plan.mesh.num_devices} devices, mesh ({plan.mesh}), "
            f"{what} has {count}; plan again for {count}"
        )
    options = replace(options, cluster="" if jax_mesh is not None else cluster)
    return Planned(plan, traced, _laid(jax_mesh, plan.mesh, options))


def _platform(options: Options) -> str:
    if options.cluster:
        return parse_target(options.cluster).platform
    given = options.mesh
    if isinstance(given, jax.sharding.Mesh):
        return str(given.devices.flat[0].platform)
    return jax.default_backend()


def _where(options: Options) -> tuple[Any, Mesh | None, int]:
    """The user's JAX mesh if one was given, the mesh if fixed, the device count."""
    given = options.mesh
    mesh = None if given is None else as_mesh(given)
    if options.cluster:
        count = parse_target(options.cluster).device_count
        what = options.cluster
    elif isinstance(given, jax.sharding.Mesh):
        return given, mesh, given.size
    else:
        count, what = len(jax.devices()), f"this machine ({jax.devices()[0].platform})"
    if mesh is not None:
        check_count(mesh, count, what)
    return None, mesh, count


def _laid(jax_mesh: Any, mesh: Mesh, options: Options) -> Any:
    if not mesh.axes:
        return None
    if options.cluster:
        return abstract_mesh(mesh)
    if jax_mesh is not None:
        return jax.sharding.Mesh(jax_mesh.devices, jax_mesh.axis_names)
    return device_mesh(mesh)


def _grid(options: Options, count: int) -> tuple[int, ...]:
    """How the devices are linked: a TPU's torus, or all in a row."""
    if options.cluster:
        target = parse_target(options.cluster)
        sides = target.text.partition(":")[2].split("x")
        if target.platform == "tpu" and all(side.isdigit() for side in sides):
            found = tuple(int(side) for side in sides if int(side) > 1)
            if math.prod(found) == count:
                return found or (1,)
    return (count,)


def _specs(pins: Mapping[str, Any]) -> dict[str, Spec]:
    wrong = []
    found = {}
    for key, spec in pins.items():
        try:
            found[str(key)] = compat.partitions(spec)
        except TypeError:
            wrong.append(f"{key!r}: {spec!r}")
    if wrong:
        raise PinError(
            "pins must be PartitionSpecs (or tuples of axis names); not so: "
            + "; ".join(wrong)
        )
    return found
