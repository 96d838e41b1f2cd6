"""How many values are alive at each place between ops, and how many bytes.

*Place* i lies before op i: a value crosses it when it is made before and read by op i
or later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from rhino_jax.ir.program import Program


@dataclass(frozen=True)
class Span:
    """A value on its way: the op that makes it, the last that reads it, how many do."""

    value: int
    born: int
    dies: int
    readers: int


@dataclass(frozen=True)
class Crossings:
    """What crosses each place: one entry a place, ``len(ops) + 1`` in all.

    ``single`` counts the crossing values that only one op reads: at the end of a
    residual block none is, since the next block and the one after it read its result.
    """

    spans: tuple[Span, ...]
    count: tuple[int, ...]
    single: tuple[int, ...]
    num_bytes: tuple[int, ...]

    def at(self, places: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """The values that cross each of ``places``, which must ascend."""
        order = list(places)
        assert order == sorted(order), "places must ascend"
        found: list[list[int]] = [[] for _ in order]
        first = 0
        for span in sorted(self.spans, key=lambda span: span.born):
            while first < len(order) and order[first] <= span.born:
                first += 1
            for i in range(first, len(order)):
                if order[i] > span.dies:
                    break
                found[i].append(span.value)
        return tuple(tuple(values) for values in found)


def crossings(
    program: Program, values: frozenset[int], readers: Iterable[int]
) -> Crossings:
    """What of ``values`` crosses each place on its way to an op of ``readers``."""
    reads: dict[int, list[int]] = {}
    for index in readers:
        for value in dict.fromkeys(program.ops[index].operands):
            if value in values:
                reads.setdefault(value, []).append(index)
    born = program.producer
    spans = tuple(
        Span(v, born[v], max(ops), len(ops)) for v, ops in reads.items() if v in born
    )

    def sums(weight: Callable[[Span], int]) -> tuple[int, ...]:
        change = [0] * (len(program.ops) + 2)
        for span in spans:
            change[span.born + 1] += weight(span)
            change[span.dies + 1] -= weight(span)
        return tuple(accumulate(change[:-1]))

    return Crossings(
        spans,
        sums(lambda span: 1),
        sums(lambda span: int(span.readers == 1)),
        sums(lambda span: program.values[span.value].num_bytes),
    )
