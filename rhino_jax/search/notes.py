"""What a plan says in words: what it could not split, and what it took for granted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.compute import op_work
from rhino_jax.ir.assignment import Assignment, OpPlan, trips_of
from rhino_jax.ir.layout import padded_size
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.steps import ALL_GATHER, REDUCE_SCATTER
from rhino_jax.rules import rule_of
from rhino_jax.rules.attention import RULES as ATTENTION
from rhino_jax.rules.attention import shardable
from rhino_jax.rules.effects import ONCE
from rhino_jax.rules.manual import MANUAL_AXES, SHARD_MAP
from rhino_jax.rules.random import is_drawn_whole
from rhino_jax.search.specs import ignored_constraints


@dataclass
class _Cost:
    """How often ops of one kind run, the bytes moved for them, and their seconds."""

    times: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


def plan_notes(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster | None = None,
    step_seconds: float = 0.0,
) -> tuple[str, ...]:
    """One line for everything a reader should know of how a step is carried out.

    With a ``cluster`` and the predicted ``step_seconds`` the ops that no family knows,
    and work on padding, come with their share of the step.
    """
    over = assignment.over(mesh)
    return (
        *_fallbacks(program, assignment, over, cluster, step_seconds),
        *_uneven(program, assignment, over, cluster, step_seconds),
        *_within(program, assignment),
        *dict.fromkeys(_remarks(program)),
        *ignored_constraints(program, mesh),
        *dict.fromkeys(_whole_over(program, mesh)),
    )


def _whole_over(program: Program, mesh: Mesh) -> Iterator[str]:
    """Axes that a ``shard_map`` of the user's does not know of."""
    for _, op in program.walk():
        if op.kind == SHARD_MAP:
            known = op.param[MANUAL_AXES]
            idle = [a.name for a in mesh.axes if a.size > 1 and a.name not in known]
            if idle:
                yield (
                    f"shard_map at {op.where} is over {', '.join(known)}: done whole "
                    f"over {', '.join(idle)}"
                )


_Run = tuple[Program, Op, OpPlan, int]
"""An op where it is run, by which plan, and how often in a step."""


def _runs(program: Program, assignment: Assignment, turns: int = 1) -> Iterator[_Run]:
    """Every op, those in bodies after what runs them."""
    loop = assignment.loop
    inside = frozenset(loop.ops) if loop else frozenset()
    for index, (op, plan) in enumerate(zip(program.ops, assignment.ops, strict=True)):
        times = turns * (loop.trips if loop and index in inside else 1)
        yield program, op, plan, times
        for inner, body in zip(op.programs, plan.inner, strict=True):
            yield from _runs(inner, body, times * trips_of(op, plan))


def _within(program: Program, assignment: Assignment) -> Iterator[str]:
    """How many products gather or scatter while they work."""
    times = {ALL_GATHER: 0, REDUCE_SCATTER: 0}
    for _, _, plan, turns in _runs(program, assignment):
        for move in (*plan.before, *plan.after):
            if move.within:
                times[move.steps[0].kind] += turns
    if any(times.values()):
        yield (
            f"collective matmul: {times[ALL_GATHER]} gathers and "
            f"{times[REDUCE_SCATTER]} scatters a step are done by the products beside "
            "them, while they work"
        )


def _fallbacks(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster | None,
    whole_seconds: float,
) -> Iterator[str]:
    """One note for each kind of op that has no rule of ours."""
    found: dict[str, _Cost] = {}
    for inner, op, plan, turns in _runs(program, assignment):
        if plan.note:
            cost = found.setdefault(f"{op.kind}: {plan.note}", _Cost())
            moves = (*plan.before, *plan.after)
            cost.times += turns
            cost.num_bytes += turns * sum(move.wire_bytes for move in moves)
            if cluster is not None:
                cost.seconds += turns * _seconds(inner, op, plan, mesh, cluster)
    for what, cost in sorted(found.items()):
        share = (
            f", {cost.seconds / whole_seconds:.1%} of the predicted step"
            if whole_seconds
            else ""
        )
        yield (
            f"{what} ({cost.times} times a step, {cost.num_bytes} bytes moved for "
            f"it{share})"
        )


def _uneven(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    cluster: Cluster | None,
    whole_seconds: float,
) -> Iterator[str]:
    """What is padded, and how much of the step is work on padding."""
    found: dict[tuple[int, int, int], None] = {}
    wasted_seconds = 0.0
    for inner, op, plan, turns in _runs(program, assignment):
        if not plan.choice.splits:
            continue
        rule, real = rule_of(inner, op), 1.0
        for name, digits in plan.choice.splits:
            size = rule.factor(name).size
            wide = padded_size(size, digits, mesh)
            if wide != size:
                real *= size / wide
                shards = mesh.group_size(tuple(split.axis for split in digits))
                found[size, shards, wide // shards] = None
        if real < 1 and cluster is not None:
            work = op_work(inner, op, rule, plan.choice, mesh, cluster.device)
            wasted_seconds += turns * (1 - real) * work.seconds
    if found:
        each = ", ".join(f"{n} as {k} × {local}" for n, k, local in sorted(found))
        share = (
            f": {wasted_seconds / whole_seconds:.1%} of the predicted step is work on "
            "padding"
            if whole_seconds
            else ""
        )
        yield f"uneven: {each}{share}"


def _seconds(
    program: Program, op: Op, plan: OpPlan, mesh: Mesh, cluster: Cluster
) -> float:
    rule = rule_of(program, op)
    work = op_work(program, op, rule, plan.choice, mesh, cluster.device)
    steps = [step for m in (*plan.before, *plan.after) for step in m.steps]
    sent = sum(step_seconds(s, mesh, cluster) for s in steps if s.wire_bytes)
    return work.seconds + sent


def _remarks(program: Program) -> Iterator[str]:
    for inner, op in program.walk():
        if op.kind == "while":
            yield f"while at {op.where}: its turns are not known, priced as one"
        elif op.kind in ONCE:
            sent = ", what it gives is sent to all" if op.results else ""
            yield f"{op.kind} at {op.where}: run by the first device{sent}"
        elif op.kind in ATTENTION and not shardable(op, inner.operand_values(op)):
            yield (
                f"{op.kind} at {op.where}: run whole on every device; dropout in the "
                "kernel, packed sequences and pages can not be split"
            )
        elif is_drawn_whole(op, inner.operand_values(op)):
            yield (
                f"{op.kind} at {op.where}: drawn whole on every device; draws of "
                "threefry keys alone can be split"
            )
