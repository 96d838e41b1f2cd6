"""Scanned layers as one pipeline: which scans can be cut, and the plan of one that is.

The search decides how devices share the work of a layer, and everything outside the
loop, with the whole batch (:mod:`rhino_jax.search.build`: there the stage axis splits
the layers and nothing else). Here the examples inside the loop are divided in
microbatches: the same merging of a plan over devices with one over time that makes the
loop over microbatches (:mod:`rhino_jax.search.microbatch`), for the loop's body alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rhino_jax.cost.reshard import local_bytes, route
from rhino_jax.errors import problems
from rhino_jax.ir.analysis.batch import BatchDims, batch_dims
from rhino_jax.ir.analysis.digits import Place
from rhino_jax.ir.analysis.loops import LoopPair, passed
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary, whole
from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import STAGE, TIME, Axis, Mesh
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.ir.staged import Staged
from rhino_jax.ir.steps import PERMUTE, Move, Step
from rhino_jax.rules import rule_of
from rhino_jax.search.microbatch import Bodies, Clash
from rhino_jax.search.remat_scans import layer_scans
from rhino_jax.search.subject import Subject
from rhino_jax.search.turns import Demands, Mixed, Walk, whole_layout


@dataclass(frozen=True)
class Uncut:
    """Why the layers of a step can not be divided among stages; str() prints it."""

    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return problems("scanned layers can not be cut in stages:", self.reasons)


@dataclass(frozen=True)
class Scans:
    """The scans of a step (ops) that are pipelined, and where its values hold examples.

    All are cut alike.
    """

    cut: Staged
    ops: tuple[int, ...]
    dims: BatchDims

    @property
    def staged(self) -> Mapping[int, Staged]:
        return dict.fromkeys(self.ops, self.cut)


def layers_of(subject: Subject) -> tuple[LoopPair, ...]:
    """The loop pairs over layers."""
    return layer_scans(subject.program, subject.regions)


def staged_scans(subject: Subject, cut: Staged) -> Scans | Uncut:
    """All scans over layers, as they are cut; every reason where one can not be."""
    pairs, program = layers_of(subject), subject.program
    ops = tuple(sorted({i for pair in pairs for i in (pair.forward, pair.backward)}))
    if not ops:
        return Uncut((f"{program.name} has no scan over layers, run both ways",))
    found = Scans(cut, ops, batch_dims(program, subject.batch_inputs, rule_of))
    reasons = [why for index in ops for why in _problems(found, program, index)]
    return Uncut(tuple(dict.fromkeys(reasons))) if reasons else found


def _problems(scans: Scans, program: Program, index: int) -> Iterator[str]:
    cut, op = scans.cut, program.ops[index]
    groups, length = cut.stages * cut.rounds, op.param["length"]
    where = f"scan at {op.where}"
    if length % groups:
        each = f" of {cut.rounds} rounds" if cut.rounds > 1 else ""
        yield f"{where}: {length} layers do not divide by {cut.stages} stages{each}"
    if cut.rounds > 1 and cut.microbatches < cut.stages:
        yield (
            f"{cut.microbatches} microbatches go round {cut.stages} stages, which "
            "would wait for them: at least as many microbatches as stages"
        )
    rows = scans.dims.batch_size
    if rows % cut.microbatches:
        yield f"{cut.microbatches} microbatches do not divide {rows} examples"
        return
    try:
        time = over_time(scans, program, index, rows)
    except Mixed as mixed:
        yield f"{mixed.op.kind} at {mixed.op.where} in a {where}: {mixed.how}"
        return
    (body,), (inner,) = op.programs, time.inner
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    for i in passed(body, consts, carry):
        value = body.values[body.outputs[i]]
        if inner.outputs[i].find(TIME) is None:
            yield f"{where}: carry {i} ({value}) holds no examples to pass on"
    for value in (body.values[v] for v in body.outputs):
        if value.dtype.startswith("key<"):
            yield f"{where}: it gives random keys ({value})"


def over_time(scans: Scans, program: Program, index: int, rows: int) -> OpPlan:
    """A scan in which ``rows`` neighbouring examples are cut in microbatches.

    Raises:
        Mixed: its body combines examples of different microbatches.
    """
    op, count = program.ops[index], scans.cut.microbatches
    walk = Walk(Mesh((Axis(TIME, count),)), {(): {}})
    given = []
    for i, v in enumerate(op.operands):
        value, place = program.values[v], scans.dims.places.get(v, ())
        layout = _divided(value, place, rows // count, count)
        if layout is None:
            raise Mixed(op, (i,), "examples are regrouped")
        given.append(layout)
    plans = [OpPlan(inner=tuple(map(whole, other.programs))) for other in program.ops]
    while True:
        plans[index] = walk.op((index,), program, op, given)
        assignment = replace(whole(program), ops=tuple(plans))
        if not Demands(walk).of(program, assignment):
            return plans[index]


def _divided(value: Value, place: Place, block: int, count: int) -> Layout | None:
    """``value`` in ``count`` microbatches of ``block`` examples; None if it can not."""
    layout = whole_layout(value)
    if not place:
        return layout
    for digit in place:
        steps = block // digit.of
        inside = steps * count <= digit.size and digit.size % (steps * count or 1) == 0
        if block % digit.of == 0 and inside:
            return layout.with_split(digit.dim, Split(TIME, digit.stride * steps))
    return None


def fed(
    scans: Scans, program: Program, assignment: Assignment, mesh: Mesh
) -> Assignment | Uncut:
    """``assignment``, in which the layers are split, with microbatches in its scans.

    Where ops of a layer split the examples further than its carry is, smaller blocks
    of rows are tried.
    """
    cut, size = scans.cut, scans.dims.batch_size
    first = _data_parts(scans, program, assignment, mesh)
    answer: Uncut | None = None
    for parts in (n for n in range(first, size + 1) if size % n == 0):
        rows = size // parts
        if rows % cut.microbatches:
            continue
        plans = list(assignment.ops)
        try:
            for index in scans.ops:
                time = over_time(scans, program, index, rows)
                plans[index] = _merged(program, index, plans[index], time, mesh)
            return replace(assignment, ops=tuple(plans))
        except (Clash, Mixed) as clash:
            answer = answer or Uncut((str(clash),))
    return answer or Uncut(
        (
            f"{cut.microbatches} microbatches do not divide the {size // first} "
            f"examples that lie together on a device (batch size {size})",
        )
    )


def _data_parts(
    scans: Scans, program: Program, assignment: Assignment, mesh: Mesh
) -> int:
    """In how many parts devices split the examples of what the loops pass on."""
    parts = 1
    for index in scans.ops:
        op, (inner,) = program.ops[index], assignment.ops[index].inner
        consts, carry = op.param["num_consts"], op.param["num_carry"]
        for i in range(consts, consts + carry):
            dim = scans.dims.dim(op.operands[i])
            if dim is not None:
                axes = tuple(split.axis for split in inner.inputs[i].dims[dim])
                parts = math.lcm(parts, mesh.group_size(axes))
    return parts


def _merged(
    program: Program, index: int, plan: OpPlan, time: OpPlan, mesh: Mesh
) -> OpPlan:
    """A pipelined scan with its time axis, and what it hands on.

    Sums over examples leave the loop as terms, and are moved behind it.
    """
    op, staged = program.ops[index], plan.staged
    assert staged is not None
    wide = staged.over(mesh)
    _, homes = boundary(program, op, plan, None)
    done, made = Bodies(wide).op(program, op, plan, time)
    late = []
    for v, now, home in zip(op.results, made, homes, strict=True):
        if now != home:
            value = program.values[v]
            steps = route(value.shape, value.dtype, now, home, mesh)
            late.append(Move(v, now, home, steps))
    handed = tuple(_handed(op, done, wide))
    return replace(done, after=(*late, *plan.after), handed=handed)


def _handed(op: Op, plan: OpPlan, mesh: Mesh) -> Iterator[Move]:
    """What one stage gives the next in every tick: the carry of a microbatch."""
    (body,), (inner,) = op.programs, plan.inner
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    for i in passed(body, consts, carry):
        v, layout = body.outputs[i], inner.outputs[i]
        value = body.values[v]
        size = local_bytes(value.shape, value.dtype, layout, mesh)
        yield Move(v, layout, layout, (Step(PERMUTE, (STAGE,), layout, layout, size),))
