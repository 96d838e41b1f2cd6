"""The makespans of one schedule under many durations at once.

With a link of its own for each direction between two workers, what happens in which
order is settled by the lists alone: a worker's tasks end in order, so what it sends
arrives in order. One walk over the tasks then does for any number of durations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rhino_jax.schedule.simulate import simulate
from rhino_jax.schedule.tasks import KINDS, Edge, Needs, Schedule, chain

Array = NDArray[np.int64]


class Clock:
    """:func:`rhino_jax.schedule.simulate.simulate` for arrays of whole ticks.

    Args:
        schedule: a sound one.
        edges: which stage reads which; None is a chain.
    """

    def __init__(self, schedule: Schedule, edges: Sequence[Edge] | None = None) -> None:
        self.num_workers = schedule.num_workers
        edges = chain(schedule.num_stages) if edges is None else edges
        ones = {kind: [1] * schedule.num_stages for kind in KINDS}
        # In order of ends, under any durations: after all that it waits for.
        self._order = [
            span.task for span in simulate(schedule, ones, edges=edges).spans
        ]
        self._workers = [schedule.worker_of[task.stage] for task in self._order]
        number = {task: i for i, task in enumerate(self._order)}
        needs = Needs(self._order, edges)
        self._readers: list[list[int]] = [[] for _ in self._order]
        for task in schedule.tasks:
            for needed in needs.of(task):
                self._readers[number[needed]].append(number[task])

    def makespans(
        self, ticks: Mapping[str, Array], sent: Mapping[Edge, Array] | None = None
    ) -> Array:
        """The makespan under each of n sets of durations.

        Args:
            ticks: kind of task -> [stages, n].
            sent: (stage, stage) -> [n], as ``transfer_seconds`` of ``simulate``.

        >>> from rhino_jax.schedule import make_schedule
        >>> forward = np.array([[1, 1, 2], [1, 2, 2]])
        >>> clock = Clock(make_schedule("1f1b", 2, 4))
        >>> clock.makespans({"forward": forward, "backward": 2 * forward}).tolist()
        [15, 27, 30]
        """
        sent = sent or {}
        zero = np.zeros_like(next(iter(ticks.values()))[0])
        free = [zero] * self.num_workers
        ready = [zero] * len(self._order)
        link_free: dict[Edge, Array] = {}
        for i, (task, worker) in enumerate(
            zip(self._order, self._workers, strict=True)
        ):
            start = np.maximum(free[worker], ready[i])
            end = free[worker] = start + ticks[task.kind][task.stage]
            ready[i] = zero  # what has been read is let go
            for reader in self._readers[i]:
                there, to = end, self._workers[reader]
                if to != worker:
                    took = sent.get((task.stage, self._order[reader].stage), zero)
                    there = np.maximum(end, link_free.get((worker, to), zero)) + took
                    link_free[worker, to] = there
                # Many read one thing alone: nothing to compare with.
                first = ready[reader] is zero
                ready[reader] = there if first else np.maximum(there, ready[reader])
        return np.asarray(np.max(free, axis=0), np.int64)
