"""Rematerialization of scanned layers: what the forward loop saves is made again.

A forward scan over stacked weights saves a stack of everything that its reverse scan
reads. Here it saves what enters each turn instead, and the body of the reverse scan
begins with copies of the forward ops that make the rest. They read the weights and
constants of the forward scan, which the reverse scan is given too, and the saved entry
behind a barrier with the cotangent that enters the turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rhino_jax.ir.analysis.influence import reached
from rhino_jax.ir.analysis.loops import LoopPair, Saved, loop_pairs
from rhino_jax.ir.analysis.regions import Regions
from rhino_jax.ir.program import WAITS, Op, Program, Value

REMATERIALIZE = "rematerialize"
MARK = "rematted"


def layer_scans(program: Program, regions: Regions) -> tuple[LoopPair, ...]:
    """The loop pairs whose forward scan goes over weights: scanned layers.

    Loops inside a layer (over time, over chunks) go over activations.
    """
    weights = reached(program, (program.inputs[i] for i in regions.parameters))
    return tuple(
        pair
        for pair in loop_pairs(program, regions.batch)
        if any(
            v in weights and v not in regions.batch
            for v in _stacked(program.ops[pair.forward])
        )
    )


def rematerialize_scans(program: Program, regions: Regions) -> Program:
    """``program`` with scanned layers recomputed; the same object if none gains."""
    done: set[int] = set()
    for pair in layer_scans(program, regions):
        if done.isdisjoint((pair.forward, pair.backward)):
            after = _rematerialized(program, pair)
            if after is not program:
                done |= {pair.forward, pair.backward}
                program = after
    return program


def copied(op: Op, operands: tuple[int, ...], results: tuple[int, ...]) -> Op:
    """A copy of a forward ``op`` that counts as one of the backward pass."""
    stack = f"transpose({op.where.name_stack})/{MARK}"
    where = replace(op.where, name_stack=stack)
    return replace(op, operands=operands, results=results, where=where)


def _stacked(scan: Op) -> tuple[int, ...]:
    return scan.operands[scan.param["num_consts"] + scan.param["num_carry"] :]


def _counted(scan: Op, **counts: int) -> tuple[tuple[str, object], ...]:
    return tuple(sorted({**scan.param, **counts}.items()))


def _rematerialized(program: Program, pair: LoopPair) -> Program:
    one, other = program.ops[pair.forward], program.ops[pair.backward]
    bodies = one.programs[0], other.programs[0]
    if any(op.kind == "remat2" for body in bodies for _, op in body.walk()):
        return program
    dropped = _droppable(program, pair)
    if not dropped:
        return program
    work = _Turn(program, pair, dropped)
    if work.gained_bytes <= 0:
        return program
    ops = list(program.ops)
    ops[pair.forward], ops[pair.backward] = work.forward(), work.backward()
    return replace(program, values=(*program.values, *work.stacks), ops=tuple(ops))


def _droppable(program: Program, pair: LoopPair) -> list[Saved]:
    """Stacks that only the reverse scan reads, and that can be made again."""
    one, other = program.ops[pair.forward], program.ops[pair.backward]
    body = one.programs[0]
    first = one.param["num_consts"]
    carries = body.inputs[first : first + one.param["num_carry"]]
    found = []
    for saved in pair.saved:
        inner = body.outputs[saved.result]
        alone = (
            program.uses[saved.value] == (pair.backward,)
            and saved.value not in program.outputs
            and other.operands.count(saved.value) == len(saved.operands)
        )
        pure = not any(body.ops[i].effects for i in _behind(body, (inner,), ()))
        if alone and pure and inner not in carries:
            found.append(saved)
    return found


def _behind(
    body: Program, values: Iterable[int], known: Collection[int]
) -> tuple[int, ...]:
    """The ops that make ``values`` from inputs and from what is ``known``."""
    wanted = set(values).difference(known)
    found = []
    for index in reversed(range(len(body.ops))):
        op = body.ops[index]
        if not wanted.isdisjoint(op.results):
            found.append(index)
            wanted |= set(op.operands).difference(known)
    return tuple(reversed(found))


@dataclass
class _Turn:
    """One loop pair being rewritten.

    ``known`` maps values of the forward body to those of the reverse body. ``consts``
    and ``xs`` are the operands that the reverse scan is given more, with the inputs of
    its body; ``entries`` are the carries to save, with theirs.
    """

    program: Program
    pair: LoopPair
    dropped: Sequence[Saved]
    known: dict[int, int] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    consts: list[tuple[int, int]] = field(default_factory=list)
    xs: list[tuple[int, int]] = field(default_factory=list)
    entries: list[tuple[int, int]] = field(default_factory=list)
    copies: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.one = self.program.ops[self.pair.forward]
        self.other = self.program.ops[self.pair.backward]
        self.ahead, self.behind = self.one.programs[0], self.other.programs[0]
        gone = {saved.result for saved in self.dropped}
        for saved in self.pair.saved:
            if saved.result not in gone:
                inner = self.ahead.outputs[saved.result]
                self.known[inner] = self.behind.inputs[saved.operands[0]]
        made = [self.ahead.outputs[saved.result] for saved in self.dropped]
        self.copies = _behind(self.ahead, made, self.known)
        reads = {v for i in self.copies for v in self.ahead.ops[i].operands}
        self._give(reads.union(made))

    def _give(self, reads: Collection[int]) -> None:
        """Have the reverse body know the inputs of the forward body that are read."""
        first = self.one.param["num_consts"]
        whole = first + self.one.param["num_carry"]
        split = self.other.param["num_consts"]
        rest = split + self.other.param["num_carry"]
        gone = {saved.value for saved in self.dropped}
        for place, inner in enumerate(self.ahead.inputs):
            if inner not in reads or inner in self.known:
                continue
            outer = self.one.operands[place]
            if first <= place < whole:
                self.known[inner] = self._new(self.ahead.values[inner])
                self.entries.append((inner, self.known[inner]))
                continue
            had = range(split)
            if place >= whole:
                had = range(rest, len(self.other.operands))
            same = [
                i for i in had if self.other.operands[i] == outer and outer not in gone
            ]
            if same:
                self.known[inner] = self.behind.inputs[same[0]]
                continue
            self.known[inner] = self._new(self.ahead.values[inner])
            more = self.consts if place < first else self.xs
            more.append((outer, self.known[inner]))

    def _new(self, like: Value) -> int:
        self.values.append(replace(like, name=""))
        return len(self.behind.values) + len(self.values) - 1

    @property
    def gained_bytes(self) -> int:
        """What is not saved any more, less what is saved or held longer for it."""
        program = self.program
        held = {
            outer
            for outer, _ in (*self.consts, *self.xs)
            if outer not in program.inputs
            and program.uses[outer][-1] < self.pair.backward
        }
        return (
            sum(saved.num_bytes for saved in self.dropped)
            - sum(program.values[v].num_bytes for v in held)
            - sum(value.num_bytes for value in self.stacks)
        )

    @property
    def stacks(self) -> tuple[Value, ...]:
        """The new results of the forward scan."""
        entries = (self.ahead.values[inner] for inner, _ in self.entries)
        length = self.pair.length
        return tuple(replace(v, shape=(length, *v.shape), name="") for v in entries)

    @property
    def _saved_entries(self) -> tuple[int, ...]:
        first = len(self.program.values)
        return tuple(range(first, first + len(self.entries)))

    def forward(self) -> Op:
        gone = {saved.result for saved in self.dropped}
        keep = [i for i in range(len(self.one.results)) if i not in gone]
        outputs = (
            *(self.ahead.outputs[i] for i in keep),
            *(inner for inner, _ in self.entries),
        )
        needed = set(_behind(self.ahead, outputs, ()))
        ops = tuple(
            op for i, op in enumerate(self.ahead.ops) if i in needed or op.effects
        )
        body = replace(self.ahead, ops=ops, outputs=outputs)
        results = (*(self.one.results[i] for i in keep), *self._saved_entries)
        return replace(self.one, results=results, programs=(body,))

    def backward(self) -> Op:
        barriers = self._barriers()
        copies = [self._copy(index) for index in self.copies]
        names: dict[int, int] = {}
        for saved in self.dropped:
            inner = self._read(self.ahead.outputs[saved.result])
            names.update((self.behind.inputs[i], inner) for i in saved.operands)
        ops = (*barriers, *copies, *(_renamed(op, names) for op in self.behind.ops))
        outputs = tuple(names.get(v, v) for v in self.behind.outputs)
        gone = {i for saved in self.dropped for i in saved.operands}
        entries = [inner for _, inner in self.entries]
        split = self.other.param["num_consts"]
        consts, xs = self.consts, self.xs
        return replace(
            self.other,
            operands=(
                *self.other.operands[:split],
                *(outer for outer, _ in consts),
                *_without(self.other.operands, gone, split),
                *(outer for outer, _ in xs),
                *self._saved_entries,
            ),
            params=_counted(self.other, num_consts=split + len(consts)),
            programs=(
                replace(
                    self.behind,
                    values=(*self.behind.values, *self.values),
                    inputs=(
                        *self.behind.inputs[:split],
                        *(inner for _, inner in consts),
                        *_without(self.behind.inputs, gone, split),
                        *(inner for _, inner in xs),
                        *entries,
                    ),
                    ops=ops,
                    outputs=outputs,
                ),
            ),
        )

    def _barriers(self) -> list[Op]:
        """Entries that wait for cotangents that enter."""
        first, split = self.one.param["num_consts"], self.other.param["num_consts"]
        cotangents = self.behind.inputs[split : split + self.other.param["num_carry"]]
        where = self.behind.ops[0].where
        ops: list[Op] = []
        for inner in self.ahead.inputs[first : first + self.one.param["num_carry"]]:
            value = self.ahead.values[inner]
            anchor = next(
                (v for v in cotangents if _alike(self.behind.values[v], value)), None
            )
            if inner in self.known and anchor is not None:
                entry, self.known[inner] = self.known[inner], self._new(value)
                waits = ((WAITS, (anchor,)),)
                makes = (self.known[inner],)
                ops.append(Op(REMATERIALIZE, (entry,), makes, waits, where=where))
        return ops

    def _read(self, v: int) -> int:
        """A value of the forward body, in the reverse body."""
        if self.ahead.values[v].literal is not None and v not in self.known:
            self.known[v] = self._new(self.ahead.values[v])
        return self.known[v]

    def _copy(self, index: int) -> Op:
        op = self.ahead.ops[index]
        operands = tuple(self._read(v) for v in op.operands)
        results = tuple(self._new(self.ahead.values[v]) for v in op.results)
        self.known.update(zip(op.results, results, strict=True))
        return copied(op, operands, results)


def _alike(one: Value, other: Value) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _renamed(op: Op, names: Mapping[int, int]) -> Op:
    return replace(op, operands=tuple(names.get(v, v) for v in op.operands))


def _without(values: Sequence[int], gone: Collection[int], start: int) -> list[int]:
    return [v for i, v in enumerate(values) if i >= start and i not in gone]
