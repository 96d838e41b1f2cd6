"""Traces that Perfetto can draw: rows, slices, arrows, counters."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from rhino_jax.report.timeline import Event, trace_events, write_timeline
from rhino_jax.schedule import make_schedule
from rhino_jax.schedule.simulate import Timeline, simulate


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    seconds = {"forward": [1] * 4, "backward": [2] * 4}
    edges = {(a, a + 1): 0.5 for a in range(3)} | {(a + 1, a): 0.5 for a in range(3)}
    schedule = make_schedule("interleaved", 2, 4, 2)
    return simulate(schedule, seconds, transfer_seconds=edges)


def of(events: list[Event], phase: str) -> list[Event]:
    return [event for event in events if event["ph"] == phase]


def test_a_trace_file_has_a_process_a_worker(
    timeline: Timeline, tmp_path: Path
) -> None:
    write_timeline(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["worker 0: stages 0, 2", "worker 1: stages 1, 3"]
    assert {e["pid"] for e in events} == {0, 1}


def test_every_task_is_a_slice_in_microseconds(timeline: Timeline) -> None:
    tasks = [e for e in of(trace_events(timeline), "X") if e["tid"] == 0]
    assert len(tasks) == 4 * 4 * 2
    assert (tasks[0]["name"], tasks[0]["ts"], tasks[0]["dur"]) == (
        "forward s0 m0",
        0,
        1e6,
    )
    end = max(e["ts"] + e["dur"] for e in tasks)
    assert end == timeline.makespan_seconds * 1e6


def test_no_row_has_two_slices_at_once(timeline: Timeline) -> None:
    rows = defaultdict(list)
    for event in of(trace_events(timeline), "X"):
        rows[event["pid"], event["tid"]].append(
            (event["ts"], event["ts"] + event["dur"])
        )
    assert set(rows) == {(0, 0), (0, 2), (1, 0), (1, 1)}
    for times in rows.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(sorted(times)))


def test_arrows_join_slices_of_two_workers(timeline: Timeline) -> None:
    events = trace_events(timeline)
    slices = [e for e in of(events, "X") if e["tid"] == 0]
    starts, ends = ({e["id"]: e for e in of(events, phase)} for phase in "sf")
    assert len(starts) == len(timeline.transfers) == len(of(events, "s"))
    assert starts.keys() == ends.keys()
    for number, start in starts.items():
        end = ends[number]
        assert start["pid"] != end["pid"]
        for arrow in (start, end):
            assert any(
                e["pid"] == arrow["pid"] and e["ts"] <= arrow["ts"] < e["ts"] + e["dur"]
                for e in slices
            )


def test_counters_show_what_is_kept(timeline: Timeline) -> None:
    counters = of(trace_events(timeline, [10, 20, 30, 40]), "C")
    levels = [e["args"]["bytes"] for e in counters if e["pid"] == 0]
    assert (levels[:3], levels[-1]) == ([0, 10, 20], 0)
