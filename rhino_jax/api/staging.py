"""A pipeline planned: how many workers, which segments where, what a step will cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rhino_jax.api.pipelined import chunks_of, graph_of, schedule_of
from rhino_jax.api.simulated import simulated
from rhino_jax.cluster.topology import NETWORK, Cluster, between_parts, part
from rhino_jax.cost.stretches import op_seconds
from rhino_jax.errors import InfeasibleError, MeshError, OptionsError
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.spans import spans
from rhino_jax.ir.staged import Staged
from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.options import Options
from rhino_jax.plan import Predicted, Stages
from rhino_jax.report.text import bytes_text
from rhino_jax.rules import rule_of
from rhino_jax.search.candidates import Candidate
from rhino_jax.search.staged import Scans, Uncut, layers_of, staged_scans
from rhino_jax.search.stages import cut_stages
from rhino_jax.search.staging import Divided, check_stages, problem_of, runs
from rhino_jax.search.subject import Subject
from rhino_jax.search.timing import Refusal, timing

WORKERS = (2, 4, 8, 16)
"""Into how many shares of devices a pipeline is tried to be divided."""


def network_bound(alone: Predicted, cluster: Cluster) -> bool:
    """Whether a plan without a pipeline waits for a network so long that one may win.

    A pipeline sends activations between hosts in place of gradients, and idles while
    it fills: an eighth of its arithmetic at least, two workers fed with eight
    microbatches. Twice that must be there to win for planning it to be worth the time.
    Simulated devices share one machine's cores, whatever they send.
    """
    far = between_parts(cluster).kind == NETWORK and cluster.device.platform != "cpu"
    return far and alone.comm_seconds > alone.compute_seconds / 4


def workers_of(options: Options) -> int:
    """Into how many shares the devices are divided; 1 where there is no pipeline.

    Raises:
        OptionsError: the stages can not be dealt to whole workers.
    """
    stages, each = options.stages, options.stages_per_worker
    if stages is None:
        return 1
    if stages % each:
        raise OptionsError(
            f"pipeline_stages={stages}: schedule {options.schedule!r} runs {each} "
            f"stages on each share of the devices; ask for a multiple of {each}, or "
            f"'{options.schedule.partition(':')[0]}:N' with another number"
        )
    return stages // each


def stage_counts(cluster: Cluster, options: Options) -> Iterator[int]:
    """The numbers of stages that "auto" compares: 2, 4, 8 and 16 shares of devices."""
    for workers in WORKERS:
        try:
            part(cluster, workers)
        except MeshError:
            continue
        yield workers * options.stages_per_worker


IN_ONE_PROGRAM = ("gpipe", "circular")
"""Schedules that run forward and backward passes one after the other."""


def ways_to_cut(subject: Subject, options: Options) -> tuple[Staged, ...] | Uncut:
    """The ways to cut scanned layers in equal stages, to be run as one program.

    None where nothing asks for that: no stages, another schedule, no scan over layers.
    Without a number of microbatches as many ways as there are: four, two, one a stage.
    """
    workers, name = workers_of(options), options.schedule.partition(":")[0]
    if workers == 1 or name not in IN_ONE_PROGRAM or not layers_of(subject):
        return ()
    asked = options.microbatches
    counts = (asked,) if asked else (4 * workers, 2 * workers, workers)
    cuts = [Staged(workers, count, options.stages_per_worker) for count in counts]
    tried = [staged_scans(subject, cut) for cut in cuts]
    good = tuple(found.cut for found in tried if isinstance(found, Scans))
    refused = [found for found in tried if isinstance(found, Uncut)]
    return good or refused[-1]


def microbatches_of(
    subject: Subject, options: Options, rows: int
) -> tuple[int, tuple[str, ...]]:
    """How many microbatches a pipeline is fed, and a note where that is only one.

    As asked for; else four a worker, or as many as can be.

    Args:
        rows: examples that lie together on one device.
    """
    if options.microbatches:
        return options.microbatches, ()
    workers = workers_of(options)
    reasons: Iterable[str] = ()
    for count in (4 * workers, 2 * workers, workers, 2):
        found = timing(subject, rows, count)
        if not isinstance(found, Refusal):
            return count, ()
        reasons = found.reasons
    why = "; ".join(reasons)
    return 1, (f"one microbatch, so stages wait for one another: {why}",)


def stages_of(
    divided: Divided,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster,
    options: Options,
    limit_bytes: int,
) -> Stages:
    """Which stage runs which segments.

    Raises:
        InfeasibleError: there are more stages than segments, or no cut fits in
            ``limit_bytes`` of a device.
    """
    assert options.stages is not None
    check_stages(divided, options.stages)
    workers = workers_of(options)
    share = part(cluster, workers)
    spent = op_seconds(divided.subject.program, assignment, mesh, share, rule_of)
    name = options.schedule.partition(":")[0]
    problem = problem_of(
        divided,
        assignment,
        mesh,
        spent,
        name,
        workers,
        options.stages_per_worker,
        between_parts(cluster),
        limit_bytes,
    )
    held = runs(cut_stages(problem).starts, divided.count)
    return Stages(tuple(map(spans, held)), name, workers)


def predicted_of(
    best: Candidate,
    stages: Stages,
    cluster: Cluster,
    limit_bytes: int,
    donated: tuple[int, ...],
) -> Predicted:
    """What a step of the pipeline is predicted to cost.

    Seconds are the simulated makespan of the schedule, and what the slowest worker does
    before and behind it. Bytes are what stands between the programs of the stages, on
    the worker where that is most.

    Raises:
        InfeasibleError: that is more than a device has.
    """
    program, assignment = best.subject.program, best.assignment
    divided = Divided(best.subject)
    schedule = schedule_of(stages, best.microbatches)
    chunks = chunks_of(divided, assignment, stages)
    programs = StagePrograms(
        program, assignment, best.mesh, chunks, schedule.worker_of, ()
    )
    graph = graph_of(divided, programs, schedule, donated)
    peak = max(graph.peaks)
    if peak > limit_bytes:
        worker = graph.peaks.index(peak)
        raise InfeasibleError(
            f"the stages of worker {worker} hold {bytes_text(peak)} on each device "
            f"between their programs, {bytes_text(peak - limit_bytes)} more than the "
            f"limit of {bytes_text(limit_bytes)}; use more stages, remat="
            "'boundary', or schedule='1f1b' with more microbatches"
        )
    timeline, outside_seconds = simulated(programs, schedule, cluster)
    one = best.prediction
    return Predicted(
        timeline.makespan_seconds + outside_seconds,
        one.compute_seconds / stages.num_workers,
        one.comm_seconds / stages.num_workers,
        peak,
        limit_bytes,
        one.flops / stages.num_workers,
        best.byte_seconds,
    )
