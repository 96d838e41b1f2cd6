"""What tests of schedules start from."""

from __future__ import annotations

from collections.abc import Iterator

from rhino_jax.schedule import SCHEDULES, Schedule
from rhino_jax.schedule.generate import LOOPED
from rhino_jax.schedule.simulate import Timeline, simulate

STAGES_PER_WORKER = {name: (1, 2, 3) if name in LOOPED else (1,) for name in SCHEDULES}


def counts(workers: tuple[int, ...], microbatches: tuple[int, ...]) -> Iterator[tuple]:
    """(name, workers, microbatches, stages a worker): all there are on a grid."""
    for name, several in STAGES_PER_WORKER.items():
        for stages_per_worker in several:
            for p in workers:
                for m in microbatches:
                    yield name, p, m, stages_per_worker


def clock(schedule: Schedule, f: int, b: int, w: int) -> Timeline:
    """Equal stages: ``f`` forward, ``b`` and ``w`` the halves of backward."""
    seconds = {
        "forward": f,
        "backward": b + w,
        "backward_input": b,
        "backward_weight": w,
    }
    stages = schedule.num_stages
    return simulate(schedule, {kind: [s] * stages for kind, s in seconds.items()})
