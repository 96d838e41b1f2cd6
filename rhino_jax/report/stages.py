"""The stages of a pipeline as text: what each holds, and what it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rhino_jax.ir.pipeline.chunks import Chunks
from rhino_jax.ir.pipeline.flow import LOOP, TOTAL, Version
from rhino_jax.plan import Stages
from rhino_jax.report.text import bytes_text

Edge = tuple[int, int]
"""The stage that sends, and the one that reads."""


@dataclass(frozen=True)
class StageRow:
    """One stage: bytes are those of each of its devices.

    ``inputs`` of the step live here, of ``input_bytes``. ``each`` and ``once`` are
    bytes sent to other stages, for every microbatch and once a step.
    """

    segments: str
    worker: int
    inputs: int
    input_bytes: int
    each: Mapping[int, int] = field(default_factory=dict)
    once: Mapping[int, int] = field(default_factory=dict)


def stage_rows(
    stages: Stages,
    chunks: Chunks,
    inputs: Sequence[Version],
    num_bytes: Callable[[Version], int],
    repeats: bool,
) -> tuple[StageRow, ...]:
    """A row a stage.

    Args:
        inputs: the step's inputs, each as it lies.
        num_bytes: of a version's part on one device.
        repeats: whether there is a loop over microbatches.
    """
    count = len(stages.segments)
    each: list[dict[int, int]] = [{} for _ in range(count)]
    once: list[dict[int, int]] = [{} for _ in range(count)]
    for (source, reader), phase, version in crossing(chunks, inputs):
        sent = each if phase == LOOP and repeats else once
        size = num_bytes(version)
        sent[source][reader] = sent[source].get(reader, 0) + size
    held: list[list[int]] = [[] for _ in range(count)]
    for version, home in zip(inputs, chunks.homes, strict=True):
        held[home].append(num_bytes(version))
    return tuple(
        StageRow(
            segments,
            stage % stages.num_workers,
            len(held[stage]),
            sum(held[stage]),
            each[stage],
            once[stage],
        )
        for stage, segments in enumerate(stages.segments)
    )


def crossing(
    chunks: Chunks, inputs: Sequence[Version]
) -> Iterator[tuple[Edge, int, Version]]:
    """What one stage makes and another reads, and in which phase it is made."""
    homes = dict(zip(inputs, chunks.homes, strict=True))
    seen = set()
    for chunk in chunks.chunks:
        left = (one.read for one in chunk.leaves if one.how != TOTAL)
        for read in (*chunk.reads, *left):
            source = read.source
            home = homes[read.version] if source is None else source.stage
            name = (source, read.version, chunk.key.stage)
            if home != chunk.key.stage and name not in seen:
                seen.add(name)
                phase = LOOP - 1 if source is None else source.phase
                yield (home, chunk.key.stage), phase, read.version


def stage_table(rows: Iterable[StageRow]) -> Iterator[tuple[str, ...]]:
    """The rows as text."""
    for stage, row in enumerate(rows):
        yield (
            f"stage {stage}",
            row.segments,
            str(row.worker),
            f"{row.inputs}, {bytes_text(row.input_bytes)}",
            _sent(row.each),
            _sent(row.once),
        )


def _sent(sent: Mapping[int, int]) -> str:
    return ", ".join(f"{bytes_text(n)} to {to}" for to, n in sorted(sent.items()))
