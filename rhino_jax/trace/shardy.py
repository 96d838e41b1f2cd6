"""What Shardy says of a primitive: the second opinion on our rules.

The op is lowered alone to StableHLO, Shardy's pass writes a sharding rule on every
instruction, and the rules of all instructions are composed into one :class:`Rule`
over the op's own operands and results. Where Shardy knows no rule, or a factor has a
use that no single shard could carry out, the factor is blocked: the answer errs on
the side of running whole.

Shardy's words: a factor of ``need_replication`` must be gathered; one of
``permutation`` may be split, but every shard needs some of its neighbours'. Neither
is a loop that a shard runs on its own, so both are blocked here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.ir.factors import BLOCKED, PARALLEL, REDUCTION, Dims, Factor, Rule
from rhino_jax.ir.program import Op

PIPELINE = "builtin.module(func.func(sdy-populate-op-sharding-rules))"

REDUCERS: Mapping[str, str] = {
    "stablehlo.add": "sum",
    "stablehlo.maximum": "max",
    "stablehlo.minimum": "min",
    "stablehlo.and": "and",
    "stablehlo.or": "or",
}
"""What combines the terms of a reduction, by the one instruction of its region."""

SUMS = ("stablehlo.dot_general", "stablehlo.convolution", "stablehlo.gather")
"""Instructions whose reduction factors are sums by their nature."""

Sequences = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class TermRule:
    """One ``#sdy.op_sharding_rule``: factors per dimension, sizes, special sets."""

    operands: tuple[Sequences, ...]
    results: tuple[Sequences, ...]
    sizes: Mapping[str, int]
    reduction: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Term:
    """One instruction: its operands and results as numbers of arrays."""

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: TermRule | None = None
    operator: str = ""
    is_zero: bool = False


@dataclass(frozen=True)
class Lowered:
    """One op in StableHLO: array shapes, its operands and results, instructions."""

    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    terms: tuple[Term, ...]


def shardy_rule(op: Op) -> Rule:
    """The factors of a traced ``op`` as Shardy sees them."""
    return compose(ask(op))


# ---- asking -----------------------------------------------------------------------


def ask(op: Op) -> Lowered:
    """``op`` lowered alone, with Shardy's rule of every instruction.

    Random keys have no shape of their own in StableHLO: no op on them is asked about.
    """

    def alone(*args: jax.Array) -> Any:
        return compat.bind(op.source, args, {})

    avals = [v.aval for v in op.source.invars]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    traced = jax.jit(alone, keep_unused=True).trace(*shapes)
    lowered = traced.lower(lowering_platforms=("cpu",))
    module = compat.parse_stablehlo(compat.module_bytes(lowered))
    with module.context:
        compat.run_passes(module, PIPELINE)
        found = _Reader.of(module).read()
    read = [found.shapes[v] for v in found.inputs]
    assert read == [a.shape for a in avals], f"{op.kind} reads random keys"
    return found


@dataclass
class _Reader:
    """An MLIR module read into numbers; calls are followed."""

    functions: dict[str, Any]
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)

    @staticmethod
    def of(module: Any) -> _Reader:
        found = {op.attributes["sym_name"].value: op for op in module.body.operations}
        return _Reader(found)

    def read(self) -> Lowered:
        main = self.functions["main"]
        inputs = [self.number(v) for v in main.regions[0].blocks[0].arguments]
        outputs = self.call(main, inputs)
        return Lowered(
            tuple(self.shapes), tuple(inputs), tuple(outputs), tuple(self.terms)
        )

    def number(self, value: Any) -> int:
        self.shapes.append(tuple(value.type.shape))
        return len(self.shapes) - 1

    def call(self, function: Any, args: Sequence[int]) -> list[int]:
        block = function.regions[0].blocks[0]
        env = dict(zip(block.arguments, args, strict=True))
        for op in block.operations:
            operation = op.operation
            ins = [env[v] for v in operation.operands]
            if operation.name == "func.return":
                return ins
            if operation.name == "func.call":
                callee = operation.attributes["callee"].value
                outs = self.call(self.functions[callee], ins)
            else:
                if "sdy.sharding_rule" not in operation.attributes:
                    ins += [env[v] for v in _seen_from_inside(operation) if v in env]
                outs = [self.number(v) for v in operation.results]
                self.terms.append(_term(operation, ins, outs))
            env.update(zip(operation.results, outs, strict=True))
        raise AssertionError("a function without a return")


def _seen_from_inside(operation: Any) -> Iterator[Any]:
    """What the regions of an instruction read, of their own or from around it."""
    for region in operation.regions:
        for block in region.blocks:
            for op in block.operations:
                yield from op.operation.operands
                yield from _seen_from_inside(op.operation)


def _term(operation: Any, ins: Sequence[int], outs: Sequence[int]) -> Term:
    attributes = operation.attributes
    text = "sdy.sharding_rule"
    rule = parse_term_rule(str(attributes[text])) if text in attributes else None
    zero = operation.name == "stablehlo.constant" and bool(
        _ZERO.search(operation.get_asm(large_elements_limit=8))
    )
    operator = "sum" if operation.name in SUMS else _reducer(operation)
    return Term(operation.name, tuple(ins), tuple(outs), rule, operator, zero)


def _reducer(operation: Any) -> str:
    """The operator of a region that is one instruction on its two arguments."""
    if len(operation.regions) != 1 or not len(operation.regions[0].blocks):
        return ""
    block = operation.regions[0].blocks[0]
    body = [op.operation for op in block.operations]
    if len(body) != 2 or set(body[0].operands) != set(block.arguments):
        return ""
    return REDUCERS.get(body[0].name, "")


_ZERO = re.compile(r"dense<(\(?[-+0.e,]+\)?|false)>")
_RULE = re.compile(
    r"op_sharding_rule<\((?P<operands>.*?)\)->\((?P<results>.*?)\)"
    r"(?: \{(?P<sizes>.*?)\})?(?P<sets>(?: \w+=\{.*?\})*)(?:, custom)?>"
)
_FACTOR = re.compile(r"[a-z](?:_\d+)?")
_SET = re.compile(r"(\w+)=\{(.*?)\}")


def parse_term_rule(text: str) -> TermRule:
    """A rule from Shardy's own notation.

    >>> rule = parse_term_rule(
    ...     "#sdy.op_sharding_rule<([ij, k])->([i, jk]) {i=4, j=2, k=3} reduction={k}>")
    >>> rule.operands, rule.results
    (((('i', 'j'), ('k',)),), ((('i',), ('j', 'k')),))
    >>> dict(rule.sizes), sorted(rule.reduction)
    ({'i': 4, 'j': 2, 'k': 3}, ['k'])
    """
    match = _RULE.search(text)
    assert match, f"no sharding rule of Shardy's: {text!r}"
    sizes = (piece.split("=") for piece in (match["sizes"] or "").split(", ") if piece)
    sets = {name: _FACTOR.findall(held) for name, held in _SET.findall(match["sets"])}
    unknown = set(sets) - {
        "reduction",
        "need_replication",
        "permutation",
        "blocked_propagation",
    }
    assert not unknown, f"unknown factor sets in {text!r}"
    return TermRule(
        _sides(match["operands"]),
        _sides(match["results"]),
        {name: int(size) for name, size in sizes},
        frozenset(sets.get("reduction", ())),
        frozenset(sets.get("need_replication", ()))
        | frozenset(sets.get("permutation", ())),
    )


def _sides(text: str) -> tuple[Sequences, ...]:
    return tuple(
        tuple(tuple(_FACTOR.findall(dim)) for dim in value.split(", ") if dim)
        for value in re.findall(r"\[(.*?)\]", text)
    )


# ---- composing --------------------------------------------------------------------


def compose(lowered: Lowered) -> Rule:
    """One rule over the inputs and outputs, from the rules of all instructions."""
    pieces = _Pieces(lowered)
    for term in lowered.terms:
        pieces.join(term)
    sums = _reductions(lowered, pieces)

    def held(values: Iterable[int]) -> list[int]:
        return [p for v in values for dim in pieces.dims(v) for p in dim]

    made = set(held(lowered.outputs))
    factors = []
    for piece in dict.fromkeys(held((*lowered.inputs, *lowered.outputs))):
        kind, operator = PARALLEL, ""
        if piece in pieces.blocked:
            kind = BLOCKED
        elif piece not in made:
            # Read and never reduced: some instruction lost it on the way.
            operator = sums.get(piece, "")
            kind = REDUCTION if operator else BLOCKED
        elif piece in sums:
            kind = BLOCKED
        factors.append(Factor(f"f{piece}", pieces.size[piece], kind, operator))

    def named(value: int) -> Dims:
        return tuple(tuple(f"f{p}" for p in dim) for dim in pieces.dims(value))

    return Rule(
        tuple(factors),
        tuple(map(named, lowered.inputs)),
        tuple(map(named, lowered.outputs)),
    )


def _reductions(lowered: Lowered, pieces: _Pieces) -> dict[int, str]:
    """Pieces that are reduced, with the operator; "" where no shard may do it alone.

    The terms must stand in an output as they are: what another instruction makes of
    them (as a softmax does of its sum) need not be combined by the same operator.
    """
    readers: dict[int, int] = {}
    for value in itertools.chain(*(term.operands for term in lowered.terms)):
        readers[value] = readers.get(value, 0) + 1
    zeros = {v for term in lowered.terms if term.is_zero for v in term.results}
    found: dict[int, str] = {}
    for term in lowered.terms:
        if term.rule is None or not term.rule.reduction:
            continue
        last = all(v in lowered.outputs and v not in readers for v in term.results)
        # Scalars that every shard would start from, each adding them once more.
        starts = [v for v in term.operands if not lowered.shapes[v] and v not in zeros]
        counted = term.operator == "sum" and term.name == "stablehlo.reduce" and starts
        operator = term.operator if last and not counted else ""
        for name in term.rule.reduction:
            for piece in pieces.of_factor(term, name):
                found[piece] = (
                    operator if found.get(piece, operator) == operator else ""
                )
    return found


def _one_sided(name: str, rule: TermRule) -> set[str]:
    """Factors of one side alone that are not summed: a shard needs all of them."""

    def held(side: Iterable[Sequences]) -> set[str]:
        return {factor for dims in side for dim in dims for factor in dim}

    read, made = held(rule.operands), held(rule.results)
    lost = read - made - rule.reduction
    return lost if name == "stablehlo.broadcast_in_dim" else lost | (made - read)


class _Pieces:
    """Dimensions of all arrays as products of pieces, refined as rules are joined.

    A piece is a number; ``_parts`` says of one what it was cut into (outer, inner) or
    which one it turned out to be.
    """

    def __init__(self, lowered: Lowered) -> None:
        self.size: list[int] = []
        self.blocked: set[int] = set()
        self._parts: dict[int, tuple[int, ...]] = {}
        self._values = [[self._new(n) for n in shape] for shape in lowered.shapes]
        self._factors: dict[tuple[int, str], tuple[int, ...]] = {}
        self._numbers = {id(term): i for i, term in enumerate(lowered.terms)}

    def _new(self, size: int) -> tuple[int, ...]:
        if size == 1:
            return ()
        self.size.append(size)
        return (len(self.size) - 1,)

    def _leaves(self, pieces: Iterable[int]) -> Iterator[int]:
        for piece in pieces:
            if piece in self._parts:
                yield from self._leaves(self._parts[piece])
            else:
                yield piece

    def dims(self, value: int) -> list[tuple[int, ...]]:
        return [tuple(self._leaves(dim)) for dim in self._values[value]]

    def of_factor(self, term: Term, name: str) -> tuple[int, ...]:
        return tuple(self._leaves(self._factors[self._numbers[id(term)], name]))

    def join(self, term: Term) -> None:
        """Take in what one instruction says of the arrays it reads and makes."""
        values = (*term.operands, *term.results)
        if term.rule is None:
            if term.operands:
                self._block(d for v in values for d in self.dims(v))
            return
        number = self._numbers[id(term)]
        for name, size in term.rule.sizes.items():
            self._factors[number, name] = self._new(size)
        for value, dims in zip(
            values, (*term.rule.operands, *term.rule.results), strict=True
        ):
            for dim, names in zip(self.dims(value), dims, strict=True):
                held = [p for n in names for p in self._factors[number, n]]
                self._unify(list(dim), list(self._leaves(held)))
            self._no_diagonal(value)
        for name in term.rule.whole | _one_sided(term.name, term.rule):
            self._block([self.of_factor(term, name)])

    def _no_diagonal(self, value: int) -> None:
        """A piece in two dimensions of one array is no loop of its own."""
        held = [p for dim in self.dims(value) for p in dim]
        self._block([[p for p in held if held.count(p) > 1]])

    def _block(self, dims: Iterable[Iterable[int]]) -> None:
        for dim in dims:
            self.blocked.update(self._leaves(dim))

    def _unify(self, left: list[int], right: list[int]) -> None:
        """Say that two products are the same dimension."""
        sizes = [math.prod(self.size[p] for p in side) for side in (left, right)]
        if sizes[0] != sizes[1]:
            # A window, a slice, a join: the factor is not the dimension itself.
            self._block([left, right])
            return
        while left and right:
            a, b = left.pop(), right.pop()
            if a == b:
                continue
            if self.size[a] == self.size[b]:
                self._parts[b] = (a,)
                self._pass_on(b)
                left = list(self._leaves(left))
                right = list(self._leaves(right))
                continue
            large, small = (a, b) if self.size[a] > self.size[b] else (b, a)
            if self.size[large] % self.size[small]:
                self._block([left, right, [a, b]])
                return
            (outer,) = self._new(self.size[large] // self.size[small])
            (inner,) = self._new(self.size[small])
            self._parts[large] = (outer, inner)
            self._pass_on(large)
            left = list(self._leaves([*left, a]))
            right = list(self._leaves([*right, b]))

    def _pass_on(self, piece: int) -> None:
        """A blocked piece that was cut or renamed leaves its parts blocked."""
        if piece in self.blocked:
            self.blocked.update(self._leaves(self._parts[piece]))
