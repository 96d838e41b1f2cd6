"""From a subject and a mesh to the best Assignment found."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rhino_jax.ir.analysis.batch import batch_dims
from rhino_jax.ir.analysis.classes import SegmentClass, segment_classes
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.staged import Staged
from rhino_jax.rules import rule_of
from rhino_jax.rules.placing import CONSTRAINTS
from rhino_jax.search.build import build_graph
from rhino_jax.search.descend import Answer, search_axes, starts
from rhino_jax.search.domains import Meaning, kinds_of
from rhino_jax.search.energy import Energy, Memo
from rhino_jax.search.graph import INPUT, STATE, Facts, Graph, Ties, Var
from rhino_jax.search.parts import Parts, all_parts
from rhino_jax.search.pins import Pinned, checked_pins
from rhino_jax.search.prices import Prices
from rhino_jax.search.remat_scans import REMATERIALIZE
from rhino_jax.search.rows import Fed
from rhino_jax.search.specs import Spec, pin_of
from rhino_jax.search.subject import Subject
from rhino_jax.search.write import write

MOST_UNTIED_OPS = 1500
"""Programs up to this size are searched op by op; in longer ones equal segments are
decided together, so that the cost of the search does not grow with depth."""


@dataclass(frozen=True)
class Request:
    """What is searched on one mesh.

    ``memory_weight``: seconds that a byte held at the peak is worth.
    ``replicate_heavy`` allows matrix products to be done whole on several devices.
    ``pins``: tree path or name to the axes of each dimension. ``orders``: in how many
    orders axes are taken. ``placed``: layouts of inputs (positions), as pins but
    stronger than these. ``even``: no shard is padded (one that is can not always be
    run in microbatches). ``halos``: windows that overlap may be cut in blocks.
    """

    mesh: Mesh
    prices: Prices
    memory_weight: float = 0.0
    replicate_heavy: bool = True
    pins: Mapping[str, Spec] = field(default_factory=dict)
    orders: int = 2
    placed: Mapping[int, Layout] = field(default_factory=dict)
    even: bool = False
    halos: bool = True


@dataclass(frozen=True)
class Found:
    """The best answer found, and the Assignment it is."""

    assignment: Assignment
    answer: Answer
    energy: Energy = field(repr=False)

    def meaning(self, var: int) -> Meaning:
        found = self.energy.meaning(var, self.answer.slots[var])
        assert found is not None
        return found


@dataclass(frozen=True)
class Reading:
    """A subject read once, for every mesh and price it is searched with."""

    subject: Subject
    facts: Facts
    graph: Graph = field(repr=False)
    parts: Sequence[Parts] = field(repr=False)


def read(
    subject: Subject, staged: Mapping[int, Staged] = MappingProxyType({})
) -> Reading:
    """Regions, segments and classes of a subject's Program.

    ``staged``: scans (ops) to be pipelined.
    """
    program, pairs = subject.program, subject.pairs
    found = subject.regions
    classes: Sequence[SegmentClass] = ()
    if len(program.ops) > MOST_UNTIED_OPS:
        classes = segment_classes(program, found, subject.segmentation, pairs)
    ties = ties_of(program, classes, repeats(program).ops)
    dims = batch_dims(program, subject.batch_inputs, rule_of) if staged else None
    fed = {i: Fed(cut, dims.inner[i][0]) for i, cut in staged.items() if dims}
    roles = [STATE if i in pairs else INPUT for i in range(len(program.inputs))]
    facts = Facts(
        roles,
        {o: i for i, o in subject.state_pairs},
        found.of,
        found.batch,
        frozenset(found.gradients.values()),
        ties,
        fed,
    )
    return reading_of(subject, facts)


def reading_of(subject: Subject, facts: Facts) -> Reading:
    """The reading of a subject of which ``facts`` are known."""
    graph = build_graph(subject.program, facts)
    for position in range(len(subject.input_paths), len(graph.inputs)):
        var = graph.vars[graph.inputs[position]]
        var.fixed = Layout.replicated(len(var.shape))
    stacked = subject.stacked
    for position in subject.pairs:
        if stacked.get(subject.kin.get(position, position), False):
            graph.vars[graph.inputs[position]].lifted = True
    return Reading(subject, facts, graph, all_parts(graph))


def ties_of(
    program: Program, classes: Sequence[SegmentClass], copies: Mapping[int, int]
) -> Ties:
    """Ops and values of equal segments that are decided together.

    Where segments of a class follow one another directly, every second one is tied, so
    that a column may follow a row. ``copies`` are decided like what they are copies of.
    """
    ops: dict[int, int] = {}
    values: dict[int, int] = {}
    inputs = set(program.inputs)
    for one in classes:
        steps = [b - a for a, b in itertools.pairwise(one.members)]
        period = 2 if 1 in steps else 1
        for member in range(period, one.multiplicity):
            first = member % period
            ops.update(one.op_map(member, first))
            for v, w in one.value_map(member, first).items():
                if v in inputs and w in inputs:
                    values[v] = w
    ops.update({index: ops.get(first, first) for index, first in copies.items()})
    for index, first in ops.items():
        made = zip(program.ops[index].results, program.ops[first].results, strict=True)
        values.update(made)
    return Ties(ops, values)


@dataclass(frozen=True)
class Repeats:
    """What a rematerialized Program does again.

    ``ops``: copies, each with the op it repeats. ``values``: what copies and barriers
    make, each with the value that it is. ``barriers``: each with what it holds back.
    """

    ops: Mapping[int, int]
    values: Mapping[int, int]
    barriers: Mapping[int, int]


def repeats(program: Program) -> Repeats:
    """What reads the same values, ``rematerialize`` looked through, is the same."""
    ops: dict[int, int] = {}
    same: dict[int, int] = {}
    barriers: dict[int, int] = {}
    if not any(op.kind == REMATERIALIZE for op in program.ops):
        return Repeats(ops, same, barriers)
    known: dict[object, int] = {}
    for index, op in enumerate(program.ops):
        reads = tuple(same.get(v, v) for v in op.operands)
        if op.kind == REMATERIALIZE:
            same.update(zip(op.results, reads, strict=True))
            barriers[index] = reads[0]
        elif not op.effects and not op.programs:
            first = known.setdefault((op.kind, reads, op.params), index)
            if first != index:
                ops[index] = first
                same.update(zip(op.results, program.ops[first].results, strict=True))
    return Repeats(ops, same, barriers)


def energy_of(reading: Reading, request: Request, memo: Memo | None = None) -> Energy:
    """The prices of a reading on one mesh, with what pins fix in place.

    Args:
        memo: what is known of the same mesh and prices from other searches.

    Raises:
        PinError: pins that do not fit.
    """
    graph, mesh, memo = reading.graph, request.mesh, memo or Memo()
    constrained = any(v.op and v.op.kind in CONSTRAINTS for v in graph.vars)
    if request.pins or request.placed or constrained:
        graph = _pinned(reading, request)
    return Energy(
        graph,
        mesh,
        request.prices,
        request.replicate_heavy,
        kinds_of(graph, reading.parts, mesh, memo.kinds, request.even, request.halos),
        memo,
    )


def _pinned(reading: Reading, request: Request) -> Graph:
    graph = reading.graph
    fixed: Pinned = checked_pins(reading.subject, request.mesh, request.pins)
    variables = list(graph.vars)
    for position, layout in {**fixed.inputs, **request.placed}.items():
        v = graph.inputs[position]
        variables[v] = replace(variables[v], fixed=layout)
    for v, var in enumerate(variables):
        if var.op is not None and var.op.kind in (*CONSTRAINTS, "name"):
            asked = pin_of(var.op, _made(var), fixed.named, request.mesh)
            if asked is not None:
                variables[v] = replace(var, wanted=asked)
    return replace(graph, vars=variables)


def _made(var: Var) -> tuple[int, ...]:
    assert var.op is not None
    return var.program.values[var.op.results[0]].shape


def search(
    subject: Subject,
    request: Request,
    staged: Mapping[int, Staged] = MappingProxyType({}),
) -> Found:
    """The best Assignment found for ``subject`` on one mesh, ``staged`` scans
    pipelined."""
    reading = read(subject, staged)
    energy = energy_of(reading, request)
    ticks = request.memory_weight * request.prices.ticks_per_second
    answer = search_axes(energy, starts(energy), request.orders, ticks)
    return written(reading, energy, answer)


def written(reading: Reading, energy: Energy, answer: Answer) -> Found:
    """``answer`` as an Assignment."""
    meanings: Sequence[Meaning | None] = [
        energy.meaning(v, slots) for v, slots in enumerate(answer.slots)
    ]
    known = [m for m in meanings if m is not None]
    assert len(known) == len(meanings), "an answer has only what can be"
    return Found(write(energy, reading.facts, known), answer, energy)
