"""What is known of a step, carried over to the step with layers rematerialized.

Its Program is the plain one with ops put in. What was read of the plain one holds for
it, and what was found is nearly the answer: equal layers stay decided together whether
they are recomputed or not, and copies are decided like what they repeat, so that the
search has hardly anything new to decide, and starts from what was found.
"""

from __future__ import annotations

from dataclasses import replace

from rhino_jax.ir.analysis.regions import BACKWARD
from rhino_jax.ir.program import Program
from rhino_jax.search.descend import Answer, Start
from rhino_jax.search.domains import Slots
from rhino_jax.search.graph import Graph, Path, Ties
from rhino_jax.search.planner import Reading, Repeats, reading_of, repeats
from rhino_jax.search.subject import Subject


def read_again(subject: Subject, before: Reading) -> Reading:
    """The reading of ``subject``, which is that of ``before`` with ops put in."""
    program, facts = subject.program, before.facts
    again = repeats(program)
    places = _places(before.subject.program, program)
    return reading_of(
        subject,
        replace(
            facts,
            region=[BACKWARD if i is None else facts.region[i] for i in places],
            batch=facts.batch
            | {v for v, origin in again.values.items() if origin in facts.batch},
            ties=_ties(facts.ties, places, again),
            fed={
                now: facts.fed[then]
                for now, then in enumerate(places)
                if then is not None and then in facts.fed
            },
        ),
    )


def _places(before: Program, after: Program) -> list[int | None]:
    """Where ``before`` has each op of ``after``; None for one that was put in."""
    known, old = len(before.values), iter(range(len(before.ops)))
    return [
        next(old) if not op.results or op.results[0] < known else None
        for op in after.ops
    ]


def _ties(ties: Ties, places: list[int | None], again: Repeats) -> Ties:
    """The ties of the plain Program; copies tied to what they repeat, barriers of
    values that are tied to one another."""
    now = {old: new for new, old in enumerate(places) if old is not None}
    ops = {now[i]: now[first] for i, first in ties.ops.items()}
    ops.update({i: ops.get(first, first) for i, first in again.ops.items()})
    values = dict(ties.values)
    values.update({v: values.get(w, w) for v, w in again.values.items()})
    barriers: dict[int, int] = {}
    for index, value in again.barriers.items():
        first = barriers.setdefault(values.get(value, value), index)
        if first != index:
            ops[index] = first
    return Ties(ops, values)


def carried(answer: Answer, before: Graph, after: Graph) -> Start:
    """``answer``, found for ``before``, as a start for ``after``."""
    whole: Slots = (None,) * len(answer.slots[0]) if answer.slots else ()
    slots = [whole] * len(after.vars)
    for now, then in _same(before, after):
        slots[now] = answer.slots[then]
    return Start(tuple(slots), settled=True)


def _same(before: Graph, after: Graph) -> list[tuple[int, int]]:
    """Variables of ``after``, each with the one of ``before`` that it was."""
    places = _places(before.program, after.program)

    def then(path: Path) -> Path | None:
        if not path:
            return path
        place = places[path[0]]
        return None if place is None else (place, *path[1:])

    found = [
        *zip(after.inputs, before.inputs, strict=True),
        *zip(after.outputs, before.outputs, strict=True),
    ]
    for (path, index), var in after.sites.items():
        old = then((*path, index))
        if old is not None:
            found.append((var, before.sites[old[:-1], old[-1]]))
    for (path, value, group), var in after.reads.items():
        where = then(path)
        if where is not None and (where, value, group) in before.reads:
            found.append((var, before.reads[where, value, group]))
    for (path, index, number), body in after.bodies.items():
        old = then((*path, index))
        if old is not None:
            known = before.bodies[old[:-1], old[-1], number]
            ends = (*body.inputs, *body.outputs), (*known.inputs, *known.outputs)
            found += [
                (now.var, was.var)
                for now, was in zip(*ends, strict=True)
                if now is not None and was is not None
            ]
    return found
