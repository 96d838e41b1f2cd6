"""The validator against a checker of its own kind, on schedules for stages of any
shape, sound and spoilt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhino_jax.schedule import Schedule, Task, make_schedule
from rhino_jax.schedule.simulate import simulate
from rhino_jax.schedule.tasks import KINDS, Edge, chain
from rhino_jax.schedule.validate import validate
from tests.schedule.checker import faults, graph_of, is_sound, nodes

Case = tuple[Schedule, list[Edge]]


@st.composite
def sound(draw: Any) -> Case:
    """A DAG of stages on random workers, its tasks in a random order that works."""
    stages = draw(st.integers(1, 6))
    pairs = [(a, b) for b in range(stages) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    workers = draw(st.integers(1, 4))
    worker_of = tuple(draw(st.integers(0, workers - 1)) for _ in range(stages))
    schedule = Schedule("random", draw(st.integers(1, 3)), worker_of, ())
    tasks = []
    for s in range(stages):
        for j in range(schedule.num_microbatches):
            whole = draw(st.booleans())
            kinds = ["backward"] if whole else ["backward_input", "backward_weight"]
            tasks += [Task(kind, s, j) for kind in ["forward", *kinds]]
    after = graph_of(schedule, edges)
    lists: list[list[Task]] = [[] for _ in range(workers)]
    done: set = set()
    while tasks:
        ready = [t for t in tasks if after[nodes(t)[0]] <= done]
        task = draw(st.sampled_from(ready))
        tasks.remove(task)
        done.update(nodes(task))
        lists[worker_of[task.stage]].append(task)
    return replace(schedule, lists=tuple(map(tuple, lists))), edges


@st.composite
def spoilt(draw: Any) -> Case:
    """A sound one, changed here and there; it may be sound still."""
    schedule, edges = draw(sound())
    lists = [list(tasks) for tasks in schedule.lists]
    for _ in range(draw(st.integers(1, 2))):
        own = draw(st.sampled_from([tasks for tasks in lists if tasks] or [[]]))
        if not own:
            break
        i, j = (draw(st.integers(0, len(own) - 1)) for _ in "ij")
        match draw(st.sampled_from(["swap", "drop", "repeat", "change", "give away"])):
            case "swap":
                own[i], own[j] = own[j], own[i]
            case "drop":
                del own[i]
            case "repeat":
                own.insert(j, own[i])
            case "change":
                own[i] = replace(own[i], kind=draw(st.sampled_from(KINDS)))
            case "give away":
                draw(st.sampled_from(lists)).append(own.pop(i))
    return replace(schedule, lists=tuple(map(tuple, lists))), edges


@settings(max_examples=60, deadline=None)
@given(sound())
def test_what_is_sound_is_found_so(case: Case) -> None:
    assert is_sound(*case)
    assert validate(*case) == []


@settings(max_examples=250, deadline=None)
@given(spoilt())
def test_faults_are_found_where_there_are_any(case: Case) -> None:
    if all(task.kind == "forward" for task in case[0].tasks):
        return  # for evaluation: the checker knows training alone
    assert (validate(*case) == []) == is_sound(*case)


@settings(max_examples=120, deadline=None)
@given(sound(), st.data())
def test_clocks_keep_the_order_and_their_links(case: Case, data: st.DataObject) -> None:
    schedule, edges = case
    several = st.lists(st.integers(0, 5), min_size=6, max_size=6)
    seconds = {kind: data.draw(several)[: schedule.num_stages] for kind in KINDS}
    both_ways = [*edges, *((b, a) for a, b in edges)]
    transfer_seconds = {edge: data.draw(st.integers(0, 4)) for edge in both_ways}
    workers = range(schedule.num_workers)
    links = {
        (a, b): data.draw(st.sampled_from("xy"))
        for a in workers
        for b in workers
        if data.draw(st.booleans())
    }
    timeline = simulate(
        schedule,
        seconds,
        edges=edges,
        transfer_seconds=transfer_seconds,
        links=links,
    )
    assert faults(timeline, edges, seconds, transfer_seconds, links) == []


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero_bubble", "eager_1f1b"])
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), unique=True))
def test_schedules_of_chains_do_for_any_stages(name: str, pairs: list[Edge]) -> None:
    """An encoder-decoder, two towers: the stages in data-flow order are enough."""
    edges = [(a, b) for a, b in pairs if a < b]
    schedule = make_schedule(name, 5, 4)
    assert validate(schedule, edges) == []
    assert is_sound(schedule, edges)


def test_a_deadlock_names_who_waits_for_whom() -> None:
    """Each worker has its own backward before the other's."""
    forward = [Task("forward", s, j) for s in range(2) for j in range(2)]
    back = [Task("backward", s, j) for s in range(2) for j in range(2)]
    schedule = Schedule(
        "crossed",
        2,
        (0, 1),
        (
            (forward[0], back[0], forward[1], back[1]),
            (forward[3], back[3], forward[2], back[2]),
        ),
    )
    assert validate(schedule) == [
        "worker 0 stops before backward of stage 0, microbatch 0: it needs backward of "
        "stage 1, microbatch 0, and worker 1 stops before that",
        "worker 1 stops before forward of stage 1, microbatch 1: it needs forward of "
        "stage 0, microbatch 1, and worker 0 stops before that",
    ]


def test_everything_wrong_is_said_at_once() -> None:
    tasks = (
        *(Task("forward", 0, 0), Task("forward", 0, 0), Task("backward", 0, 0)),
        *(Task("backward_weight", 0, 0), Task("update", 0, 0), Task("forward", 1, 5)),
    )
    schedule = Schedule("mine", 1, (0, 3), (tasks, (Task("forward", 0, 0),)))
    assert validate(schedule, [(1, 0), (0, 7)], [1]) == [
        "stage 1 is worker 3's; there are 2",
        "edge (1, 0) goes against the order of the stages",
        "edge (0, 7): stages go from 0 to 1",
        "worker 0 runs update of stage 0, microbatch 0: kinds are forward, backward, "
        "backward_input, backward_weight",
        "worker 0 runs forward of stage 1, microbatch 5: there are 1 microbatches",
        "worker 1 runs forward of stage 0, microbatch 0, which is worker 0's",
        "forward of stage 0, microbatch 0 is run 3 times",
        "stage 0, microbatch 0 goes back by backward 1 times, backward_weight 1 times: "
        "it must by one backward, or by one backward_input and one backward_weight",
        "forward of stage 1, microbatch 0 is run 0 times",
        "stage 1, microbatch 0 goes back by nothing: "
        "it must by one backward, or by one backward_input and one backward_weight",
        "1 in-flight bounds for 2 workers",
    ]


def test_bounds_on_what_is_kept_are_held_against_the_peak() -> None:
    found = validate(make_schedule("gpipe", 2, 4), chain(2), [4, 3])
    assert found == ["worker 1 keeps 4 microbatches; its bound is 3"]
