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

from rhino_jax.schedule.simulate import Span, Timeline, Transfer
from rhino_jax.schedule.tasks import Task

Event = dict[str, Any]

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
    starts = {span.task: span for span in timeline.spans}
    events = [*_rows(timeline)]
    events += [_run(span) for span in timeline.spans]
    for number, transfer in enumerate(timeline.transfers):
        events += _sent(transfer, number, starts)
    for worker in range(timeline.schedule.num_workers):
        events += _kept(timeline, worker, saved_bytes)
    return events


def _rows(timeline: Timeline) -> Iterator[Event]:
    """Names and order of rows."""
    worker_of = timeline.schedule.worker_of
    pairs = {
        (worker_of[transfer.source.stage], worker_of[transfer.reader.stage])
        for transfer in timeline.transfers
    }
    for worker in range(timeline.schedule.num_workers):
        own = [str(stage) for stage, w in enumerate(worker_of) if w == worker]
        stages = f"stage{'s' if len(own) > 1 else ''} {', '.join(own)}"
        for what, args in {
            "process_name": {"name": f"worker {worker}: {stages}"},
            "process_sort_index": {"sort_index": worker},
        }.items():
            yield {"ph": "M", "name": what, "pid": worker, "args": args}
        rows = {RUNS: "runs"}
        rows |= {to + 1: f"to worker {to}" for w, to in sorted(pairs) if w == worker}
        for row, name in rows.items():
            yield {
                **{"ph": "M", "name": "thread_name", "pid": worker, "tid": row},
                "args": {"name": name},
            }


def _name(task: Task) -> str:
    return f"{task.kind} s{task.stage} m{task.microbatch}"


def _slice(name: str, kind: str, pid: int, tid: int, start: float, end: float) -> Event:
    return {
        **{"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid},
        **{"ts": start * 1e6, "dur": (end - start) * 1e6},
    }


def _run(span: Span) -> Event:
    task, times = span.task, (span.start_seconds, span.end_seconds)
    event = _slice(_name(task), task.kind, span.worker, RUNS, *times)
    return event | {"args": {"stage": task.stage, "microbatch": task.microbatch}}


def _sent(transfer: Transfer, number: int, starts: dict[Task, Span]) -> Iterator[Event]:
    """What is sent, and an arrow from the task that made it to the one that reads it.

    The ends of an arrow belong to the slices around them: it leaves from a middle.
    """
    source, reader = starts[transfer.source], starts[transfer.reader]
    times = transfer.start_seconds, transfer.end_seconds
    row = reader.worker + 1
    yield _slice(_name(source.task), "transfer", source.worker, row, *times)
    arrow = {"name": "read by", "cat": "transfer", "id": number, "tid": RUNS}
    middle = (source.start_seconds + source.end_seconds) / 2
    yield {**arrow, "ph": "s", "pid": source.worker, "ts": middle * 1e6}
    start = reader.start_seconds * 1e6
    yield {**arrow, "ph": "f", "bp": "e", "pid": reader.worker, "ts": start}


def _kept(
    timeline: Timeline, worker: int, saved_bytes: Sequence[int] | None
) -> Iterator[Event]:
    unit = "microbatches" if saved_bytes is None else "bytes"
    for seconds, level in timeline.held(worker, saved_bytes):
        yield {
            **{"ph": "C", "name": "kept", "pid": worker, "ts": seconds * 1e6},
            "args": {unit: level},
        }
