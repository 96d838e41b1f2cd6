"""The schedules of the literature.

All of them are one weave: a worker runs its forward tasks in some order and its
backward tasks in the mirrored order; it is ``warmup`` forward tasks ahead, then one
forward and one backward take turns, then the backward tasks that are left. Schedules
differ in the order, in the warm-up, and in whether weight halves come later.

Microbatches always go backward in the order in which they went forward, so that
gradients are summed in one order under every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from rhino_jax.errors import OptionsError, nearest, problems
from rhino_jax.schedule.tasks import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Schedule,
    Task,
)

Turn = tuple[int, int]
"""Which of a worker's own stages, counted from 0, on which microbatch."""


def gpipe(num_workers: int, num_microbatches: int) -> Schedule:
    """All forward, then all backward (Huang et al. 2019, arXiv 1811.06965)."""
    turns = _breadth_first(num_microbatches, 1)
    warmups = [num_microbatches] * num_workers
    return _woven("gpipe", num_workers, num_microbatches, 1, turns, warmups)


def one_forward_one_backward(num_workers: int, num_microbatches: int) -> Schedule:
    """1F1B with a flush: a worker is as far ahead as the last worker is away.

    Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training"
    (PipeDream-Flush), arXiv 2006.09503.
    """
    turns = _breadth_first(num_microbatches, 1)
    warmups = [num_workers - 1 - w for w in range(num_workers)]
    return _woven("1f1b", num_workers, num_microbatches, 1, turns, warmups)


def _breadth_first(num_microbatches: int, chunks: int) -> list[Turn]:
    """Every microbatch through one of the worker's stages, then through the next."""
    return [(c, j) for c in range(chunks) for j in range(num_microbatches)]


def _woven(
    name: str,
    num_workers: int,
    num_microbatches: int,
    chunks: int,
    turns: Sequence[Turn],
    warmups: Sequence[int],
    weight_delays: Sequence[int] | None = None,
) -> Schedule:
    """``turns``: the forward order of each worker. ``weight_delays``: split backward
    tasks, a worker's weight half as many of its backward tasks behind its input half.
    """
    lists = []
    for worker, warmup in enumerate(warmups):
        stages = [chunk * num_workers + worker for chunk in range(chunks)]
        forwards = [Task(FORWARD, stages[c], j) for c, j in turns]
        if weight_delays is None:
            backwards = [[Task(BACKWARD, stages[-1 - c], j)] for c, j in turns]
        else:
            backwards = _halves(
                [(stages[-1 - c], j) for c, j in turns], weight_delays[worker]
            )
        lists.append(tuple(_weave(forwards, backwards, warmup)))
    worker_of = tuple(s % num_workers for s in range(num_workers * chunks))
    return Schedule(name, num_microbatches, worker_of, tuple(lists))


def _halves(turns: Sequence[Turn], delay: int) -> list[list[Task]]:
    """Input halves with weight halves behind them; the last has all that are left."""
    weights = [Task(BACKWARD_WEIGHT, stage, j) for stage, j in turns]
    groups = []
    for k, (stage, j) in enumerate(turns):
        groups.append([Task(BACKWARD_INPUT, stage, j)])
        groups[-1] += weights[k - delay : k - delay + 1] if k >= delay else []
    groups[-1] += weights[max(0, len(turns) - delay) :]
    return groups


def _weave(
    forwards: Sequence[Task], backwards: Sequence[Sequence[Task]], warmup: int
) -> Iterator[Task]:
    yield from forwards[:warmup]
    for forward, group in zip_longest(forwards[warmup:], backwards):
        if forward is not None:
            yield forward
        yield from group


Generator = Callable[..., Schedule]

SCHEDULES: dict[str, Generator] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
"""Name -> what makes it, of (num_workers, num_microbatches)."""

LOOPED: frozenset[str] = frozenset()
"""Those that take a number of stages a worker as well."""


def make_schedule(
    name: str, num_workers: int, num_microbatches: int, stages_per_worker: int = 1
) -> Schedule:
    """The schedule called ``name``.

    Args:
        name: one of :data:`SCHEDULES`.
        num_workers: at least 1.
        num_microbatches: at least 1; any count will do.
        stages_per_worker: more than 1 only where stages are looped over the workers:
            stage s is then run by worker ``s % num_workers``.

    Raises:
        OptionsError: an unknown name (with the nearest) or an impossible count; all
            that is wrong at once.

    >>> [str(task) for task in make_schedule("1f1b", 2, 3).lists[1][:2]]
    ['forward of stage 1, microbatch 0', 'backward of stage 1, microbatch 0']
    """
    found = []
    if name not in SCHEDULES:
        near = nearest(str(name), SCHEDULES) or list(SCHEDULES)
        found.append(f"schedule={name!r}: did you mean {' or '.join(near)}?")
    counts = {
        "num_workers": num_workers,
        "num_microbatches": num_microbatches,
        "stages_per_worker": stages_per_worker,
    }
    for what, count in counts.items():
        if not isinstance(count, int) or count < 1:
            found.append(f"{what}={count!r}: a whole number of at least 1")
    if not found and stages_per_worker > 1 and name not in LOOPED:
        found.append(
            f"stages_per_worker={stages_per_worker}: {name} runs one stage a worker;"
            f" {' and '.join(sorted(LOOPED))} run several"
        )
    if found:
        raise OptionsError(problems("no such schedule:", found))
    looped = (stages_per_worker,) if name in LOOPED else ()
    return SCHEDULES[name](num_workers, num_microbatches, *looped)
