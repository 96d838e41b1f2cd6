"""When tasks ran, from when they were handed out and seen, as a simulation knows."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from rhino_jax.ir.pipeline.chunks import Key
from rhino_jax.ir.pipeline.flow import LOOP
from rhino_jax.runtime.recording import Seen, timed
from rhino_jax.runtime.tasks import Run, Send
from rhino_jax.schedule import make_schedule
from rhino_jax.schedule.simulate import Span, Timeline, Transfer, simulate
from rhino_jax.schedule.tasks import Needs, chain

SECONDS = {"forward": [3, 1, 2], "backward": [4, 5, 2]}
SENDING = {(0, 1): 2, (1, 2): 1, (2, 1): 3, (1, 0): 1}


def handed(timeline: Timeline) -> list[tuple[Run | Send, Span | Transfer]]:
    """The tasks of a simulation in an order in which they can be handed out."""
    needs = Needs(timeline.schedule.tasks, chain(timeline.schedule.num_stages))
    worker_of = timeline.schedule.worker_of
    slots: dict[object, int] = {}
    found: list[tuple[Run | Send, Span | Transfer]] = []
    every = [*timeline.spans, *timeline.transfers]
    for one in sorted(every, key=lambda one: (one.start_seconds, one.end_seconds)):
        if isinstance(one, Transfer):
            workers = worker_of[one.source.stage], worker_of[one.reader.stage]
            gives = slots.setdefault((one.source, one.reader), len(slots))
            found.append((Send(*workers, (slots[one.source],), (gives,)), one))
            continue
        task = one.task
        takes = [slots.get((needed, task), slots[needed]) for needed in needs.of(task)]
        gives = slots.setdefault(task, len(slots))
        key = Key(LOOP, task.stage, task.stage)
        found.append((Run(one.worker, key, str(task), tuple(takes), (gives,)), one))
    return found


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_what_is_seen_at_once_is_timed_exactly(kind: str) -> None:
    schedule = make_schedule(kind, 3, 5)
    pairs = handed(simulate(schedule, SECONDS, transfer_seconds=SENDING))
    assert {type(task) for task, _ in pairs} == {Run, Send}
    for took, (_, true) in zip(
        timed([Seen(task, 0, one.end_seconds) for task, one in pairs]),
        pairs,
        strict=True,
    ):
        assert took.start_seconds == true.start_seconds
        assert took.end_seconds == true.end_seconds


def test_what_is_seen_late_ends_before_what_waits_for_it() -> None:
    late = random.Random(0)
    schedule = make_schedule("1f1b", 3, 5)
    pairs = handed(simulate(schedule, SECONDS, transfer_seconds=SENDING))
    seen = [Seen(t, 0, one.end_seconds + late.randrange(4)) for t, one in pairs]
    assert any(a.seen_seconds > b.seen_seconds for a, b in pairwise(seen))
    ends: dict[object, float] = {}
    for took, one, (_, true) in zip(timed(seen), seen, pairs, strict=True):
        assert true.end_seconds <= took.end_seconds <= one.seen_seconds
        task = took.task
        row = (task.worker, getattr(task, "target", None))
        for before in (row, *task.takes):
            assert ends.get(before, 0) <= took.start_seconds <= took.end_seconds
        ends |= dict.fromkeys((row, *task.gives), took.end_seconds)


def test_what_is_handed_out_late_begins_late() -> None:
    run = Run(0, Key(LOOP, 0, 0), "one", (), (0,))
    later = Run(0, Key(LOOP, 0, 0), "two", (0,), (1,))
    first, second = timed([Seen(run, 10, 12), Seen(later, 15, 16)])
    assert (first.start_seconds, first.end_seconds) == (0, 2)
    assert (second.start_seconds, second.end_seconds) == (5, 6)
