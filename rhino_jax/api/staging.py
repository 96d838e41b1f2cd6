"""A pipeline planned: how many workers, which segments where, what a step will cost."""

from __future__ import annotations

from collections.abc import Iterable

from rhino_jax.api.pipelined import chunks_of, graph_of, schedule_of
from rhino_jax.cluster.topology import Cluster, between_parts, part
from rhino_jax.cost.stretches import op_seconds
from rhino_jax.errors import InfeasibleError, OptionsError
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.pipeline.flow import LOOP
from rhino_jax.ir.spans import spans
from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.options import Options
from rhino_jax.plan import Predicted, Stages
from rhino_jax.report.stages import crossing
from rhino_jax.rules import rule_of
from rhino_jax.schedule.simulate import simulate
from rhino_jax.search.auto import Candidate
from rhino_jax.search.staging import Divided, balanced, check_stages
from rhino_jax.search.subject import Subject
from rhino_jax.search.timing import Refusal, timing


def workers_of(options: Options) -> int:
    """Into how many shares the devices are divided; 1 where there is no pipeline.

    Raises:
        OptionsError: the stages can not be dealt to whole workers.
    """
    stages, each = options.pipeline_stages, options.stages_per_worker
    if stages is None:
        return 1
    if stages % each:
        raise OptionsError(
            f"pipeline_stages={stages}: schedule {options.schedule!r} runs {each} "
            f"stages on each share of the devices; ask for a multiple of {each}, or "
            f"'{options.schedule.partition(':')[0]}:N' with another number"
        )
    return stages // each


def microbatches_of(subject: Subject, options: Options) -> tuple[int, tuple[str, ...]]:
    """How many microbatches a pipeline is fed, and a note where that is only one.

    As asked for; else four a worker, or as many as the batch can be cut in.
    """
    if options.microbatches:
        return options.microbatches, ()
    workers = workers_of(options)
    reasons: Iterable[str] = ()
    for count in (4 * workers, 2 * workers, workers, 2):
        found = timing(subject, subject.batch_size, count)
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
) -> Stages:
    """Which stage runs which segments.

    Raises:
        InfeasibleError: there are more stages than segments.
    """
    assert options.pipeline_stages is not None
    check_stages(divided, options.pipeline_stages)
    spent = op_seconds(divided.subject.program, assignment, mesh, cluster, rule_of)
    held = balanced(divided.seconds(spent), options.pipeline_stages)
    name = options.schedule.partition(":")[0]
    return Stages(tuple(map(spans, held)), name, workers_of(options))


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
            f"the stages of worker {worker} hold {peak / 2**30:.2f} GiB between their "
            f"programs, {(peak - limit_bytes) / 2**30:.2f} GiB more than the "
            f"{limit_bytes / 2**30:.2f} GiB of a device; use more stages, remat="
            "'boundary', or schedule='1f1b' with more microbatches"
        )
    share = part(cluster, stages.num_workers)
    spent = op_seconds(program, assignment, best.mesh, share, rule_of)
    seconds: dict[str, list[float]] = {}
    outside = [0.0] * stages.num_workers
    for chunk in chunks.chunks:
        units = [chunks.flow.units[n] for n in chunk.units]
        total = sum(spent.get(u.index, 0.0) for u in units if u.kind == "op")
        if chunk.key.phase == LOOP:
            kind = chunks.kind_of(chunk.key)
            row = seconds.setdefault(kind, [0.0] * chunks.num_stages)
            row[chunk.key.stage] += total / best.microbatches
        else:
            outside[schedule.worker_of[chunk.key.stage]] += total
    kinds = {task.kind for task in schedule.tasks}
    link = between_parts(cluster)
    sent: dict[tuple[int, int], float] = {}
    for edge, phase, version in crossing(chunks, programs.inputs):
        if phase == LOOP:
            seconds_sent = programs.num_bytes(version) / link.bytes_per_second
            sent[edge] = sent.get(edge, link.latency_seconds) + seconds_sent
    timeline = simulate(
        schedule,
        {kind: seconds.get(kind, [0.0] * chunks.num_stages) for kind in kinds},
        edges=tuple({(min(edge), max(edge)) for edge in sent}),
        transfer_seconds=sent,
    )
    one = best.prediction
    return Predicted(
        timeline.makespan_seconds + max(outside),
        one.compute_seconds / stages.num_workers,
        one.comm_seconds / stages.num_workers,
        peak,
        limit_bytes,
        one.flops / stages.num_workers,
        best.byte_seconds,
    )
