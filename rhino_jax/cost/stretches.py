"""What each segment of a step costs: seconds forward, and bytes where they stand.

Read off a whole plan as it will run (:mod:`rhino_jax.cost.buffers`): the numbers of all
segments together give back its predicted peak in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.buffers import (
    ACCUMULATE,
    RuleOf,
    Unfolded,
    unfold,
)
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.combining import collective_seconds
from rhino_jax.cost.compute import kernel_works
from rhino_jax.cost.fusion import Fusion, fusion
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.handed import handed_by
from rhino_jax.cost.memory import Held
from rhino_jax.ir.analysis.segments import Segment
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program


@dataclass(frozen=True)
class Stretch:
    """One segment on one device.

    Attributes:
        op_seconds: of the ops of its forward half, moves included.
        saved_bytes: made forward, needed backward; ``exit_bytes`` of them are what
            enters the next segment.
        grad_bytes: made backward, needed by the update.
        peak_bytes: the most that stands during its backward half beside the inputs,
            what earlier segments saved and the gradients of later ones.
    """

    op_seconds: Mapping[int, float]
    saved_bytes: int
    exit_bytes: int
    grad_bytes: int
    peak_bytes: int


def stretches(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster,
    rule_of: RuleOf,
    donated: tuple[int, ...],
    segments: Sequence[Segment],
) -> tuple[Stretch, ...]:
    """What each of ``segments``, in their order, costs under a plan."""
    habits = HABITS[cluster.device.platform]
    unfolded = unfold(program, assignment, mesh, rule_of, donated, habits)
    fused = fusion(unfolded, habits)
    held = Held(unfolded, fused, habits)
    forward = {op: s.index for s in segments for op in s.forward}
    backward = {op: s.index for s in segments for op in s.backward}
    at = [x.index for x in unfolded.instructions]
    moments = [i for i, op in enumerate(at) if op in backward]
    if not moments:
        return tuple(Stretch({}, 0, 0, 0, 0) for _ in segments)
    first, last = moments[0], moments[-1]
    saved = dict.fromkeys((s.index for s in segments), 0)
    exits, grads = dict(saved), dict(saved)
    exit_of = {v: s.index for s in segments for v in s.exit}
    for buffer, birth in held.born.items():
        made = unfolded.buffers[buffer]
        op = at[birth] if 0 <= birth < len(at) else -1
        if held.dies[buffer] < first:
            continue
        if op in forward:
            saved[forward[op]] += made.num_bytes
            if exit_of.get(made.value) == forward[op]:
                exits[forward[op]] += made.num_bytes
        elif op in backward and held.dies[buffer] > last:
            grads[backward[op]] += made.num_bytes
    seconds = _op_seconds(unfolded, fused, mesh, cluster)
    others = {
        segment: sum(n for s, n in saved.items() if s < segment)
        + sum(n for s, n in grads.items() if s > segment)
        for segment in saved
    }
    most = dict.fromkeys(saved, 0)
    for i in moments:
        segment = backward[at[i]]
        most[segment] = max(most[segment], held.bytes_at[i] - others[segment])
    return tuple(
        Stretch(
            {op: seconds.get(op, 0.0) for op in s.forward},
            saved[s.index],
            exits[s.index],
            grads[s.index],
            most[s.index],
        )
        for s in segments
    )


def op_seconds(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster,
    rule_of: RuleOf,
) -> dict[int, float]:
    """Seconds of a whole step by op, each with its moves; all microbatches together.

    Moves with which a value leaves the loop count under ``~op`` of the op that makes
    it, what is behind the last op under the number of ops.
    """
    wide, loop = assignment.over(mesh), assignment.loop
    inside = frozenset(loop.ops if loop else ())
    habits = HABITS[cluster.device.platform]
    unfolded = unfold(program, assignment, mesh, rule_of, (), habits)
    loops = [one for one in unfolded.instructions if one.kind == ACCUMULATE]
    parts = [(unfolded, 1), *((body, x.trips) for x in loops for body in x.bodies)]
    found: dict[int, float] = {}
    for part, trips in parts:
        spent_by = _seconds(part, fusion(part, habits), wide, cluster)
        for one, seconds in zip(part.instructions, spent_by, strict=True):
            if one.kind == ACCUMULATE:
                continue
            op = one.index
            if part is unfolded and op in inside:
                (buffer,) = (*one.reads, *one.writes)[:1]
                op = ~program.producer[part.buffers[buffer].value]
            found[op] = found.get(op, 0.0) + trips * seconds
    return found


def _op_seconds(
    unfolded: Unfolded, fused: Fusion, mesh: Mesh, cluster: Cluster
) -> dict[int, float]:
    """Seconds by op, each with the moves of its operands."""
    found: dict[int, float] = {}
    spent = _seconds(unfolded, fused, mesh, cluster)
    for one, seconds in zip(unfolded.instructions, spent, strict=True):
        found[one.index] = found.get(one.index, 0.0) + seconds
    return found


def _seconds(
    unfolded: Unfolded, fused: Fusion, mesh: Mesh, cluster: Cluster
) -> Iterator[float]:
    """Of every instruction, bodies and collectives too."""
    device = cluster.device
    works = kernel_works(unfolded, fused, mesh, device)
    sent = collective_seconds(unfolded, fused, mesh, cluster)
    for number, (one, work) in enumerate(
        zip(unfolded.instructions, works, strict=True)
    ):
        if one.bodies:
            habits = HABITS[device.platform]
            inner = (
                _op_seconds(body, fusion(body, habits), mesh, cluster)
                for body in one.bodies
            )
            yield one.trips * sum(sum(body.values()) for body in inner)
        elif number in sent:
            yield sent[number]
        else:
            handed = handed_by(one, mesh)
            yield work.seconds + sum(
                around.turns * step_seconds(around.step, mesh, cluster)
                for around in handed
            )
