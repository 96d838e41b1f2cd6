"""What is asked of a search, the ways to run a step that it weighs, and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.model import Prediction
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.staged import Staged
from rhino_jax.search.descend import Answer
from rhino_jax.search.energy import Energy
from rhino_jax.search.planner import Reading
from rhino_jax.search.remat import NONE
from rhino_jax.search.specs import Spec
from rhino_jax.search.subject import Subject

MOST_MICROBATCHES = 64


@dataclass(frozen=True)
class Wish:
    """What is asked of a search.

    ``meshes`` to choose from; ``limit_bytes`` of one device. ``microbatches`` 0 and
    ``remat`` "" leave them to the search. ``more_memory`` says how a device could have
    more, where it could. ``pipeline``: the plan will be cut in stages. ``staged``: its
    scanned layers are, in one program, and divide the batch themselves.
    ``collective_matmul``: products may gather and scatter while they work. ``halos``:
    images may be cut in blocks.
    """

    cluster: Cluster
    meshes: tuple[Mesh, ...]
    limit_bytes: int
    level: int = 1
    microbatches: int = 0
    remat: str = ""
    pins: Mapping[str, Spec] = field(default_factory=dict)
    donated: tuple[int, ...] = ()
    more_memory: str = ""
    pipeline: bool = False
    staged: Staged | None = None
    collective_matmul: bool = False
    halos: bool = True


@dataclass(frozen=True)
class Sought:
    """What a search on one mesh saw of the step, and its answer."""

    reading: Reading
    energy: Energy
    answer: Answer


@dataclass(frozen=True)
class Candidate:
    """One complete way to run the step, and what it will cost."""

    subject: Subject
    mesh: Mesh
    assignment: Assignment
    prediction: Prediction
    remat: str
    microbatches: int
    byte_seconds: float
    segments: tuple[int, ...] | None = None
    """The segments that are recomputed, where not all are."""
    sought: Sought | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        seconds, peak = self.prediction.step_seconds, self.prediction.peak_bytes
        how = [f"mesh ({self.mesh})"]
        if self.remat != NONE:
            some = f" of {len(self.segments)} segments" if self.segments else ""
            how.append(f"remat {self.remat}{some}")
        if self.microbatches > 1:
            how.append(f"{self.microbatches} microbatches")
        return f"{', '.join(how)}: {seconds * 1e3:.2f} ms, {peak / 2**30:.2f} GiB"


@dataclass(frozen=True)
class Searched:
    """The winner, everything that was predicted on the way, and notes for the plan."""

    best: Candidate
    considered: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    reading_seconds: float = field(default=0.0, compare=False)
    """Time to read the Program, and again with layers rematerialized."""
    writing_seconds: float = field(default=0.0, compare=False)
    """Time to write plans and predict them. Both grow with the Program."""


def rank(candidate: Candidate) -> tuple[float, int, int]:
    """Faster first; among equals the smaller, then the one found first."""
    prediction = candidate.prediction
    return prediction.step_seconds, prediction.peak_bytes, candidate.microbatches


def microbatch_counts(batch_size: int) -> tuple[int, ...]:
    """Numbers of microbatches to try: divisors of the batch. Powers of two, and where
    they do not divide it all that do.

    >>> microbatch_counts(32), microbatch_counts(12), microbatch_counts(25)
    ((1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 6, 12), (1, 5, 25))
    """
    most = min(batch_size, MOST_MICROBATCHES)
    every = [n for n in range(1, most + 1) if batch_size % n == 0]
    powers = [1 << n for n in range(most.bit_length())]
    return tuple(powers if set(powers) <= set(every) else every)
