"""Many clocks at once are as many clocks."""

from __future__ import annotations

import numpy as np
import pytest

from rhino_jax.schedule import SCHEDULES, make_schedule
from rhino_jax.schedule.batch import Clock
from rhino_jax.schedule.simulate import simulate
from rhino_jax.schedule.tasks import KINDS, Edge
from tests.schedule.pipelines import STAGES_PER_WORKER

TOWERS = [(0, 2), (1, 2), (0, 3), (2, 3)]


@pytest.mark.parametrize("edges", [None, TOWERS], ids=["chain", "towers"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_of_many_is_simulated(name: str, edges: list[Edge] | None) -> None:
    draw = np.random.default_rng(7)
    v = STAGES_PER_WORKER[name][-1]
    schedule = make_schedule(name, 4, 7, v)
    stages = schedule.num_stages
    ticks = {kind: draw.integers(0, 9, (stages, 6)) for kind in KINDS}
    sent = {
        (a, b): draw.integers(0, 9, 6)
        for a in range(stages)
        for b in range(stages)
        if a != b and (a + b) % 3
    }
    found = Clock(schedule, edges).makespans(ticks, sent)
    for i, makespan in enumerate(found):
        one = simulate(
            schedule,
            {kind: table[:, i].tolist() for kind, table in ticks.items()},
            edges=edges,
            transfer_seconds={edge: int(times[i]) for edge, times in sent.items()},
        )
        assert one.makespan_seconds == makespan
