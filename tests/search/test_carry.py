"""What was read and found of a step holds for the step with layers rematerialized."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import linked
from rhino_jax.ir.assignment import live_ops
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search import planner
from rhino_jax.search.carry import carried, read_again
from rhino_jax.search.descend import Answer, search_axes, starts
from rhino_jax.search.energy import Energy, Memo
from rhino_jax.search.planner import Reading, Request, energy_of, read
from rhino_jax.search.prices import ClusterPrices
from rhino_jax.search.remat import BOUNDARY, apply_remat
from rhino_jax.search.subject import Subject
from tests.search.steps import ATTENTION, MLP, subject_of
from tests.search.test_planner import unrolled

CLUSTER = parse_cluster("h100:2x8")
MESH = linked(CLUSTER, Mesh.of(x=4, y=4))
PRICES = ClusterPrices(CLUSTER)


def recomputing(was: Subject, segments: tuple[int, ...]) -> Subject:
    pairs, batch = was.pairs, was.batch_inputs
    program = apply_remat(was.program, pairs, batch, BOUNDARY, segments)
    assert program is not was.program
    return replace(was, program=program)


def on(reading: Reading, memo: Memo | None = None) -> Energy:
    return energy_of(reading, Request(MESH, PRICES), memo)


@pytest.mark.parametrize("tied", [False, True])
def test_read_again_is_read(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same is known of every op and value as if the Program were read anew."""
    monkeypatch.setattr(planner, "MOST_UNTIED_OPS", 0 if tied else 10**6)
    was = unrolled(8)
    after = recomputing(was, (1, 2, 3))
    again, anew = read_again(after, read(was)), read(after)
    for name in ("roles", "successor", "batch", "gradients"):
        assert getattr(again.facts, name) == getattr(anew.facts, name), name
    for index in live_ops(after.program):
        assert again.facts.region[index] == anew.facts.region[index]
    assert len(again.graph.vars) <= len(anew.graph.vars)
    if not tied:  # barriers, too, are decided as what they hold back
        assert anew.facts.ties.values.items() <= again.facts.ties.values.items()
        assert again.facts.ties.ops == anew.facts.ties.ops
    assert again.graph.sites.keys() == anew.graph.sites.keys()


def test_recomputing_more_layers_decides_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "MOST_UNTIED_OPS", 0)
    was = unrolled(12)
    before = read(was)
    counts = [
        len(read_again(recomputing(was, segments), before).graph.vars)
        for segments in ((2, 3, 4), (2, 3, 4, 5, 6, 7))
    ]
    assert counts[0] == counts[1] <= len(before.graph.vars) + 5


def test_an_answer_is_carried_over_op_by_op() -> None:
    was = unrolled(6)
    before = read(was)
    answer = search_axes(on(before), starts(on(before)), 1)
    after = recomputing(was, (1, 2, 4))
    again = read_again(after, before)
    start = carried(answer, before.graph, again.graph)
    known = len(was.program.values)
    old = 0
    for index, op in enumerate(after.program.ops):
        if op.results[0] < known:
            then = before.graph.sites[(), old]
            now = again.graph.sites[(), index]
            assert start.slots[now] == answer.slots[then]
            old += 1
    assert old == len(was.program.ops)
    for one, other in zip(again.graph.inputs, before.graph.inputs, strict=True):
        assert start.slots[one] == answer.slots[other]


def test_starting_from_an_answer_ends_as_well() -> None:
    """No dearer than what is found from nothing."""
    was = unrolled(6)
    before = read(was)
    answer = search_axes(on(before), starts(on(before)), 1)
    after = recomputing(was, (1, 2, 4))
    again = read_again(after, before)
    energy = on(again)
    start = carried(answer, before.graph, again.graph)
    found = search_axes(energy, (start,), 1)
    assert found.ticks <= search_axes(energy, starts(energy), 1).ticks
    assert found.ticks > answer.ticks  # what is computed again costs something


def test_a_memo_changes_no_answer() -> None:
    """Two Programs on one mesh, priced with and without what is known of the other."""
    memo = Memo()
    for case in (ATTENTION, MLP, ATTENTION):
        reading = read(subject_of(*case))
        alone, shared = on(reading), on(reading, memo)
        found = [search_axes(e, starts(e), 1) for e in (alone, shared)]
        assert found[0] == found[1]


@pytest.mark.parametrize("case", [MLP, ATTENTION], ids=["mlp", "attention"])
def test_no_answer_spares_more_than_can_be(case: tuple[object, ...]) -> None:
    energy = on(read(subject_of(*case)))
    first = search_axes(energy, starts(energy), 1)
    most = energy.spare_bytes(first.slots)

    def standing(answer: Answer) -> int:
        total = 0
        for v, var in enumerate(energy.graph.vars):
            meaning = energy.meaning(v, answer.slots[v])
            assert meaning is not None
            total += energy.held_bytes(var, meaning)
        return total

    spared = [
        standing(first) - standing(search_axes(energy, starts(energy), 1, price))
        for price in (1.0, 1e3, 1e6)
    ]
    assert 0 < max(spared) <= most
