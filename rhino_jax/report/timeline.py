"""A timeline as a trace that Perfetto and chrome://tracing show.

One process row per worker: what it runs, what it sends to each other worker, how much
it keeps. Simulated and recorded timelines are written alike. The format: "Trace Event
Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rhino_jax.schedule.simulate import Outside, Span, Timeline, Transfer
from rhino_jax.schedule.tasks import Task

Event = dict[str, Any]
MICRO = 1e6

RUNS = 0
"""The row of a worker's tasks; that of what it sends to worker w is w + 1."""


def write_timeline(
    timeline: Timeline,
    path: str | os.PathLike[str],
    saved_bytes: Sequence[int] | None = None,
) -> None:
    """Write a trace; open it at https://ui.perfetto.dev.

    Args:
        timeline: from a simulation, or recorded.
        path: where to; what is there is written over.
        saved_bytes: stage -> what it saves for one microbatch; None counts pairs of
            stage and microbatch.
    """
    trace = {"traceEvents": trace_events(timeline, saved_bytes)}
    Path(path).write_text(json.dumps(trace), "utf-8")


def trace_events(
    timeline: Timeline, saved_bytes: Sequence[int] | None = None
) -> list[Event]:
    """The events of the trace, times in microseconds.

    >>> from rhino_jax.schedule import make_schedule
    >>> from rhino_jax.schedule.simulate import simulate
    >>> seconds = {"forward": [1, 1], "backward": [2, 2]}
    >>> run = simulate(make_schedule("1f1b", 2, 4), seconds)
    >>> [e["name"] for e in trace_events(run) if e["ph"] == "X" and e["pid"] == 1][:2]
    ['forward s1 m0', 'backward s1 m0']
    """
    spans = {span.task: span for span in timeline.spans}
    events = [*_rows(timeline)]
    events += [_run(span) for span in timeline.spans]
    events += [_outside(one) for one in timeline.outside]
    for number, transfer in enumerate(timeline.transfers):
        events += _sent(transfer, number, spans)
    for worker in _workers(timeline):
        events += _kept(timeline, worker, saved_bytes)
    return events


def _event(phase: str, worker: int, name: str, **more: Any) -> Event:
    return {"ph": phase, "pid": worker, "name": name, **more}


def _slice(
    worker: int, row: int, task: Task, kind: str, start: float, end: float
) -> Event:
    name = f"{task.kind} s{task.stage} m{task.microbatch}"
    args = {"stage": task.stage, "microbatch": task.microbatch}
    return _lasting(worker, row, name, kind, start, end, args=args)


def _lasting(
    worker: int, row: int, name: str, kind: str, start: float, end: float, **more: Any
) -> Event:
    times = {"ts": start * MICRO, "dur": (end - start) * MICRO}
    return _event("X", worker, name, cat=kind, tid=row, **times, **more)


def _pairs(timeline: Timeline) -> set[tuple[int, int]]:
    """Who sends to whom."""
    worker_of = timeline.schedule.worker_of
    ends = ((one.source.stage, one.reader.stage) for one in timeline.transfers)
    pairs = {(worker_of[source], worker_of[reader]) for source, reader in ends}
    beside = timeline.outside
    return pairs | {(x.worker, x.target) for x in beside if x.target is not None}


def _workers(timeline: Timeline) -> list[int]:
    """Those of whom anything is known: a recording may be that of one process."""
    return sorted(
        {run.worker for run in timeline.runs} | {w for w, _ in _pairs(timeline)}
    )


def _rows(timeline: Timeline) -> Iterator[Event]:
    """Names and order of rows."""
    worker_of, pairs = timeline.schedule.worker_of, _pairs(timeline)
    for worker in _workers(timeline):
        own = [str(stage) for stage, w in enumerate(worker_of) if w == worker]
        name = f"worker {worker}: stage{'s' if len(own) > 1 else ''} {', '.join(own)}"
        yield _event("M", worker, "process_name", args={"name": name})
        yield _event("M", worker, "process_sort_index", args={"sort_index": worker})
        rows = {RUNS: "runs"}
        rows |= {to + 1: f"to worker {to}" for w, to in sorted(pairs) if w == worker}
        for row, name in rows.items():
            yield _event("M", worker, "thread_name", tid=row, args={"name": name})


def _run(span: Span) -> Event:
    times = span.start_seconds, span.end_seconds
    return _slice(span.worker, RUNS, span.task, span.task.kind, *times)


def _outside(one: Outside) -> Event:
    row = RUNS if one.target is None else one.target + 1
    times = one.start_seconds, one.end_seconds
    return _lasting(one.worker, row, one.what, "outside", *times)


def _sent(transfer: Transfer, number: int, spans: dict[Task, Span]) -> Iterator[Event]:
    """What is sent, and an arrow from the task that made it to the one that reads it.

    The ends of an arrow belong to the slices around them: it leaves from a middle.
    """
    source, reader = spans[transfer.source], spans[transfer.reader]
    times = transfer.start_seconds, transfer.end_seconds
    yield _slice(source.worker, reader.worker + 1, source.task, "transfer", *times)
    arrow = {"cat": "transfer", "id": number, "tid": RUNS}
    middle = (source.start_seconds + source.end_seconds) / 2
    yield _event("s", source.worker, "read by", ts=middle * MICRO, **arrow)
    start = reader.start_seconds * MICRO
    yield _event("f", reader.worker, "read by", ts=start, bp="e", **arrow)


def _kept(
    timeline: Timeline, worker: int, saved_bytes: Sequence[int] | None
) -> Iterator[Event]:
    unit = "microbatches" if saved_bytes is None else "bytes"
    for seconds, level in timeline.held(worker, saved_bytes):
        yield _event("C", worker, "kept", ts=seconds * MICRO, args={unit: level})
