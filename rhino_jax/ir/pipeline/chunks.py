"""An assignment cut in chunks: parts that run on one stage, one after the other.

Chunks of a step in the order in which they can run: those before the accumulation loop,
level by level; for every microbatch the forward halves from the first stage to the last
and the backward halves back again; then those behind the loop, level by level. A unit
runs where its label says, but never before what it reads: so no two chunks wait for one
another, whatever the labels say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rhino_jax.ir.pipeline.flow import (
    BEFORE,
    FINAL,
    GIVEN,
    LEAVE,
    LOOP,
    OP,
    TOTAL,
    Flow,
    Unit,
    Version,
)
from rhino_jax.ir.pipeline.labels import Label


@dataclass(frozen=True, order=True)
class Key:
    """Which chunk: ``place`` is a level before or behind the loop, a position in it.

    Positions are 0 .. stages - 1 forward, then stages .. 2 * stages - 1 backward; the
    weight halves of a split backward pass have 2 * stages + the stage.
    """

    phase: int
    place: int
    stage: int


@dataclass(frozen=True)
class Read:
    """A version that a chunk takes, and who gives it (None: it is an input)."""

    version: Version
    source: Key | None


@dataclass(frozen=True)
class Leaving:
    """A version that leaves the loop by its move ``index``, and whose turns make it."""

    index: int
    how: str
    read: Read


@dataclass(frozen=True)
class Chunk:
    """Units that run as one program on one stage.

    ``units`` are numbers of the flow's units, in order. ``reads`` come from other
    chunks, ``gives`` are versions that others read. ``leaves`` come from every
    microbatch; ``totals`` (numbers of ``loop.leave``) are sums that this chunk of the
    loop adds its terms to.
    """

    key: Key
    units: tuple[int, ...]
    reads: tuple[Read, ...]
    gives: tuple[Version, ...]
    leaves: tuple[Leaving, ...] = ()
    totals: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chunks:
    """All chunks in an order in which they can run.

    ``homes`` are the stages that inputs live on, ``outputs`` who gives each output
    (None: it is an input). ``split``: backward halves are cut in two.
    """

    flow: Flow
    num_stages: int
    chunks: tuple[Chunk, ...]
    homes: tuple[int, ...]
    outputs: tuple[Read, ...]
    split: bool = False

    @cached_property
    def by_key(self) -> Mapping[Key, Chunk]:
        return {chunk.key: chunk for chunk in self.chunks}

    def key_of(self, kind: str, stage: int) -> Key:
        """The chunk of the loop that is the "forward" or "backward" half of a stage."""
        backward = 2 * self.num_stages - 1 - stage
        places = {
            "forward": stage,
            "backward": backward,
            "backward_input": backward,
            "backward_weight": 2 * self.num_stages + stage,
        }
        return Key(LOOP, places[kind], stage)

    def kind_of(self, key: Key) -> str:
        """The kind of task that runs a chunk of the loop: the inverse of key_of."""
        if self.split and key.place >= self.num_stages:
            last = key.place >= 2 * self.num_stages
            return "backward_weight" if last else "backward_input"
        return self.side(key)

    def left_by(self, leave: int) -> Version:
        """The version that leaves the loop by its move ``leave``."""
        return next(
            one.read.version
            for chunk in self.chunks
            for one in chunk.leaves
            if one.index == leave
        )

    def side(self, key: Key) -> str:
        """ "before", "forward", "backward", "weights" or "after"."""
        if key.phase != LOOP:
            return "before" if key.phase == BEFORE else "after"
        return ("forward", "backward", "weights")[key.place // self.num_stages]


def cut(
    flow: Flow,
    labels: Sequence[Label],
    num_stages: int,
    inputs: Sequence[Version],
    pairs: Mapping[int, int],
    split: bool = False,
) -> Chunks:
    """``flow`` cut in chunks.

    Args:
        labels: one an op of the Program.
        inputs: the step's inputs, each as it lies.
        pairs: positions of state inputs and of the outputs that succeed them: both
            live on one stage.
        split: cut from every backward half what no other part of the loop reads (the
            gradients of parameters), to be run later.
    """
    work = _Cutting(flow, labels, num_stages)
    work.place()
    if split:
        work.split()
    return replace(work.chunks(inputs, pairs), split=split)


@dataclass
class _Cutting:
    flow: Flow
    labels: Sequence[Label]
    num_stages: int
    keys: list[tuple[Key, ...]] = field(default_factory=list)
    """The chunks that each unit runs in; several, where it is spread."""

    def label(self, unit: Unit) -> Label:
        return self.labels[unit.index] if unit.kind == OP else Label()

    def place(self) -> None:
        spread = self._spread()
        for number, unit in enumerate(self.flow.units):
            sources = [self.keys[maker] for _, maker in unit.reads if maker != GIVEN]
            phase = max([unit.phase, *(min(keys).phase for keys in sources)])
            unit = replace(unit, phase=phase)
            if unit.phase == LOOP:
                self.keys.append(self._in_loop(unit, sources, spread.get(number)))
            else:
                self.keys.append(self._outside(unit, sources, spread.get(number)))

    def _spread(self) -> dict[int, tuple[int, ...]]:
        """The stages on which spread units are read."""
        units = self.flow.units
        wanted: dict[int, set[int]] = {}
        for number in reversed(range(len(units))):
            unit = units[number]
            label = self.label(unit)
            here = wanted.get(number, set()) if label.spread else {label.stage}
            for _, maker in unit.reads:
                if maker != GIVEN and self.label(units[maker]).spread:
                    wanted.setdefault(maker, set()).update(
                        stage for stage in here if stage is not None
                    )
        return {number: tuple(sorted(stages)) for number, stages in wanted.items()}

    def _in_loop(
        self,
        unit: Unit,
        sources: Sequence[tuple[Key, ...]],
        spread: Sequence[int] | None,
    ) -> tuple[Key, ...]:
        floor = max(
            (min(keys).place for keys in sources if min(keys).phase == LOOP),
            default=0,
        )
        label = self.label(unit)
        if label.spread:
            places = [stage for stage in spread or () if stage >= floor] or [floor]
        elif label.stage is None:
            places = [floor]
        elif label.backward:
            places = [max(floor, 2 * self.num_stages - 1 - label.stage)]
        else:
            places = [max(floor, label.stage)]
        return tuple(self._position(place) for place in places)

    def _position(self, place: int) -> Key:
        return Key(LOOP, place, min(place, 2 * self.num_stages - 1 - place))

    def split(self) -> None:
        """Move what no other chunk of the loop reads to the weight halves."""
        stay: set[int] = set()
        units = self.flow.units
        for number in reversed(range(len(units))):
            keys = self.keys[number]
            last = max(keys)
            if last.phase > LOOP:
                continue
            halves = last.phase == LOOP and last.place >= self.num_stages
            here = {last} if halves else set()
            for _, maker in units[number].reads:
                if maker != GIVEN and (number in stay or set(self.keys[maker]) != here):
                    stay.add(maker)
            if halves and number not in stay:
                stage = last.stage
                self.keys[number] = (Key(LOOP, 2 * self.num_stages + stage, stage),)

    def _outside(
        self,
        unit: Unit,
        sources: Sequence[tuple[Key, ...]],
        spread: Sequence[int] | None,
    ) -> tuple[Key, ...]:
        label = self.label(unit)
        stages: Sequence[int] = (0,)
        if unit.kind == LEAVE or unit.kind == FINAL:
            stages = [keys[0].stage for keys in sources[:1]] or stages
        elif label.spread:
            stages = spread or stages
        elif label.stage is not None:
            stages = (label.stage,)
        elif sources:
            stages = (max(sources[-1]).stage,)
        return tuple(self._level(unit.phase, stage, sources) for stage in stages)

    def _level(self, phase: int, stage: int, sources: Sequence[tuple[Key, ...]]) -> Key:
        """The first level at which all of ``sources`` are there, or are sent."""
        level = 0
        for keys in sources:
            now = [key for key in keys if key.phase == phase]
            if len(now) == len(keys):
                level = max(
                    level,
                    min(key.place + (key.stage != stage) for key in now),
                )
        return Key(phase, level, stage)

    def _source(self, maker: int, reader: Key) -> Key | None:
        """Which of the places where a unit runs a chunk takes its versions from."""
        if maker == GIVEN:
            return None
        found = self.keys[maker]
        if reader in found:
            return reader
        ahead = [key for key in found if _before(key, reader)]
        assert ahead, f"nothing that {reader} reads runs before it: {found}"
        here = [key for key in ahead if key.stage == reader.stage]
        return min(here or ahead)

    def chunks(self, inputs: Sequence[Version], pairs: Mapping[int, int]) -> Chunks:
        members: dict[Key, list[int]] = {}
        for number, keys in enumerate(self.keys):
            for key in keys:
                members.setdefault(key, []).append(number)
        reads = {key: self._reads(key, members[key]) for key in members}
        leaves = {key: tuple(self._leaves(key, members[key])) for key in members}
        outputs = tuple(
            Read(version, None if maker == GIVEN else min(self.keys[maker]))
            for version, maker in self.flow.outputs
        )
        gives: dict[Key, dict[Version, None]] = {key: {} for key in members}
        totals: dict[Key, list[int]] = {key: [] for key in members}
        taken = [*outputs, *(read for found in reads.values() for read in found)]
        for leaving in (leaving for found in leaves.values() for leaving in found):
            assert leaving.read.source is not None
            if leaving.how == TOTAL:
                totals[leaving.read.source].append(leaving.index)
            else:
                taken.append(leaving.read)
        for read in taken:
            if read.source is not None:
                gives[read.source][read.version] = None
        chunks = tuple(
            Chunk(
                key,
                tuple(members[key]),
                reads[key],
                tuple(gives[key]),
                leaves[key],
                tuple(totals[key]),
            )
            for key in sorted(members)
        )
        homes = tuple(_homes(inputs, pairs, chunks, outputs))
        return Chunks(self.flow, self.num_stages, chunks, homes, outputs)

    def _reads(self, key: Key, units: Iterable[int]) -> tuple[Read, ...]:
        found: dict[Version, Read] = {}
        for number in units:
            unit = self.flow.units[number]
            for version, maker in () if unit.how else unit.reads:
                source = self._source(maker, key)
                if source != key and version not in found:
                    found[version] = Read(version, source)
        return tuple(found.values())

    def _leaves(self, key: Key, units: Iterable[int]) -> Iterator[Leaving]:
        for number in units:
            unit = self.flow.units[number]
            if unit.how:
                ((version, maker),) = unit.reads
                read = Read(version, self._source(maker, key))
                yield Leaving(unit.index, unit.how, read)


def _before(one: Key, other: Key) -> bool:
    """Whether what ``one`` gives is there when ``other`` runs."""
    if one.phase != other.phase:
        return one.phase < other.phase
    return one.place < other.place or one == other


def _homes(
    inputs: Sequence[Version],
    pairs: Mapping[int, int],
    chunks: Sequence[Chunk],
    outputs: Sequence[Read],
) -> Iterable[int]:
    """Where each input lives: with its successor, or where it is read first."""
    first: dict[Version, int] = {}
    for chunk in chunks:
        for read in chunk.reads:
            if read.source is None:
                first.setdefault(read.version, chunk.key.stage)
    for position, version in enumerate(inputs):
        successor = outputs[pairs[position]].source if position in pairs else None
        yield first.get(version, 0) if successor is None else successor.stage
