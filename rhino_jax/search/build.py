"""From a Program to the search's :class:`~rhino_jax.search.graph.Graph`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rhino_jax.ir.depends import forward
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.ir.staged import lifts
from rhino_jax.rules import HEAVY, rule_of
from rhino_jax.search.graph import (
    INNER,
    OUTPUT,
    READ,
    SUMMED,
    Body,
    Endpoint,
    Facts,
    Graph,
    Path,
    Var,
    batch_inputs,
    group_of,
    is_light,
    is_light_kind,
)
from rhino_jax.search.rows import NO_LIMITS, Fed, Limits

SAVING = ("forward", "residual")
LATER = ("backward", "epilogue")
GROWING = ("broadcast_in_dim", "iota")
"""Ops that read (next to) nothing: made again on the way into every reader."""

Env = dict[int, Endpoint | None]


@dataclass(frozen=True)
class _Scope:
    """One Program while it is opened up.

    ``key`` is its path with tied ops in place; ``region`` is that of the op it belongs
    to ("" for the outermost Program, whose ops have their own).
    """

    program: Program
    path: Path
    key: Path
    weight: int
    region: str
    batch: frozenset[int]
    unwritten: frozenset[int]
    outputs: frozenset[int]
    env: Env
    single: set[tuple[int, str]] = field(default_factory=set)
    """Values with one reader in a group, or none that needs a port."""
    fed: Fed | None = None
    """Of the body of a pipelined loop, and of what is in it."""

    def limits(self, values: Sequence[int]) -> Limits:
        return self.fed.limits(values) if self.fed else NO_LIMITS


def build_graph(program: Program, facts: Facts) -> Graph:
    """The variables and links of ``program``."""
    return _Builder(Graph(program), facts).run()


class _Builder:
    def __init__(self, graph: Graph, facts: Facts) -> None:
        self.graph = graph
        self.facts = facts
        self.made: dict[object, int] = {}
        self.terms: dict[int, int] = {}

    def run(self) -> Graph:
        program, facts = self.graph.program, self.facts
        values = facts.ties.values
        env: Env = {}
        inputs = []
        for v, role in zip(program.inputs, facts.roles, strict=True):
            key = "input", values.get(v, v)
            var = self._port(key, program, program.values[v], role)
            held = self.graph.vars[var].held
            held[0] = held.get(0, 0) + 1
            env[v] = Endpoint(var)
            inputs.append(var)
        scope = _Scope(
            program,
            (),
            (),
            1,
            "",
            facts.batch,
            unwritten(program),
            frozenset(program.outputs),
            env,
        )
        self._walk(scope)
        self.graph.inputs = tuple(inputs)
        self.graph.outputs = tuple(
            self._output(scope, place, v) for place, v in enumerate(program.outputs)
        )
        return self.graph

    def _output(self, scope: _Scope, place: int, v: int) -> int:
        value = scope.program.values[v]
        before = self.facts.successor.get(place)
        if before is None:
            var = self._port(("output", place), scope.program, value, OUTPUT)
            if not value.shape:
                self.graph.vars[var].fixed = Layout(())
        else:
            var = self.graph.inputs[before]
        self._read(scope, v, "epilogue", Endpoint(var))
        return var

    # ---- variables

    def _port(
        self,
        key: object,
        program: Program,
        value: Value,
        role: str,
        limits: Limits = NO_LIMITS,
    ) -> int:
        if key not in self.made:
            self.made[key] = len(self.graph.vars)
            self.graph.vars.append(
                Var(program, None, None, value.shape, value.dtype, role, limits=limits)
            )
        return self.made[key]

    def _fed(self, scope: _Scope, index: int, body: int = 0) -> Fed | None:
        """A body of an op, if it is in a pipelined loop."""
        if scope.path:
            return scope.fed.inside(index, body) if scope.fed else None
        return self.facts.fed.get(index)

    def _site(self, scope: _Scope, index: int, op: Op) -> int:
        at = self._tied(scope, index)
        key = "site", scope.key, at
        if key not in self.made:
            fused = tuple(v in scope.unwritten for v in (*op.operands, *op.results))
            self.made[key] = len(self.graph.vars)
            self.graph.vars.append(
                Var(
                    scope.program,
                    op,
                    rule_of(scope.program, op),
                    fused=fused,
                    heavy=op.kind in HEAVY,
                    limits=scope.limits((*op.operands, *op.results)),
                )
            )
        var = self.made[key]
        numbers = not any(scope.program.values[v].shape for v in op.results)
        if numbers and scope.batch.isdisjoint(op.results):
            self.graph.vars[var].settled = True
        self.graph.vars[var].weight += scope.weight
        self.graph.sites[scope.path, index] = var
        return var

    def _tied(self, scope: _Scope, index: int) -> int:
        return index if scope.path else self.facts.ties.ops.get(index, index)

    def _region(self, scope: _Scope, index: int) -> str:
        """The region of an op; a copy's is that of what it repeats."""
        return scope.region or self.facts.region[self._tied(scope, index)]

    # ---- reading

    def _read(
        self, scope: _Scope, v: int, region: str, target: Endpoint, weight: int = 0
    ) -> None:
        """Link ``target`` to ``v``, or to the port that its readers share."""
        source = scope.env[v] if scope.program.values[v].literal is None else None
        if source is None:
            return
        value = scope.program.values[v]
        group = group_of(v in scope.batch, region)
        where = scope.path, v, group
        if where in self.graph.reads:
            source = Endpoint(self.graph.reads[where])
        elif value.shape and (v, group) not in scope.single:
            source = self._shared(scope, v, group, source)
        weight = weight or scope.weight
        if scope.fed and v not in scope.batch:
            weight *= scope.fed.staged.microbatches  # moved whole for every one
        self.graph.link(source, target, value, weight)

    def _shared(self, scope: _Scope, v: int, group: str, source: Endpoint) -> Endpoint:
        """The port that several readers of one group share, where they need one.

        What a light op makes is settled by it, if several read it: only products that
        read it may want it elsewhere together. One that adds up two values that may
        both be partial is left to settle the sum: once, not each of them.
        """
        count, products = self._readers(scope, v, group)
        maker = self.graph.vars[source.var]
        light = maker.op is not None and is_light_kind(maker)
        if count > 1 and light and self.terms.get(source.var, 0) < 2:
            maker.settled = True
            count = products
        if count <= 1:
            scope.single.add((v, group))
            return source
        tied = v if scope.path else self.facts.ties.values.get(v, v)
        value = scope.program.values[v]
        key = "read", scope.key, tied, group
        var = self._port(key, scope.program, value, READ, scope.limits((v,)))
        self.graph.reads[scope.path, v, group] = var
        self.graph.link(source, Endpoint(var), value, scope.weight)
        if not scope.path and v in self.facts.gradients:
            held = self.graph.vars[var].held
            held[0] = held.get(0, 0) + 1
        return Endpoint(var)

    def _readers(self, scope: _Scope, v: int, group: str) -> tuple[int, int]:
        """How many read ``v`` in one group (outside included), how many products."""
        program = scope.program
        count = products = 0
        for index in program.uses.get(v, ()):
            region = self._region(scope, index)
            if group_of(v in scope.batch, region) == group:
                op = program.ops[index]
                times = op.operands.count(v)
                count += times
                products += times * (op.kind in HEAVY)
        if group in ("", "epilogue") and v in scope.outputs:
            count += program.outputs.count(v)
        return count, products

    # ---- ops

    def _walk(self, scope: _Scope) -> None:
        for index, op in enumerate(scope.program.ops):
            region = self._region(scope, index)
            if op.programs:
                results = _OPEN[op.kind](self, scope, index, op, region)
                scope.env.update(zip(op.results, results, strict=True))
                continue
            var = self._site(scope, index, op)
            for i, v in enumerate(op.operands):
                self._read(scope, v, region, Endpoint(var, -1 - i))
            self.terms[var] = self._terms(scope, op, var)
            for r, v in enumerate(op.results):
                scope.env[v] = Endpoint(var, r)
                if not scope.path and self._is_saved(index, v):
                    held = self.graph.vars[var].held
                    held[r] = held.get(r, 0) + 1

    def _terms(self, scope: _Scope, op: Op, var: int) -> int:
        """How many operands of one flow may be partial together."""
        rule = self.graph.vars[var].rule
        assert rule is not None
        return max(
            (
                sum(self._may_be_partial(scope, op.operands[i]) for i in flow.operands)
                for flow in rule.flows
            ),
            default=0,
        )

    def _may_be_partial(self, scope: _Scope, v: int) -> bool:
        literal = scope.program.values[v].literal is not None
        source = None if literal else scope.env[v]
        if source is None:
            return False
        maker = self.graph.vars[source.var]
        if maker.op is None:
            return maker.role == SUMMED
        if not is_light_kind(maker):
            return True
        return not maker.settled and self.terms.get(source.var, 0) > 0

    def _is_saved(self, index: int, v: int) -> bool:
        region = self.facts.region
        uses = self.graph.program.uses.get(v, ())
        return region[index] in SAVING and any(region[i] in LATER for i in uses)

    def _inner(
        self,
        scope: _Scope,
        index: int,
        op: Op,
        body: int,
        env: Sequence[Endpoint | None],
        region: str,
        weight: int,
    ) -> _Scope:
        """A body opened up."""
        program = op.programs[body]
        entering = batch_inputs(op, body, scope.batch)
        at = self._tied(scope, index)
        inside = _Scope(
            program,
            (*scope.path, index, body),
            (*scope.key, at, body),
            weight,
            region,
            forward(program, entering),
            unwritten(program),
            frozenset(program.outputs),
            dict(zip(program.inputs, env, strict=True)),
            fed=self._fed(scope, index, body),
        )
        self._walk(inside)
        ends = tuple(
            None if program.values[v].literal is not None else inside.env[v]
            for v in program.outputs
        )
        self.graph.bodies[scope.path, index, body] = Body(tuple(env), ends)
        return inside

    def _inner_port(
        self,
        scope: _Scope,
        index: int,
        body: int,
        name: str,
        value: Value,
        role: str = INNER,
        v: int | None = None,
    ) -> int:
        key = "inner", scope.key, self._tied(scope, index), body, name
        program = scope.program.ops[index].programs[body]
        fed = self._fed(scope, index, body)
        limits = fed.limits((v,)) if fed else NO_LIMITS
        return self._port(key, program, value, role, limits)

    def _give(self, inside: _Scope, place: int, port: int) -> None:
        """The body's output at ``place`` lies as ``port`` says."""
        v = inside.program.outputs[place]
        if inside.program.values[v].literal is None:
            self._read(inside, v, inside.region, Endpoint(port))

    def _ends(
        self, scope: _Scope, index: int, body: int, ends: Mapping[int, int]
    ) -> None:
        """Write the ports in which a body's outputs end into its boundary."""
        found = self.graph.bodies[scope.path, index, body]
        outputs = list(found.outputs)
        for place, port in ends.items():
            outputs[place] = Endpoint(port)
        self.graph.bodies[scope.path, index, body] = Body(found.inputs, tuple(outputs))


Opened = list[Endpoint | None]


def _scan(b: _Builder, scope: _Scope, index: int, op: Op, region: str) -> Opened:
    (program,) = op.programs
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    fed, turns = b._fed(scope, index), op.param["length"]
    cut = fed.staged if fed and not scope.path else None
    entering, leaving = lifts(op, cut)
    weight = scope.weight * turns
    if cut:
        turns = cut.turns(turns) * cut.rounds
        # Every tick runs one microbatch.
        weight = max(1, round(turns * cut.ticks / cut.work))
    env: list[Endpoint | None] = []
    for i, v in enumerate(op.operands):
        inner = program.values[program.inputs[i]]
        role = SUMMED if consts <= i < consts + carry else INNER
        port = b._inner_port(scope, index, 0, f"in{i}", inner, role, program.inputs[i])
        b._read(scope, v, region, Endpoint(port, 0, entering[i]))
        env.append(Endpoint(port))
    inside = b._inner(scope, index, op, 0, env, region, weight)
    results: Opened = []
    ends = {}
    for place, v in enumerate(program.outputs):
        if place < carry:
            port_end = env[consts + place]
            assert port_end is not None
            port = port_end.var
            results.append(Endpoint(port, 0, leaving[place]))
        else:
            port = b._inner_port(
                scope, index, 0, f"out{place}", program.values[v], SUMMED, v
            )
            held = b.graph.vars[port].held
            held[0] = held.get(0, 0) + turns
            results.append(Endpoint(port, 0, leaving[place]))
        b._give(inside, place, port)
        ends[place] = port
    b._ends(scope, index, 0, ends)
    return results


def _while(b: _Builder, scope: _Scope, index: int, op: Op, region: str) -> Opened:
    test, body = op.programs
    split, consts = op.param["cond_nconsts"], op.param["body_nconsts"]
    ports: list[Endpoint | None] = []
    inner_values = [
        *(test.values[v] for v in test.inputs[:split]),
        *(body.values[v] for v in body.inputs),
    ]
    for i, (v, value) in enumerate(zip(op.operands, inner_values, strict=True)):
        port = b._inner_port(scope, index, 1, f"in{i}", value)
        b._read(scope, v, region, Endpoint(port))
        ports.append(Endpoint(port))
    carry = ports[split + consts :]
    entry = [*ports[:split], *carry]
    tested = b._inner(scope, index, op, 0, entry, region, scope.weight)
    answer = b._inner_port(scope, index, 0, "test", test.values[test.outputs[0]])
    b.graph.vars[answer].fixed = Layout(())
    b._give(tested, 0, answer)
    b._ends(scope, index, 0, {0: answer})
    inside = b._inner(scope, index, op, 1, ports[split:], region, scope.weight)
    ends = {}
    for place, end in enumerate(carry):
        assert end is not None
        b._give(inside, place, end.var)
        ends[place] = end.var
    b._ends(scope, index, 1, ends)
    return carry


def _cond(b: _Builder, scope: _Scope, index: int, op: Op, region: str) -> Opened:
    first = op.operands[0]
    port = b._inner_port(scope, index, 0, "which", scope.program.values[first])
    b.graph.vars[port].fixed = Layout(())
    b._read(scope, first, region, Endpoint(port))
    env: list[Endpoint | None] = []
    for i, v in enumerate(op.operands[1:]):
        inner = op.programs[0].values[op.programs[0].inputs[i]]
        entry = b._inner_port(scope, index, 0, f"in{i}", inner)
        b._read(scope, v, region, Endpoint(entry))
        env.append(Endpoint(entry))
    ends = {}
    for number, program in enumerate(op.programs):
        inside = b._inner(scope, index, op, number, env, region, scope.weight)
        for place in range(len(program.outputs)):
            end = b._inner_port(
                scope,
                index,
                0,
                f"out{place}",
                op.programs[0].values[op.programs[0].outputs[place]],
            )
            b._give(inside, place, end)
            ends[place] = end
        b._ends(scope, index, number, ends)
    return [Endpoint(ends[place]) for place in range(len(op.results))]


def _call(b: _Builder, scope: _Scope, index: int, op: Op, region: str) -> Opened:
    """Rematerialization: what enters and leaves has one layout on both sides."""
    (program,) = op.programs
    env: list[Endpoint | None] = []
    for i, v in enumerate(op.operands):
        value = program.values[program.inputs[i]]
        port = b._inner_port(scope, index, 0, f"in{i}", value)
        b._read(scope, v, region, Endpoint(port))
        env.append(Endpoint(port))
    inside = b._inner(scope, index, op, 0, env, region, scope.weight)
    ends = {}
    for place, v in enumerate(program.outputs):
        port = b._inner_port(scope, index, 0, f"out{place}", program.values[v], SUMMED)
        b._give(inside, place, port)
        ends[place] = port
    b._ends(scope, index, 0, ends)
    return [Endpoint(port) for port in ends.values()]


Open = Callable[[_Builder, _Scope, int, Op, str], Opened]
_OPEN: Mapping[str, Open] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _call,
}


def unwritten(program: Program) -> frozenset[int]:
    """Values that compilers make on the way into their one light reader."""
    outputs: Collection[int] = frozenset(program.outputs)
    found = set()
    light = [
        not op.programs and (op.kind in GROWING or is_light(rule_of(program, op)))
        for op in program.ops
    ]
    for index, op in enumerate(program.ops):
        if not light[index]:
            continue
        for v in op.results:
            uses = program.uses.get(v, ())
            few = len(uses) == 1 or op.kind in GROWING
            if few and v not in outputs and all(_fuses(program, i) for i in uses):
                found.add(v)
    return frozenset(found)


def _fuses(program: Program, index: int) -> bool:
    op = program.ops[index]
    return not op.programs and op.kind not in HEAVY
