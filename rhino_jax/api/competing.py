"""Pipelines that compete: with how many stages, in which form, or none at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from rhino_jax.api.planned import Planned
from rhino_jax.api.staging import network_bound, stage_counts, ways_to_cut
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import InfeasibleError, MeshError, RhinoError
from rhino_jax.options import AUTO, Options
from rhino_jax.plan import Predicted
from rhino_jax.search.subject import Subject


def fastest(
    subject: Subject,
    options: Options,
    cluster: Cluster,
    plan_one: Callable[[Options], Planned],
) -> Planned:
    """The plan of ``plan_one``; the best of several, where stages or their microbatches
    are left open.

    Raises:
        InfeasibleError, MeshError: none can be; what hindered the first.
    """
    unasked = options.pipeline_stages is None
    found: list[tuple[float, Planned]] = []
    said: list[str] = []
    failed: RhinoError | None = None
    for stages in _stage_counts(options, cluster):
        before = min(found, key=_first)[0] if found else math.inf
        for name, way in _ways(subject, options, stages):
            try:
                one = plan_one(way)
            except (InfeasibleError, MeshError) as error:
                failed = failed or error
                said.append(f"{name} can not be")
                continue
            assert one.predicted is not None
            if unasked and stages is None and not _open(one.predicted, way, cluster):
                return one
            seconds = one.predicted.step_seconds
            said.append(f"{name} {seconds * 1e3:.2f} ms")
            found.append((seconds, one))
        if unasked and (not found or min(found, key=_first)[0] >= before):
            break  # nothing without stages; or more stages idle longer
    if not found:
        assert failed is not None
        raise failed
    _, best = min(found, key=_first)
    if len(said) == 1:
        return best
    note = f"pipelines compared by prediction: {', '.join(said)}"
    return replace(best, plan=replace(best.plan, notes=(*best.plan.notes, note)))


def _first(way: tuple[float, Planned]) -> float:
    return way[0]


def _open(alone: Predicted, options: Options, cluster: Cluster) -> bool:
    """Whether pipelines compete unasked with the plan without one: where most of its
    time goes to a network, which they could spare."""
    given = options.mesh is not None or options.pins or options.lowering != "manual"
    return not given and network_bound(alone, cluster)


def _stage_counts(options: Options, cluster: Cluster) -> Iterator[int | None]:
    """Numbers of stages that are compared; None is no pipeline."""
    if options.pipeline_stages not in (None, AUTO):
        yield options.stages
        return
    yield None
    yield from stage_counts(cluster, options)


def _ways(
    subject: Subject, options: Options, stages: int | None
) -> Iterator[tuple[str, Options]]:
    """The pipelines of so many stages that are compared, each by name: scanned layers
    in one program, with several numbers of microbatches; or stages of any kind."""
    schedules = [options.schedule]
    if options.pipeline_stages in (None, AUTO) and options.schedule != "gpipe":
        schedules.append("gpipe")
    for schedule in schedules:
        way = replace(options, pipeline_stages=stages, schedule=schedule)
        cuts = ways_to_cut(subject, way)
        if isinstance(cuts, tuple) and cuts:
            for cut in cuts:
                many = f"{cut.microbatches} microbatches"
                yield f"{cut}, {many}", replace(way, microbatches=cut.microbatches)
        elif schedule == options.schedule:
            yield f"{stages} stages" if stages else "no pipeline", way
