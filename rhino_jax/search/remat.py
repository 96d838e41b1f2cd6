"""Rematerialization: a Program in which the backward pass recomputes what it reads.

Under the policy "boundary" a layer keeps what enters it. Right before its backward half
stands a copy of the forward ops that the backward half needs, made from the entry and
the parameters; the backward half reads the copies. The entry passes a ``rematerialize``
op, which waits for the cotangent that enters the layer's backward half (its ``waits``):
without it compilers would see that the copies compute what is known already, or compute
them long before they are needed. It waits for all that the layer behind hands on, too:
its gradients, and its terms of gradients that several layers add to (a tied embedding,
a position bias). Left alone, compilers compute those of all layers at the end, and keep
what they are made of until then.

The search and the recipes plan the new Program like any other. Scanned layers are
recomputed turn by turn (:mod:`rhino_jax.search.remat_scans`); no loop over layers is
copied as a whole, which would save nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.ir.analysis.cuts import cuts
from rhino_jax.ir.analysis.regions import BACKWARD, EPILOGUE, Regions, regions
from rhino_jax.ir.analysis.segments import Segment, Segmentation, segments
from rhino_jax.ir.check import check
from rhino_jax.ir.program import WAITS, Op, Program, Value
from rhino_jax.rules import HEAVY
from rhino_jax.search.remat_scans import (
    REMATERIALIZE,
    copied,
    layer_scans,
    rematerialize_scans,
)

NONE, BOUNDARY = "none", "boundary"


def apply_remat(
    program: Program,
    pairs: Mapping[int, int],
    batch_inputs: Collection[int],
    policy: str,
    only: Collection[int] | None = None,
) -> Program:
    """``program`` under ``policy``; the same object where that changes nothing.

    Args:
        pairs: positions of state inputs and of the outputs that succeed them.
        batch_inputs: positions of what a call brings anew.
        policy: "none" or "boundary".
        only: the segments to recompute; all of them and all scanned layers, if None.
    """
    if policy == NONE:
        return program
    assert policy == BOUNDARY, policy
    if only is None:
        found = regions(program, pairs, batch_inputs)
        scanned = rematerialize_scans(program, found)
        if scanned is not program:
            program = check(scanned, "rematerialization of scans")
    work = _rewriting(program, pairs, batch_inputs)
    for segment in work.divided.segments:
        if only is None or segment.index in only:
            work.add(segment)
    return work.finish()


def recomputable(
    program: Program, pairs: Mapping[int, int], batch_inputs: Collection[int]
) -> tuple[tuple[Segment, frozenset[int]], ...]:
    """Every segment, with the forward ops that "boundary" has it do again; none where
    that would save nothing."""
    work = _rewriting(program, pairs, batch_inputs)
    return tuple(
        (segment, frozenset(work.again(segment)[0]))
        for segment in work.divided.segments
    )


def _rewriting(
    program: Program, pairs: Mapping[int, int], batch_inputs: Collection[int]
) -> _Rewriting:
    found = regions(program, pairs, batch_inputs)
    places = cuts(program, found, pairs, HEAVY)
    divided = segments(program, found, places, pairs, HEAVY)
    loops = frozenset(pair.forward for pair in layer_scans(program, found))
    return _Rewriting(program, found, divided, loops)


@dataclass
class _Rewriting:
    program: Program
    regions: Regions
    divided: Segmentation
    loops: frozenset[int]
    values: list[Value] = field(default_factory=list)
    before: dict[int, list[Op]] = field(default_factory=dict)
    changed: dict[int, dict[int, int]] = field(default_factory=dict)

    def add(self, segment: Segment) -> None:
        """Have ``segment`` recomputed, where that saves something."""
        needed, barriers = self.again(segment)
        if not needed:
            return
        made = {v for i in needed for v in self.program.ops[i].results}
        place = self._place(segment, made | {anchor for _, anchor in barriers})
        renamed: dict[int, int] = {}
        handed_on = self._handed_on(segment, place)
        ops = [
            self._barrier(v, tuple({anchor: 0, **handed_on}), place, renamed)
            for v, anchor in barriers
        ]
        ops += [self._copy(i, renamed) for i in needed]
        self.before.setdefault(place, []).extend(ops)
        for index in segment.backward:
            reads = made.intersection(self.program.ops[index].operands)
            if reads:
                names = self.changed.setdefault(index, {})
                names.update((v, renamed[v]) for v in reads)

    def again(self, segment: Segment) -> tuple[list[int], list[tuple[int, int]]]:
        """The forward ops to do again and the barriers before them; nothing where that
        saves nothing or can not be."""
        if not segment.backward or not segment.entry:
            return [], []
        place = segment.backward[0]
        needed = self._needed(segment, segment.backward)
        barriers = list(self._barriers(segment, place, needed))
        if not barriers or not self.loops.isdisjoint(needed):
            return [], []
        if any(self.program.ops[i].effects for i in needed):
            return [], []
        return needed, barriers

    def _needed(self, segment: Segment, readers: Sequence[int]) -> list[int]:
        """The forward ops to copy: what is read later, back to the entry."""
        kept = {*segment.entry, *segment.exit}
        ahead = frozenset(segment.forward)
        wanted = {v for i in readers for v in self.program.ops[i].operands}
        found = []
        for index in sorted(ahead, reverse=True):
            op = self.program.ops[index]
            if not wanted.isdisjoint(set(op.results) - kept):
                found.append(index)
                wanted.update(op.operands)
        return found[::-1]

    def _barriers(
        self, segment: Segment, place: int, needed: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Entries that the copies read, each with a cotangent of its shape."""
        reads = {v for i in needed for v in self.program.ops[i].operands}
        for v in segment.entry:
            anchor = self._anchor(segment, place, self.program.values[v])
            if v in reads and anchor is not None:
                yield v, anchor

    def _anchor(self, segment: Segment, place: int, like: Value) -> int | None:
        """A cotangent that enters the backward half, of one shape and type."""
        producer = self.program.producer
        for index in segment.backward:
            for v in self.program.ops[index].operands:
                made = producer.get(v, place)
                if made < place and self.regions.of[made] in (BACKWARD, EPILOGUE):
                    value = self.program.values[v]
                    if (value.shape, value.dtype) == (like.shape, like.dtype):
                        return v
        return None

    def _place(self, segment: Segment, awaited: set[int]) -> int:
        """Where the backward half begins to read what is ``awaited``: cotangents that
        enter it, and copies.

        Before that it may finish a term that the layer behind began.
        """
        return next(
            i
            for i in segment.backward
            if not awaited.isdisjoint(self.program.ops[i].operands)
        )

    def _handed_on(self, segment: Segment, place: int) -> dict[int, None]:
        """What backward halves from the layer behind up to ``place`` give to later ops
        and to the epilogue."""
        found: dict[int, None] = {}
        segments = self.divided.segments[segment.index : segment.index + 2]
        for i in sorted(i for one in segments for i in one.backward if i < place):
            for v in self.program.ops[i].results:
                uses = self.program.uses.get(v, ())
                if any(j >= place or self.regions.of[j] == EPILOGUE for j in uses):
                    found[v] = None
        return found

    def _new(self, like: int) -> int:
        value = replace(self.program.values[like], name="")
        self.values.append(value)
        return len(self.program.values) + len(self.values) - 1

    def _barrier(
        self,
        v: int,
        waits: tuple[int, ...],
        place: int,
        renamed: dict[int, int],
    ) -> Op:
        renamed[v] = self._new(v)
        where = self.program.ops[place].where
        return Op(REMATERIALIZE, (v,), (renamed[v],), ((WAITS, waits),), where=where)

    def _copy(self, index: int, renamed: dict[int, int]) -> Op:
        op = self.program.ops[index]
        operands = tuple(renamed.get(v, v) for v in op.operands)
        results = tuple(self._new(v) for v in op.results)
        renamed.update(zip(op.results, results, strict=True))
        return copied(op, operands, results)

    def finish(self) -> Program:
        if not self.before:
            return self.program
        ops: list[Op] = []
        for index, op in enumerate(self.program.ops):
            ops += self.before.get(index, ())
            names = self.changed.get(index)
            if names:
                op = replace(op, operands=tuple(names.get(v, v) for v in op.operands))
            ops.append(op)
        program = replace(
            self.program, values=(*self.program.values, *self.values), ops=tuple(ops)
        )
        return check(program, "rematerialization")
