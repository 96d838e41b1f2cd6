"""The best answer by exact steps: all variables over one axis at a time.

With the other axes held, what one axis does for every variable is solved exactly: few
values a variable, so that elimination is cheap however long the Program. Steps repeat
until none helps. Answers found from several starts are then *fused*: of the values that
any of them gives a variable the best combination is found exactly, which is never worse
than the best of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.search.domains import SPLIT, Domain, Slots
from rhino_jax.search.eliminate import lower_bound
from rhino_jax.search.energy import Energy
from rhino_jax.search.graph import INPUT, STORED
from rhino_jax.search.local import greedy
from rhino_jax.search.solve import solve

MOST_ROUNDS = 8
BOUND_TABLE = 2**21
"""Entries of the largest table for a bound: with larger ones bounds are closer."""


@dataclass(frozen=True)
class Answer:
    """Slots for every variable, and what they cost in ticks.

    ``proven``: every step was solved to its optimum.
    """

    slots: tuple[Slots, ...]
    ticks: int
    proven: bool = True


@dataclass(frozen=True)
class Start:
    """Slots to start from. ``batch``: on axes not yet settled the batch is split.

    ``settled``: an answer already, all axes are.
    """

    slots: tuple[Slots, ...]
    batch: bool = False
    settled: bool = False


def starts(energy: Energy) -> tuple[Start, ...]:
    """Everything whole, with the batch left alone and with the batch split."""
    whole = tuple((None,) * len(energy.mesh.axes) for _ in energy.graph.vars)
    return (Start(whole, batch=True),)


def descend(
    energy: Energy, start: Start, order: Sequence[int], memory_ticks: float = 0.0
) -> Answer:
    """Better ``start`` axis by axis, in ``order``, until no axis helps."""
    best: Answer | None = None
    slots = start.slots
    idle = 0
    settled = set(order) if start.settled else set()
    for axis in itertools.islice(itertools.cycle(order), MOST_ROUNDS * len(order)):
        domains = [
            k.around(at, axis) for k, at in zip(energy.kinds, slots, strict=True)
        ]
        problem = energy.problem(domains, memory_ticks)
        incumbent: Sequence[int] = (0,) * len(domains)
        if axis not in settled:
            held = _held(energy, domains, axis, start.batch)
            incumbent = greedy(problem, held)
        settled.add(axis)
        found = solve(problem, incumbent)
        slots = chosen(domains, found.answer)
        if len(settled) < len(order):
            continue  # what is asked of the axes to come is not met yet
        idle = idle + 1 if best is not None and found.cost >= best.ticks else 0
        if best is None or found.cost < best.ticks:
            best = Answer(slots, found.cost, found.optimal)
        if idle >= len(order) - 1:
            break
    assert best is not None, "a mesh without axes has one answer"
    return best


def _held(
    energy: Energy, domains: Sequence[Domain], axis: int, batch: bool
) -> Mapping[int, int]:
    """Where what is stored starts from: whole, batch inputs split by examples."""
    held = {}
    for v, var in enumerate(energy.graph.vars):
        if var.role in STORED:
            held[v] = 0
        if batch and var.role == INPUT:
            for k, slots in enumerate(domains[v].slots):
                slot = slots[axis]
                if slot is not None and slot[:2] == (SPLIT, 0):
                    held[v] = k
    return held


def fuse(
    energy: Energy, answers: Sequence[Answer], memory_ticks: float = 0.0
) -> Answer:
    """The best combination of what ``answers`` say of each variable."""
    best = min(answers, key=lambda answer: answer.ticks)
    if len(answers) == 1:
        return best
    every = zip(best.slots, *(a.slots for a in answers), strict=True)
    domains = [k.domain(of) for k, of in zip(energy.kinds, every, strict=True)]
    found = solve(energy.problem(domains, memory_ticks), (0,) * len(domains))
    return Answer(chosen(domains, found.answer), found.cost, found.optimal)


def chosen(domains: Sequence[Domain], answer: Sequence[int]) -> tuple[Slots, ...]:
    """The slots that an answer of the solver stands for."""
    return tuple(d.slots[k] for d, k in zip(domains, answer, strict=True))


def orders(axes: int, most: int) -> Sequence[Sequence[int]]:
    """Orders in which to take the axes, at most ``most``: rotations first.

    >>> orders(2, 4)
    [(0, 1), (1, 0)]
    """
    rotations: Iterable[tuple[int, ...]] = (
        (*range(first, axes), *range(first)) for first in range(axes)
    )
    every = itertools.chain(rotations, itertools.permutations(range(axes)))
    return list(dict.fromkeys(every))[:most]


def search_axes(
    energy: Energy,
    begin: Sequence[Start],
    most_orders: int,
    memory_ticks: float = 0.0,
) -> Answer:
    """Descend from every start in several orders, and fuse what was found."""
    axes = _wide(energy)
    if not axes:
        return whole(energy, memory_ticks)
    found: dict[tuple[Slots, ...], Answer] = {}
    for start in begin:
        for order in orders(len(axes), most_orders):
            answer = descend(energy, start, [axes[i] for i in order], memory_ticks)
            found.setdefault(answer.slots, answer)
    return fuse(energy, list(found.values()), memory_ticks)


def _wide(energy: Energy) -> list[int]:
    """The mesh axes of several devices."""
    return [i for i, axis in enumerate(energy.mesh.axes) if axis.size > 1]


def whole(energy: Energy, memory_ticks: float) -> Answer:
    """The one answer on one device."""
    slots = starts(energy)[0].slots
    domains = [k.domain((at,)) for k, at in zip(energy.kinds, slots, strict=True)]
    found = solve(energy.problem(domains, memory_ticks))
    return Answer(slots, found.cost)


def gap(energy: Energy, answer: Answer, memory_ticks: float = 0.0) -> float:
    """By what share of its cost ``answer`` could be cheaper if one axis changed.

    An upper bound, the largest of all axes.
    """
    most = 0.0
    for axis in _wide(energy):
        at = zip(energy.kinds, answer.slots, strict=True)
        problem = energy.problem([k.around(x, axis) for k, x in at], memory_ticks)
        bound = lower_bound(problem, BOUND_TABLE)
        most = max(most, (answer.ticks - bound) / max(answer.ticks, 1))
    return most
