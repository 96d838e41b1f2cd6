"""From a traced step and options to a Planned: search, recipe, or a saved plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.api.attached import more_memory
from rhino_jax.api.attending import attended, with_attention
from rhino_jax.api.cache import folder_of, key_of, read_plan, write_plan
from rhino_jax.api.competing import fastest
from rhino_jax.api.manual import around_manual, asked_mesh, manual_ops
from rhino_jax.api.pipelined import PipelinePlanned
from rhino_jax.api.planned import Planned, subject_of
from rhino_jax.api.staging import (
    microbatches_of,
    predicted_of,
    stages_of,
    ways_to_cut,
    workers_of,
)
from rhino_jax.api.where import (
    cluster_of,
    grid_of,
    in_one_program,
    laid,
    platform_of,
    where,
    with_stages,
)
from rhino_jax.cluster.profile import kernels_of
from rhino_jax.cluster.topology import Cluster, part
from rhino_jax.cost.habits import HABITS
from rhino_jax.errors import (
    InfeasibleError,
    MeshError,
    OptionsError,
    PinError,
    problems,
)
from rhino_jax.extend import as_rules, registered
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.spans import EVERY, numbers, spans
from rhino_jax.ir.staged import Staged
from rhino_jax.options import Options
from rhino_jax.plan import Plan, Predicted, make_plan
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Candidate, Wish
from rhino_jax.search.choose import default_meshes, plan_recipe, plan_staged
from rhino_jax.search.meshes import candidate_meshes, meshes_around
from rhino_jax.search.microbatch import microbatched, rows_together
from rhino_jax.search.notes import plan_notes
from rhino_jax.search.recipes import Placement, recipe_named
from rhino_jax.search.remat import NONE, apply_remat
from rhino_jax.search.specs import Spec
from rhino_jax.search.staged import Uncut
from rhino_jax.search.staging import Divided, check_stages
from rhino_jax.search.subject import Subject
from rhino_jax.search.timing import Refusal
from rhino_jax.trace import Traced, trace
from rhino_jax.trace.arguments import leaves_of

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
    options = around_manual(traced.program, options)
    if options.recipe:
        return _by_recipe(traced, options)
    where(options)  # what is wrong with a mesh is said before anything is looked up
    cluster, folder = cluster_of(options), folder_of(options)
    if folder is None:
        return _searched(traced, options, cluster)
    key = key_of(traced, cluster, options)
    kept = read_plan(folder, key)
    if kept is not None:
        share = part(cluster, kept.num_workers)
        return replace(bind(kept, traced, options), cluster=share)
    found = _searched(traced, options, cluster)
    write_plan(folder, key, found.plan)
    return found


def _searched(traced: Traced, options: Options, cluster: Cluster) -> Planned:
    def plan_of(step: Traced) -> Planned:
        def plan_one(way: Options) -> Planned:
            return _by_search(step, way, cluster)

        if manual_ops(step.program):
            return plan_one(options)
        return fastest(subject_of(step), options, cluster, plan_one)

    limit = _limit(options, cluster)
    return with_attention(traced, options, cluster, limit, plan_of)


def _by_search(traced: Traced, options: Options, cluster: Cluster) -> Planned:
    subject = subject_of(traced)
    cuts, uncut = _cuts(subject, options)
    cut = cuts[0] if cuts else None
    options = in_one_program(options, cut) if cut else options
    jax_mesh, mesh, _ = where(options)
    limit = _limit(options, cluster)
    level, pipeline = options.optimization_level, options.stages is not None
    batches = options.microbatches or 0
    notes: tuple[str, ...] = ()
    workers = workers_of(options)
    share = part(cluster, workers)
    if options.stages is not None:
        check_stages(Divided(subject), options.stages)
        rows, count = subject.batch_size, share.num_devices
        # So many that they fit whatever mesh is found.
        rows = rows // count if rows % count == 0 else rows
        batches, notes = microbatches_of(subject, options, rows)
    found = plan_search(
        subject,
        Wish(
            share,
            (mesh,) if mesh is not None else _meshes(subject, share, level, cut),
            # Every worker holds its part of what the search thinks one device holds.
            limit * workers,
            level,
            batches,
            options.remat or "",
            _specs(options.pins),
            traced.donated,
            "" if options.memory_limit_bytes else more_memory(cluster),
            pipeline,
            cut,
            workers == 1 and _takes_in(options, share),
        ),
    )
    best: Candidate = found.best
    stages, predicted = None, _predicted(best, limit)
    if pipeline:
        divided = Divided(best.subject)
        plan = best.assignment, best.mesh
        stages = stages_of(divided, *plan, cluster, options, limit)
        predicted = predicted_of(best, stages, cluster, limit, traced.donated)
    planned = _planned(
        replace(traced, program=best.subject.program),
        best.assignment,
        best.mesh,
        options,
        jax_mesh,
        remat=_policies(best.remat, best.segments),
        microbatches=cut.microbatches if cut else best.microbatches,
        stages=stages,
        predicted=predicted,
        notes=(*uncut, *notes, *found.notes),
        cluster=share,
    )
    return replace(planned, cluster=share)


def _cuts(
    subject: Subject, options: Options
) -> tuple[tuple[Staged, ...], tuple[str, ...]]:
    """How scanned layers may be cut in stages of one program, and why they can not be
    where that was asked for."""
    cuts = ways_to_cut(subject, options)
    if isinstance(cuts, Uncut):
        return (), tuple(f"stages are programs of their own: {x}" for x in cuts.reasons)
    return cuts, ()


def _recipe_in_stages(
    subject: Subject,
    mesh: Mesh,
    placement: Placement,
    pins: Mapping[str, Spec],
    cuts: Sequence[Staged],
) -> tuple[Staged, Assignment]:
    """The first of ``cuts`` that the placement leaves rows enough for."""
    *others, last = cuts
    for cut in others:
        try:
            return cut, plan_staged(subject, mesh, placement, pins, cut)
        except InfeasibleError:
            continue  # fewer microbatches may do; the last one's error is told
    return last, plan_staged(subject, mesh, placement, pins, last)


def _meshes(
    subject: Subject, cluster: Cluster, level: int, cut: Staged | None
) -> tuple[Mesh, ...]:
    """Meshes to try; those of one stage's devices, where there are stages."""
    if cut is not None:
        share = candidate_meshes(part(cluster, cut.stages), level)
        return tuple(with_stages(mesh, cut) for mesh in share)
    inner = asked_mesh(subject.program, cluster.num_devices)
    if inner is not None:
        return meshes_around(cluster, level, inner)
    return candidate_meshes(cluster, level)


def _takes_in(options: Options, cluster: Cluster) -> bool:
    """Whether products may do collectives while they work."""
    return options.collective_matmul and HABITS[cluster.device.platform].sends_beside


def _limit(options: Options, cluster: Cluster) -> int:
    """Bytes that a plan may be predicted to need on one device."""
    return options.memory_limit_bytes or int(cluster.device.memory_bytes * MARGIN)


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
    jax_mesh, mesh, count = where(options)
    if mesh is None:
        inner = asked_mesh(traced.program, count)
        if inner is None:
            mesh = default_meshes(recipe, grid_of(options, count))[-1]
        else:
            mesh = meshes_around(cluster_of(options), 1, inner)[0]
    mesh = mesh.linked(TORUS if platform_of(options) == "tpu" else "")
    remat = options.remat or NONE
    found = attended(traced, options.attention or "")
    traced = rewritten(found.traced, remat)
    subject = subject_of(traced)
    cuts, uncut = _cuts(subject, options)
    pins = _specs(options.pins)
    placement, assignment = plan_recipe(subject, mesh, recipe, pins)
    if mesh.num_devices > 1 and not placement.found:
        raise OptionsError(
            f"recipe {recipe!r} needs weights that it could split on mesh ({mesh})"
            f", and {traced.program.name} has none; use another recipe, such as "
            "'zero3', or leave it out to search"
        )
    cut = None
    if cuts:
        mesh = with_stages(mesh, cuts[0])
        cut, assignment = _recipe_in_stages(subject, mesh, placement, pins, cuts)
        options = in_one_program(options, cut)
    batches = options.microbatches or 1
    notes: tuple[str, ...] = (*uncut, *found.notes)
    owner: Sequence[int] = ()
    stages, divided = None, Divided(subject)
    if options.stages is not None:
        check_stages(divided, options.stages)
        rows = rows_together(subject, assignment, mesh)
        batches, said = microbatches_of(subject, options, rows)
        notes = (*notes, *said)
        owner = divided.segmentation.owner
    if batches > 1:
        timed = microbatched(subject, assignment, mesh, batches, owner)
        if isinstance(timed, Refusal):
            raise InfeasibleError(
                problems(f"{batches} microbatches can not be:", timed.reasons)
            )
        assignment = timed[0]
    if options.stages is not None:
        cluster = cluster_of(options)
        limit = _limit(options, cluster)
        stages = stages_of(divided, assignment, mesh, cluster, options, limit)
    return _planned(
        traced,
        assignment,
        mesh,
        options,
        jax_mesh,
        recipe=recipe,
        remat=_policies(remat),
        microbatches=cut.microbatches if cut else batches,
        stages=stages,
        notes=notes,
        attention=found.name,
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
        made_with=(("jax", jax.__version__), *_prices(cluster)),
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
    return planned_of(plan, traced, laid(jax_mesh, plan.whole_mesh, options))


def _prices(cluster: Cluster | None) -> Iterator[tuple[str, str]]:
    """Where the prices of a plan are from."""
    if cluster is not None:
        yield "prices", kernels_of(cluster.device).source


def planned_of(plan: Plan, traced: Traced, jax_mesh: Any) -> Planned:
    """A plan bound to its step, as a pipeline where it is one."""
    if plan.stages is None:
        return Planned(plan, traced, jax_mesh)
    return PipelinePlanned(plan, traced, jax_mesh)


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


def bind(plan: Plan, traced: Traced, options: Options) -> Planned:
    """A plan from a file bound to a traced step.

    Raises:
        PlanFileError: it is another program's plan.
        MeshError: its mesh is not that of the options, the devices or the cluster.
    """
    traced = attended(traced, plan.attention).traced
    for segments, policy in plan.remat:
        traced = rewritten(traced, policy, segments)
    plan.fits(traced.program)
    if plan.assignment.staged and options.stages is not None:
        options = in_one_program(options, plan.assignment.staged[0])
    jax_mesh, mesh, count = where(options, plan.stages)
    if mesh is not None and mesh.shape != plan.mesh.shape:
        raise MeshError(
            f"the plan is for mesh ({plan.mesh}), mesh=({mesh}) is asked for; drop "
            "mesh=, or plan again without the saved plan"
        )
    cluster = options.cluster or plan.cluster
    what = options.cluster or f"this machine ({jax.default_backend()})"
    if plan.num_devices != count and (options.cluster or not cluster):
        raise MeshError(
            f"the plan is for {plan.num_devices} devices, mesh ({plan.whole_mesh}), "
            f"{what} has {count}; plan again for {count}"
        )
    options = replace(options, cluster="" if jax_mesh is not None else cluster)
    return planned_of(plan, traced, laid(jax_mesh, plan.whole_mesh, options))


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
