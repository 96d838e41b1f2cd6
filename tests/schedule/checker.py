"""Is a schedule, or what a clock made of it, sound? Written apart from the package:
nothing here knows how the package decides."""

from __future__ import annotations

import graphlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rhino_jax.schedule import Schedule, Task
from rhino_jax.schedule.simulate import Timeline

Node = tuple[str, int, int]
Edges = Sequence[tuple[int, int]]


def graph_of(schedule: Schedule, edges: Edges) -> dict[Node, set[Node]]:
    """Node -> what it must come after, by data alone.

    Four nodes for every stage and microbatch: forward, the cotangent handed on, the
    gradients, and all done; a whole backward task is the second and third at once.
    """
    after: dict[Node, set[Node]] = {}
    for j in range(schedule.num_microbatches):
        for s in range(schedule.num_stages):
            after["F", s, j] = {("F", a, j) for a, b in edges if b == s}
            after["I", s, j] = {("F", s, j)} | {("I", b, j) for a, b in edges if a == s}
            after["W", s, j] = {("I", s, j)}
    return after


def nodes(task: Task) -> list[Node]:
    letters = {
        "forward": "F",
        "backward": "IW",
        "backward_input": "I",
        "backward_weight": "W",
    }
    return [(letter, task.stage, task.microbatch) for letter in letters[task.kind]]


def is_sound(schedule: Schedule, edges: Edges) -> bool:
    """Every node once, on its worker, and data and lists together have no cycle."""
    after = graph_of(schedule, edges)
    there = Counter(node for task in schedule.tasks for node in nodes(task))
    if there != Counter(after.keys()):
        return False
    for worker, tasks in enumerate(schedule.lists):
        if any(schedule.worker_of[task.stage] != worker for task in tasks):
            return False
        for first, second in pairwise(tasks):
            after[nodes(second)[0]].add(nodes(first)[-1])
    try:
        graphlib.TopologicalSorter(after).prepare()
    except graphlib.CycleError:
        return False
    return True


def faults(
    timeline: Timeline,
    edges: Edges,
    seconds: Mapping[str, Sequence[int]],
    transfer_seconds: Mapping[tuple[int, int], int],
    links: Mapping[tuple[int, int], str],
) -> list[str]:
    """What a clock did that it must not."""
    found = []
    schedule = timeline.schedule
    spans = {node: span for span in timeline.spans for node in nodes(span.task)}
    sent = {
        (nodes(t.source)[0], nodes(t.reader)[0]): (t.start_seconds, t.end_seconds)
        for t in timeline.transfers
    }
    on_link = defaultdict(list)
    for node, needed in graph_of(schedule, edges).items():
        for other in needed:
            mine, source = spans[node], spans[other]
            if mine is source:
                continue
            there = source.end_seconds
            if mine.worker != source.worker:
                start, end = sent.pop((other, node))
                if end - start != transfer_seconds.get((other[1], node[1]), 0):
                    found.append(f"{other} -> {node} took {end - start}")
                if start < there:
                    found.append(f"{other} was sent before it was there")
                pair = source.worker, mine.worker
                on_link[links.get(pair, pair)].append((start, end))
                there = end
            if mine.start_seconds < there:
                found.append(f"{node} did not wait for {other}")
    found += [f"sent for nothing: {pair}" for pair in sent]
    for worker, tasks in enumerate(schedule.lists):
        own = timeline.of_worker(worker)
        if [span.task for span in own] != list(tasks):
            found.append(f"worker {worker} ran another list")
        on_link["worker", worker] = [(s.start_seconds, s.end_seconds) for s in own]
    for span in timeline.spans:
        task, took = span.task, span.end_seconds - span.start_seconds
        if took != seconds[task.kind][task.stage]:
            found.append(f"{task} took {took}")
    for link, times in on_link.items():
        if any(b < end for (_, end), (b, _) in pairwise(sorted(times))):
            found.append(f"{link} did two things at once")
    return found
