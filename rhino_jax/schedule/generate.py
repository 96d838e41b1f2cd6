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
from dataclasses import replace
from itertools import pairwise, zip_longest

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


def eager_one_forward_one_backward(num_workers: int, num_microbatches: int) -> Schedule:
    """1F1B with twice the lead, so that what is sent has time to arrive.

    Zhuang et al. 2023, "On optimizing the communication of model parallelism"
    (eager-1F1B), arXiv 2211.05322.
    """
    turns = _breadth_first(num_microbatches, 1)
    warmups = [2 * (num_workers - 1 - w) for w in range(num_workers)]
    return _woven("eager_1f1b", num_workers, num_microbatches, 1, turns, warmups)


def zero_bubble(num_workers: int, num_microbatches: int) -> Schedule:
    """1F1B whose weight halves fill the bubble, within the same memory: ZB-H1.

    Worker w is as far ahead as under 1F1B and w weight halves behind: it keeps at most
    ``num_workers`` microbatches, as worker 0 does under 1F1B. Qi et al. 2023, "Zero
    bubble pipeline parallelism", arXiv 2401.10241, section 3.1.
    """
    turns = _breadth_first(num_microbatches, 1)
    warmups = [num_workers - 1 - w for w in range(num_workers)]
    delays = list(range(num_workers))
    return _woven(
        "zero_bubble", num_workers, num_microbatches, 1, turns, warmups, delays
    )


def interleaved(
    num_workers: int, num_microbatches: int, stages_per_worker: int
) -> Schedule:
    """1F1B over several stages a worker: a smaller bubble, more sent, more kept.

    Narayanan et al. 2021, "Efficient large-scale language model training on GPU
    clusters using Megatron-LM", arXiv 2104.04473, section 2.2. There the number of
    microbatches must be a multiple of the number of workers; here groups may be longer
    than ``num_workers``, by as little as can be, so that any number will do. With fewer
    microbatches than workers a worker waits between its stages. One stage a worker is
    1F1B.
    """
    if stages_per_worker == 1:
        plain = one_forward_one_backward(num_workers, num_microbatches)
        return replace(plain, name="interleaved")
    groups = _groups(num_microbatches, num_workers)
    turns = [(c, j) for g in groups for c in range(stages_per_worker) for j in g]
    lead = (stages_per_worker - 1) * max(map(len, groups))
    warmups = [lead + 2 * (num_workers - 1 - w) for w in range(num_workers)]
    return _woven(
        "interleaved", num_workers, num_microbatches, stages_per_worker, turns, warmups
    )


def circular(
    num_workers: int, num_microbatches: int, stages_per_worker: int
) -> Schedule:
    """GPipe looped over several stages a worker: all forward, then all backward.

    All microbatches pass one of a worker's stages before the first reaches its next.
    Lamy-Poirier 2022, "Breadth-first pipeline parallelism", arXiv 2211.05953; the
    circular pipeline of praxis and MaxText. One stage a worker is GPipe.
    """
    turns = _breadth_first(num_microbatches, stages_per_worker)
    warmups = [len(turns)] * num_workers
    return _woven(
        "circular", num_workers, num_microbatches, stages_per_worker, turns, warmups
    )


def _groups(num_microbatches: int, num_workers: int) -> list[range]:
    """Runs of microbatches, nearly equal, none shorter than ``num_workers`` if any is.

    >>> [len(group) for group in _groups(11, 4)]
    [6, 5]
    """
    count = max(1, num_microbatches // num_workers)
    size, longer = divmod(num_microbatches, count)
    starts = [g * size + min(g, longer) for g in range(count + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


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

SCHEDULES: dict[str, Generator] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "eager_1f1b": eager_one_forward_one_backward,
    "zero_bubble": zero_bubble,
    "interleaved": interleaved,
    "circular": circular,
}
"""Name -> what makes it, of (num_workers, num_microbatches)."""

LOOPED = frozenset({"interleaved", "circular"})
"""Those that take stages_per_worker as well."""


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
