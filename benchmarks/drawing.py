"""Plans of a step, drawn by seed from what the search chooses among.

The search's variables are layouts of inputs and choices of ops. A plan is drawn on a
mesh at random, and with microbatches at random: of some variables, more or fewer, one
of the slots that the search weighs is held at random, and all others are its own
answer around them. So drawn plans go from hardly worse than the best to many times
worse; those :func:`spread` takes lie evenly between.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.api.planned import subject_of
from rhino_jax.cluster.topology import Cluster, linked
from rhino_jax.cost.model import Prediction, predict
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Wish
from rhino_jax.search.descend import Answer, chosen, search_axes, starts
from rhino_jax.search.domains import Slots
from rhino_jax.search.energy import Energy
from rhino_jax.search.meshes import candidate_meshes
from rhino_jax.search.microbatch import microbatched
from rhino_jax.search.planner import Request, energy_of, read, written
from rhino_jax.search.prices import ClusterPrices
from rhino_jax.search.problem import FORBIDDEN
from rhino_jax.search.remat import NONE
from rhino_jax.search.solve import solve
from rhino_jax.search.timing import Refusal
from rhino_jax.trace import Traced

FEWEST = 1e-3
"""Share of the variables that are held, at least; the logarithm is drawn evenly."""
MICROBATCHES = (1, 1, 1, 2)
PLENTY_BYTES = 2**50


@dataclass(frozen=True)
class Drawn:
    """A plan, what is predicted of it, and the share of variables that were held."""

    mesh: Mesh
    assignment: Assignment
    prediction: Prediction
    microbatches: int = 1
    held: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted, of one step."""
        return self.prediction.step_seconds

    def __str__(self) -> str:
        times = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"mesh ({self.mesh}){times}, {self.held:.1%} held"


def found_plan(traced: Traced, cluster: Cluster) -> Drawn:
    """The plan that the search finds."""
    meshes = candidate_meshes(cluster, 2)
    wish = Wish(cluster, meshes, PLENTY_BYTES, remat=NONE, donated=traced.donated)
    best = plan_search(subject_of(traced), wish).best
    return Drawn(best.mesh, best.assignment, best.prediction, best.microbatches)


def draws(
    traced: Traced, cluster: Cluster, tries: int, rng: random.Random
) -> Iterator[Drawn]:
    """Plans of so many tries; a try that gives none gives none."""
    subject, prices = subject_of(traced), ClusterPrices(cluster)
    reading = read(subject)
    answers: dict[Mesh, tuple[Energy, Answer]] = {}
    meshes = candidate_meshes(cluster, 2)
    for _ in range(tries):
        mesh, share = rng.choice(meshes), FEWEST ** rng.random()
        count = rng.choice(MICROBATCHES)
        if mesh not in answers:
            energy = energy_of(reading, Request(linked(cluster, mesh), prices))
            answers[mesh] = energy, search_axes(energy, starts(energy), 1)
        energy, best = answers[mesh]
        answer = around(energy, best, held_slots(energy, share, rng))
        if answer.ticks >= FORBIDDEN:
            continue
        assignment, over = written(reading, energy, answer).assignment, energy.mesh
        if count > 1:
            timed = microbatched(subject, assignment, over, count)
            if isinstance(timed, Refusal):
                continue
            assignment, over = timed
        told = predict(
            subject.program, assignment, over, cluster, rule_of, traced.donated
        )
        yield Drawn(energy.mesh, assignment, told, count, share)


def held_slots(energy: Energy, share: float, rng: random.Random) -> Mapping[int, Slots]:
    """For a share of the variables slots at random, of those that can be."""
    held = {}
    for v, kind in enumerate(energy.kinds):
        slots = tuple(rng.choice(kind.options(name)) for name in energy.mesh.names)
        if rng.random() < share and kind.meaning(slots) is not None:
            held[v] = slots
    return held


def around(energy: Energy, best: Answer, held: Mapping[int, Slots]) -> Answer:
    """``best`` with some variables ``held``, the others bettered axis by axis."""
    slots = [held.get(v, at) for v, at in enumerate(best.slots)]
    axes = range(len(energy.mesh.axes))
    ticks = FORBIDDEN
    for axis in (*axes, *axes):
        domains = [
            kind.domain((at,)) if v in held else kind.around(at, axis)
            for v, (kind, at) in enumerate(zip(energy.kinds, slots, strict=True))
        ]
        found = solve(energy.problem(domains, 0.0), (0,) * len(domains))
        slots, ticks = list(chosen(domains, found.answer)), found.cost
    return Answer(tuple(slots), ticks)


def spread(
    found: Sequence[Drawn], count: int, within: float, rng: random.Random
) -> list[Drawn]:
    """The first, and others no slower than ``within`` times the fastest of all, at
    random but evenly: one of each of ``count - 1`` equal steps of the logarithm of the
    predicted seconds; where a step is empty, one of the fullest."""
    first, *others = {repr(one.assignment): one for one in found}.values()
    least = min(one.seconds for one in found)
    strata: list[list[Drawn]] = [[] for _ in range(count - 1)]
    for one in others:
        place = math.log(one.seconds / least) / math.log(within) * len(strata)
        if place < len(strata):
            strata[int(place)].append(one)
    for stratum in strata:
        rng.shuffle(stratum)
    taken = [stratum.pop() for stratum in strata if stratum]
    while len(taken) < count - 1 and any(strata):
        taken.append(max(strata, key=len).pop())
    return [first, *taken]
