"""The plan of a step for a cluster, nothing given: meshes, memory, microbatches, remat.

Every mesh is searched at no price for memory first. The most promising are predicted as
they will run (:mod:`rhino_jax.cost.model`); one that does not fit is searched again at
rising prices for a byte, until it does. Only where nothing fits are activations
recomputed and batches divided. Of layers that stand one by one in the Program no more
are recomputed than must be (:mod:`rhino_jax.search.selective`); all are, where that is
not enough.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rhino_jax.cluster.topology import linked
from rhino_jax.cost.model import Prediction, predict
from rhino_jax.errors import InfeasibleError, problems
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.rules import rule_of
from rhino_jax.search.candidates import (
    Candidate,
    Searched,
    Sought,
    Wish,
    microbatch_counts,
    rank,
)
from rhino_jax.search.carry import carried, read_again
from rhino_jax.search.collective_matmul import interleaved
from rhino_jax.search.descend import Answer, Start, gap, search_axes, starts
from rhino_jax.search.energy import Energy, Memo
from rhino_jax.search.microbatch import microbatched
from rhino_jax.search.planner import Reading, Request, energy_of, read, written
from rhino_jax.search.prices import ClusterPrices, Prices
from rhino_jax.search.remat import BOUNDARY, NONE, apply_remat
from rhino_jax.search.selective import Chosen, Segmented, chosen_segments, segment_costs
from rhino_jax.search.staged import Scans, Uncut, fed, staged_scans
from rhino_jax.search.subject import Subject
from rhino_jax.search.timing import Refusal

LADDER = (0.0, 0.1, 0.4, 1.5, 6.0, 25.0)
"""Prices of a byte: the device's whole memory is worth this many steps."""

NOTHING = (
    "remat boundary changes nothing: layers are in a jax.checkpoint already, or there "
    "is one only"
)
READING, WRITING = "reading", "writing"
MOST_CORRECTIONS = 4
"""How often segments are chosen again because their plan did not fit after all."""

PREDICTED = (1, 3)
"""Meshes predicted as they will run, by optimization level."""


def plan_search(subject: Subject, wish: Wish) -> Searched:
    """The fastest plan that fits.

    Raises:
        InfeasibleError: none fits; says the bytes short and what would fit.
        PinError: pins that do not fit.
    """
    with _no_collections():
        return _Search(subject, wish).run()


@contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collections: a search makes millions of small values and no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Search:
    def __init__(self, subject: Subject, wish: Wish) -> None:
        self.subject = subject
        self.wish = wish
        self.prices: Prices = ClusterPrices(wish.cluster)
        self.meshes = list(wish.meshes)
        """The best ones, once they were compared: what else is tried, on these."""
        self.memos: dict[Mesh, Memo] = {}
        self.considered: list[Candidate] = []
        self.notes: dict[str, None] = {}
        self.refused = False
        self.uneven = False
        """Of microbatches that were refused: it was only their number."""
        self.cut: tuple[Program, Scans] | None = None
        self.spent = {READING: 0.0, WRITING: 0.0}

    def run(self) -> Searched:
        for found in self._ways():
            self.considered += found
            fitting = self._fitting(self.considered)
            if fitting:
                fewer = list(self._fewer(min(fitting, key=rank)))
                self.considered += fewer
                best = self._interleaved(
                    min([*fitting, *self._fitting(fewer)], key=rank)
                )
                notes = (*self.notes, *self._unproven(best))
                considered = tuple(self.considered)
                times = self.spent[READING], self.spent[WRITING]
                return Searched(best, considered, notes, *times)
        raise self._infeasible()

    def _interleaved(self, best: Candidate) -> Candidate:
        """``best`` with collectives done within products, if that is better."""
        if not self.wish.collective_matmul:
            return best
        cluster = self.wish.cluster
        assignment = interleaved(
            best.subject.program, best.assignment, best.mesh, cluster
        )
        found = replace(
            best,
            assignment=assignment,
            prediction=self._predicted(best.subject, assignment, best.mesh),
        )
        better = found.prediction.step_seconds < best.prediction.step_seconds
        return found if better and self._fits(found) else best

    def _unproven(self, best: Candidate) -> Iterator[str]:
        """What is to be said of a plan that is not the best for certain."""
        assert best.sought is not None
        sought = best.sought
        if sought.answer.proven:
            return
        ticks = best.byte_seconds * self.prices.ticks_per_second
        share = gap(sought.energy, sought.answer, ticks)
        yield (
            "too wide to be searched to the end: by the search's own prices, another "
            f"plan could be at most {share:.1%} cheaper along one mesh axis"
        )

    def _ways(self) -> Iterator[Iterator[Candidate]]:
        """Ever more that is done to fit: what was found each time."""
        wish = self.wish
        policies = (wish.remat,) if wish.remat else (NONE, BOUNDARY)
        counts = microbatch_counts(self.subject.batch_size)
        if wish.microbatches:
            counts = (wish.microbatches,)
        if wish.staged:
            counts = (1,)
        yield self._with(policies[:1], counts[:1])
        if len(policies) > 1:
            if counts[0] == 1:
                yield self._partly()
            yield self._with(policies[1:], counts[:1])
        for count in counts[1:]:
            if self.refused:
                return
            yield self._with(policies, (count,))

    def _with(
        self, policies: Sequence[str], counts: Sequence[int]
    ) -> Iterator[Candidate]:
        for policy in policies:
            with self._timed(READING):
                subject = self._under(policy)
            if policy != NONE and subject.program is self.subject.program:
                if not self.wish.remat:
                    continue
                self.notes[NOTHING] = None
            yield from self._on_meshes(subject, policy, counts)

    def _partly(self, than: float = math.inf) -> Iterator[Candidate]:
        """Plans that recompute some segments of what is fast but does not fit.

        Those first that promise to be fastest, faster ``than`` so many seconds; until
        one fits.
        """
        ways: list[tuple[float, Candidate, Segmented, Chosen]] = []
        for plain in self._plain():
            seconds = plain.prediction.step_seconds
            if plain.byte_seconds or self._fits(plain) or seconds >= than:
                continue
            segments = self._segments(plain)
            chosen = chosen_segments(segments, self._free_bytes(plain))
            if chosen and seconds + chosen.seconds < than:
                ways.append((seconds + chosen.seconds, plain, segments, chosen))
        for _, plain, segments, chosen in sorted(ways, key=lambda way: way[0]):
            found = list(self._corrected(plain, segments, chosen))
            yield from found
            if self._fitting(found):
                return

    def _fewer(self, best: Candidate) -> Iterator[Candidate]:
        """Plans that recompute some segments, where ``best`` recomputes all of them or
        spares memory in another way."""
        if self.wish.remat or best.segments or best.microbatches > 1:
            return
        if best.remat == NONE:
            yield from self._partly(best.prediction.step_seconds)
            return
        plain = [c for c in self._plain() if c.mesh == best.mesh]
        if plain:
            near = min(plain, key=lambda c: abs(c.byte_seconds - best.byte_seconds))
            if near.byte_seconds:  # at no price for memory it was tried before
                segments = self._segments(near)
                chosen = chosen_segments(segments, self._free_bytes(near))
                yield from self._corrected(near, segments, chosen)

    def _plain(self) -> list[Candidate]:
        """What was found for the step as it is."""
        return [c for c in self.considered if (c.remat, c.microbatches) == (NONE, 1)]

    def _segments(self, plain: Candidate) -> Segmented:
        with self._timed(WRITING):
            return segment_costs(
                plain.subject,
                plain.assignment,
                plain.mesh,
                self.wish.cluster,
                self.wish.donated,
            )

    def _free_bytes(self, plain: Candidate) -> int:
        """Of one device, beside the inputs of the step."""
        return self.wish.limit_bytes - plain.prediction.memory.input_bytes

    def _corrected(
        self, plain: Candidate, segments: Segmented, chosen: Chosen | None
    ) -> Iterator[Candidate]:
        """``chosen`` segments of ``plain`` recomputed; more, if that does not fit."""
        limit = self._free_bytes(plain)
        tried: set[tuple[int, ...]] = set()
        for _ in range(MOST_CORRECTIONS):
            if chosen is None or chosen.segments in tried:
                return
            tried.add(chosen.segments)
            found = self._recomputing(chosen.segments, plain)
            yield found
            if self._fits(found):
                return
            limit -= found.prediction.compiled.placed_bytes - self.wish.limit_bytes
            chosen = chosen_segments(segments, limit)

    def _recomputing(self, chosen: tuple[int, ...], plain: Candidate) -> Candidate:
        """``plain`` with ``chosen`` segments recomputed: sought from there."""
        sought = plain.sought
        assert sought is not None
        with self._timed(READING):
            subject = self._under(BOUNDARY, chosen)
            reading = read_again(subject, sought.reading)
            start = carried(sought.answer, sought.energy.graph, reading.graph)
        price = plain.byte_seconds
        one = self._on(reading, plain.mesh, price, start)
        with self._timed(WRITING):
            found = self._candidate(one, BOUNDARY, 1, price)
        assert found is not None
        return replace(found, segments=chosen)

    def _on_meshes(
        self, subject: Subject, policy: str, counts: Sequence[int]
    ) -> Iterator[Candidate]:
        with self._timed(READING):
            scans = self._scans(subject)
            reading = read(subject, scans.staged if scans else {})
        even = max(counts) > 1 or scans is not None
        meshes = [self._on(reading, mesh, even=even) for mesh in self.meshes]
        meshes.sort(key=lambda one: one.answer.ticks)
        most = PREDICTED[self.wish.level - 1]
        kept: list[Sought] = []
        for one in meshes:
            if len(kept) == most:
                break
            if self.wish.level > 1:
                answer = self._answer(one.energy, level=self.wish.level)
                one = replace(one, answer=answer)
            found = [
                candidate
                for count in counts
                for candidate in self._up_the_ladder(one, policy, count)
            ]
            # Microbatches that do not fit the best mesh may fit another.
            if found:
                kept.append(one)
            yield from found
        self.refused = not kept and not self.uneven
        self.meshes = [one.energy.mesh for one in kept or meshes[:most]]

    def _under(self, policy: str, only: Sequence[int] | None = None) -> Subject:
        """The subject under a remat policy."""
        was = self.subject
        program = apply_remat(was.program, was.pairs, was.batch_inputs, policy, only)
        return replace(was, program=program)

    def _scans(self, subject: Subject) -> Scans | None:
        """The scans that are pipelined, where some are to be."""
        if self.wish.staged is None:
            return None
        if self.cut is None or self.cut[0] is not subject.program:
            found = staged_scans(subject, self.wish.staged)
            assert isinstance(found, Scans), f"asked for stages, and {found}"
            self.cut = subject.program, found
        return self.cut[1]

    def _on(
        self,
        reading: Reading,
        mesh: Mesh,
        byte_seconds: float = 0.0,
        start: Start | None = None,
        even: bool = False,
    ) -> Sought:
        """One mesh searched, at a price for memory."""
        wish = self.wish
        on = linked(wish.cluster, mesh)
        request = Request(on, self.prices, pins=wish.pins, even=even, halos=wish.halos)
        energy = energy_of(reading, request, self.memos.setdefault(on, Memo()))
        return Sought(reading, energy, self._answer(energy, byte_seconds, start=start))

    def _answer(
        self,
        energy: Energy,
        byte_seconds: float = 0.0,
        level: int = 1,
        start: Start | None = None,
    ) -> Answer:
        """The best answer of a level; which mesh is best is told by level 1."""
        ticks = byte_seconds * self.prices.ticks_per_second
        begin = (start,) if start else starts(energy)
        return search_axes(energy, begin, level, ticks)

    def _up_the_ladder(
        self, one: Sought, policy: str, count: int
    ) -> Iterator[Candidate]:
        """Answers at rising prices for memory, until one fits.

        The highest price is tried right after none, where dividing all that stands at
        the peak among all devices could make it fit; where that price does not, nothing
        between is tried. One device has one answer at any price.
        """
        seconds = one.answer.ticks / self.prices.ticks_per_second
        first, *between, last = LADDER if one.energy.mesh.axes else (0.0, 0.0)
        seen: set[Answer] = set()
        for price in (first, last, *between):
            per_byte = price * seconds / self.wish.limit_bytes
            answer = self._answer(one.energy, per_byte) if price else one.answer
            if answer in seen:
                continue
            seen.add(answer)
            with self._timed(WRITING):
                found = self._candidate(
                    replace(one, answer=answer), policy, count, per_byte
                )
            if found is None:
                return
            yield found
            if self._fits(found) == (price != last):
                return
            if not price:
                spare = one.energy.spare_bytes(answer.slots)
                if found.prediction.peak_bytes - spare > self.wish.limit_bytes:
                    return

    def _candidate(
        self, one: Sought, policy: str, count: int, byte_seconds: float
    ) -> Candidate | None:
        subject = one.reading.subject
        assignment = written(one.reading, one.energy, one.answer).assignment
        mesh = one.energy.mesh
        over = mesh
        scans = self._scans(subject)
        if scans:
            divided = fed(scans, subject.program, assignment, mesh)
            if isinstance(divided, Uncut):
                self.notes.update(dict.fromkeys(divided.reasons))
                return None
            assignment = divided
        elif count > 1:
            owner = subject.segmentation.owner if self.wish.pipeline else ()
            timed = microbatched(subject, assignment, mesh, count, owner)
            if isinstance(timed, Refusal):
                self.uneven = timed.uneven
                self.notes.update(
                    dict.fromkeys(f"no microbatches: {r}" for r in timed.reasons)
                )
                return None
            assignment, over = timed
        return Candidate(
            subject,
            mesh,
            assignment,
            self._predicted(subject, assignment, over),
            policy,
            count,
            byte_seconds,
            sought=one,
        )

    def _predicted(
        self, subject: Subject, assignment: Assignment, mesh: Mesh
    ) -> Prediction:
        wish = self.wish
        return predict(
            *(subject.program, assignment, mesh, wish.cluster, rule_of),
            *(wish.donated, wish.limit_bytes),
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - began

    def _fitting(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [c for c in candidates if self._fits(c)]

    def _fits(self, candidate: Candidate) -> bool:
        return candidate.prediction.compiled.placed_bytes <= self.wish.limit_bytes

    def _infeasible(self) -> InfeasibleError:
        """The bytes short of the nearest plan, and what would make it fit."""
        limit = self.wish.limit_bytes
        what = (
            f"no plan fits {limit / 2**30:.2f} GiB a device on {self.wish.cluster.name}"
        )
        if not self.considered:
            asked = f"microbatches={self.wish.microbatches} can not be:"
            return InfeasibleError(
                problems(asked, self.notes, "Leave microbatches to the search.")
            )
        near = min(self.considered, key=lambda c: c.prediction.compiled.placed_bytes)
        peak = near.prediction.compiled.placed_bytes
        devices = self.wish.cluster.num_devices
        more = max(2, -(-peak // limit))
        inside = [
            f"{name}: {size / 2**30:.2f} GiB"
            for name, size in near.prediction.memory.at_peak[:4]
        ]
        return InfeasibleError(
            problems(
                f"{what}; the smallest found needs {peak / 2**30:.2f} GiB, "
                f"{(peak - limit) / 2**30:.2f} GiB too much ({near}). At its peak "
                f"stand inputs of {near.prediction.memory.input_bytes / 2**30:.2f} GiB "
                "and:",
                [*inside, *self.notes],
                f"About {devices * more} devices would hold it; or "
                f"{self.wish.more_memory or 'raise memory_limit_bytes'}, shorten the "
                "batch, or free what is pinned.",
            )
        )
