"""A step recorded while it runs: the step it is, and the schedule it was planned to."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rhino_jax as rhino
from benchmarks.equality import worst_leaf
from benchmarks.models.branches import STEPS
from rhino_jax import errors
from rhino_jax.api.pipelined import PipelinePlanned
from rhino_jax.report.timeline import RUNS, Event
from rhino_jax.runtime.tasks import Run, Send
from rhino_jax.schedule.tasks import Needs, Task, chain

CLOSE = 1e-3
"""Microseconds that are lost in rounding."""


def pipeline(name: str, schedule: str) -> tuple[Any, Any, Any]:
    """A step on 2 stages of 2 devices, a state on the host, a batch."""
    step, state, batch = STEPS[name]()
    devices = np.array(jax.devices()[:4], object).reshape(2, 2)
    piped = rhino.auto_parallel(
        pipeline_stages=2,
        schedule=schedule,
        microbatches=4,
        mesh=jax.sharding.Mesh(devices, ("stage", "data")),
        recipe="data_parallel",
        cache_dir="",
    )(step)
    return piped, jax.device_get(state), batch


def events_of(path: Path) -> list[Event]:
    events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return events


def lasting(events: list[Event]) -> list[Event]:
    return [e for e in events if e["ph"] == "X"]


def end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


@pytest.fixture(scope="module", params=["tied 1f1b", "towers zero_bubble"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PipelinePlanned, list[Event], list[Event]]:
    """The plan, what its second step did, and what was predicted of it."""
    folder = tmp_path_factory.mktemp("traces")
    piped, state, batch = pipeline(*request.param.split())
    plain, recorded = (piped.place(state, batch) for _ in range(2))
    for _ in range(2):
        plain, wanted = piped(plain, batch)
        recorded, found = piped.trace(folder / "trace.json", recorded, batch)
        assert worst_leaf((plain, wanted), (recorded, found))[0] == 0
    planned = piped.planned(state, batch)
    assert planned.controller.watch is None
    planned.timeline(folder / "predicted.json")
    names = "trace.json", "predicted.json"
    assert {file.name for file in folder.iterdir()} == {*names}
    return planned, *(events_of(folder / name) for name in names)


Recorded = tuple[PipelinePlanned, list[Event], list[Event]]


def test_every_task_of_the_schedule_is_there_once(recorded: Recorded) -> None:
    """But for halves that are empty; and all else that was handed out."""
    planned, events, _ = recorded
    schedule, chunks = planned.schedule, planned.programs.chunks
    kinds = {task.kind for task in schedule.tasks}
    found = Counter((e["pid"], e["name"]) for e in lasting(events) if e["cat"] in kinds)
    assert found == Counter(
        (schedule.worker_of[t.stage], f"{t.kind} s{t.stage} m{t.microbatch}")
        for t in schedule.tasks
        if chunks.key_of(t.kind, t.stage) in chunks.by_key
    )
    handed = [
        task
        for task in planned.graph.tasks
        if isinstance(task, Send) or (isinstance(task, Run) and not task.start)
    ]
    assert len(lasting(events)) == len(handed)
    outside = [e["name"] for e in lasting(events) if e["cat"] == "outside"]
    assert any("stage 1 does before the loop" in name for name in outside)
    assert any("stage 0 does after the loop" in name for name in outside)


def test_workers_run_one_task_at_a_time_in_their_order(recorded: Recorded) -> None:
    planned, events, _ = recorded
    rows = defaultdict(list)
    for event in lasting(events):
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        rows[event["pid"], event["tid"]].append(event)
    for own in rows.values():
        ordered = sorted(own, key=lambda e: (e["ts"], end(e)))
        assert all(end(a) <= b["ts"] + CLOSE for a, b in pairwise(ordered))
    for worker, tasks in enumerate(planned.schedule.lists):
        names = [f"{t.kind} s{t.stage} m{t.microbatch}" for t in tasks]
        ran = [e["name"] for e in rows[worker, RUNS] if e["name"] in names]
        assert ran == [name for name in names if name in ran]


def test_nothing_begins_before_what_it_reads_has_ended(recorded: Recorded) -> None:
    planned, events, _ = recorded
    found = {
        Task(e["cat"], e["args"]["stage"], e["args"]["microbatch"]): e
        for e in lasting(events)
        if e["tid"] == RUNS and e["cat"] != "outside"
    }
    needs = Needs(planned.schedule.tasks, chain(planned.schedule.num_stages))
    checked = 0
    for task, event in found.items():
        for needed in needs.of(task):
            if needed in found:
                assert end(found[needed]) <= event["ts"] + CLOSE
                checked += 1
    assert checked > len(found) / 2
    transfers = [e for e in lasting(events) if e["cat"] == "transfer"]
    arrows = [e for e in events if e["ph"] == "f"]
    assert len(transfers) == len(arrows) > 0
    for sent, arrow in zip(transfers, arrows, strict=True):
        source = Task(*sent["name"].split(" s")[:1], *sent["args"].values())
        assert end(found[source]) <= sent["ts"] + CLOSE
        assert end(sent) <= arrow["ts"] + CLOSE


def test_it_has_the_rows_of_the_predicted_one(recorded: Recorded) -> None:
    _, events, predicted = recorded
    for name in ("process_name", "thread_name"):
        found, wanted = (
            {
                (e["pid"], e.get("tid"), e["args"]["name"])
                for e in some
                if e["name"] == name
            }
            for some in (events, predicted)
        )
        assert wanted <= found
    kept, wanted = (
        Counter(e["pid"] for e in some if e["name"] == "kept")
        for some in (events, predicted)
    )
    assert kept == wanted


def test_it_gives_the_state_away_as_a_call_does(tmp_path: Path) -> None:
    piped, state, batch = pipeline("towers", "1f1b")
    held = piped.place(state, batch)
    for nowhere in (tmp_path / "none" / "trace.json", tmp_path):
        with pytest.raises(errors.OptionsError, match="can not be written"):
            piped.trace(nowhere, held, batch)
    piped.trace(tmp_path / "trace.json", held, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(held))
    with pytest.raises(errors.DonationError, match="test_recorded"):
        piped(held, batch)
    with pytest.raises(errors.DonationError, match="test_recorded"):
        piped.trace(tmp_path / "trace.json", held, batch)


def test_what_can_not_be_recorded_is_said(tmp_path: Path) -> None:
    step, state, batch = STEPS["towers"]()
    alone = rhino.auto_parallel(recipe="data_parallel", cache_dir="")(step)
    held = alone.place(state, batch)
    with pytest.raises(errors.OptionsError, match=r"jax\.profiler"):
        alone.trace(tmp_path / "trace.json", held, batch)
    assert not any(x.is_deleted() for x in jax.tree.leaves(held))
    assert list(tmp_path.iterdir()) == []
    piped, state, batch = pipeline("towers", "1f1b")
    planned = piped.planned(state, batch)
    with pytest.warns(UserWarning, match="planned again"):
        with planned.recording(tmp_path / "trace.json"):
            pass  # another plan's controller took over
