"""However ops are labelled, chunks wait for one another in one direction only."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.ir.layout import Layout
from rhino_jax.ir.pipeline.chunks import Chunk, Chunks, Key, cut
from rhino_jax.ir.pipeline.flow import (
    AFTER,
    BEFORE,
    GIVEN,
    LAST,
    LEAVE,
    LOOP,
    OP,
    ROWS,
    TOTAL,
    Flow,
    Unit,
    Version,
)
from rhino_jax.ir.pipeline.labels import Label

WHOLE = Layout(())


def version(number: int) -> Version:
    return number, WHOLE


def unit(
    number: int,
    phase: int,
    reads: Sequence[tuple[int, int]] = (),
    kind: str = OP,
    how: str = "",
) -> Unit:
    """Makes the version of its own number; ``reads`` are (version, maker)."""
    named = tuple((version(v), maker) for v, maker in reads)
    return Unit(kind, number, phase, named, (version(number),), how)


def chain(stages: int) -> tuple[Flow, list[Label]]:
    """A forward op a stage, then a backward op a stage that reads its forward op."""
    units, labels = [], []
    for n in range(2 * stages):
        reads = [(n - 1, n - 1)] if n else [(100, GIVEN)]
        stage = min(n, 2 * stages - 1 - n)
        if n >= stages:
            reads.append((stage, stage))
        units.append(unit(n, LOOP, reads))
        labels.append(Label(stage, backward=n >= stages))
    last = 2 * stages - 1
    return Flow(tuple(units), ((version(last), last),)), labels


def test_a_chain_is_one_chunk_a_half() -> None:
    flow, labels = chain(3)
    found = cut(flow, labels, 3, [version(100)], {})
    assert [c.key for c in found.chunks] == [
        Key(LOOP, place, min(place, 5 - place)) for place in range(6)
    ]
    assert [c.units for c in found.chunks] == [(n,) for n in range(6)]
    backward = found.by_key[found.key_of("backward", 1)]
    assert {read.source for read in backward.reads} == {
        found.key_of("backward", 2),
        found.key_of("forward", 1),
    }
    assert found.homes == (0,)
    assert found.outputs[0].source == found.key_of("backward", 0)


def test_what_is_read_by_no_cotangent_is_cut_off() -> None:
    # Of stage 1: op 3 makes the cotangent, op 4 a gradient of a parameter.
    flow = Flow(
        (
            unit(0, LOOP, [(100, GIVEN)]),
            unit(1, LOOP, [(0, 0)]),
            unit(2, LOOP, [(1, 1)]),
            unit(3, LOOP, [(2, 2)]),
            unit(4, LOOP, [(2, 2), (0, 0)]),
            unit(5, LOOP, [(3, 3)]),
        ),
        ((version(4), 4), (version(5), 5)),
    )
    labels = [
        Label(0),
        Label(1),
        Label(1, backward=True),
        Label(1, backward=True),
        Label(1, backward=True),
        Label(0, backward=True),
    ]
    whole = cut(flow, labels, 2, [version(100)], {})
    split = cut(flow, labels, 2, [version(100)], {}, split=True)
    assert whole.by_key[whole.key_of("backward", 1)].units == (2, 3, 4)
    assert split.by_key[split.key_of("backward_input", 1)].units == (2, 3)
    assert split.by_key[split.key_of("backward_weight", 1)].units == (4,)
    # Nothing reads a cotangent of the first stage.
    assert split.key_of("backward_input", 0) not in split.by_key
    assert split.by_key[split.key_of("backward_weight", 0)].units == (5,)


def test_a_global_norm_takes_three_levels() -> None:
    """Squares on every stage, their sum on the first, then all updates; of the first
    stage all in one, for nobody waits for its squares alone."""
    flow = Flow(
        (
            unit(0, AFTER, [(100, GIVEN)]),
            unit(1, AFTER, [(101, GIVEN)]),
            unit(2, AFTER, [(0, 0), (1, 1)]),
            unit(3, AFTER, [(2, 2), (100, GIVEN)]),
            unit(4, AFTER, [(2, 2), (101, GIVEN)]),
        ),
        ((version(3), 3), (version(4), 4)),
    )
    labels = [Label(s, backward=True) for s in (0, 1, 0, 0, 1)]
    inputs = [version(100), version(101)]
    found = cut(flow, labels, 2, inputs, {0: 0, 1: 1})
    assert [(c.key.place, c.key.stage, c.units) for c in found.chunks] == [
        (0, 1, (1,)),
        (1, 0, (0, 2, 3)),
        (2, 1, (4,)),
    ]
    assert found.homes == (0, 1)


def test_what_many_stages_read_runs_on_each() -> None:
    flow = Flow(
        (
            unit(0, LOOP, [(100, GIVEN)]),
            unit(1, LOOP, [(0, 0)]),
            unit(2, LOOP, [(0, 0), (1, 1)]),
        ),
        ((version(2), 2),),
    )
    labels = [Label(spread=True), Label(0), Label(1)]
    found = cut(flow, labels, 2, [version(100)], {})
    assert [c.units for c in found.chunks] == [(0, 1), (0, 2)]
    assert [r.version for r in found.chunks[1].reads] == [version(100), version(1)]


def test_a_label_that_can_not_be_is_not_followed() -> None:
    """An op that reads what the last stage makes does not run on the first."""
    flow = Flow(
        (unit(0, LOOP, [(100, GIVEN)]), unit(1, LOOP, [(0, 0)])),
        ((version(1), 1),),
    )
    found = cut(flow, [Label(1), Label(0)], 2, [version(100)], {})
    assert [c.key.stage for c in found.chunks] == [1]


@pytest.mark.parametrize("how", [TOTAL, ROWS, LAST])
def test_what_leaves_the_loop(how: str) -> None:
    leave = unit(0, AFTER, [(7, 0)], LEAVE, how)
    flow = Flow(
        (
            Unit(OP, 0, LOOP, ((version(100), GIVEN),), (version(7),)),
            Unit(leave.kind, 0, AFTER, leave.reads, (version(8),), how),
        ),
        ((version(8), 1),),
    )
    found = cut(flow, [Label(1)], 2, [version(100)], {})
    inside, behind = found.chunks
    assert inside.totals == ((0,) if how == TOTAL else ())
    assert inside.gives == (() if how == TOTAL else (version(7),))
    assert [one.how for one in behind.leaves] == [how]
    assert behind.key.stage == 1
    assert found.left_by(0) == version(7)


LABELS = st.one_of(
    st.just(Label()),
    st.just(Label(spread=True)),
    st.builds(Label, st.integers(0, 3), st.booleans()),
)


@st.composite
def flows(draw: st.DrawFn) -> tuple[Flow, list[Label], int]:
    """Random units: each reads inputs and earlier units, phases as they come."""
    count = draw(st.integers(1, 14))
    phases = sorted(
        draw(st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=count, max_size=count))
    )
    units = []
    for n, phase in enumerate(phases):
        makers = draw(st.lists(st.integers(-3, n - 1), max_size=4, unique=True))
        # What the loop makes is read behind it only where it has left it.
        reads = [(m, m) if m >= 0 else (100 - m, GIVEN) for m in makers]
        units.append(unit(n, phase, reads))
    ends = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3))
    outputs = tuple((version(n), n) for n in ends)
    labels = draw(st.lists(LABELS, min_size=count, max_size=count))
    return Flow(tuple(units), outputs), labels, draw(st.integers(4, 4))


@given(flows(), st.booleans())
def test_chunks_can_run_one_after_the_other(
    made: tuple[Flow, list[Label], int], split: bool
) -> None:
    flow, labels, stages = made
    inputs = [version(100 + k) for k in range(1, 4)]
    found = cut(flow, labels, stages, inputs, {}, split)
    order = _execution(found)
    there = {(None, v) for v in inputs}
    ran = set()
    for chunk in order:
        for read in chunk.reads:
            assert (read.source, read.version) in there
        inside = {read.version for read in chunk.reads}
        for number in chunk.units:
            for needed, _ in flow.units[number].reads:
                assert needed in inside
            inside.update(flow.units[number].makes)
            ran.add(number)
        assert inside.issuperset(chunk.gives)
        there.update((chunk.key, v) for v in chunk.gives)
    assert ran == set(range(len(flow.units)))
    assert all((read.source, read.version) in there for read in found.outputs)


def _execution(chunks: Chunks) -> list[Chunk]:
    """Before the loop, forward, backward with its weight half right behind, after."""

    def when(chunk: Chunk) -> tuple[int, float]:
        key, n = chunk.key, chunks.num_stages
        weights = key.phase == LOOP and key.place >= 2 * n
        return key.phase, 2 * n - 0.5 - key.stage if weights else key.place

    assert BEFORE < LOOP < AFTER
    return sorted(chunks.chunks, key=when)
