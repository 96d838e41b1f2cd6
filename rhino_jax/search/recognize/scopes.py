"""One name for every array, however many bodies it is handed into.

A body's input that is handed in whole (a constant of a scan, an operand of a
``remat2``) is the array outside. So is a stack that one scan saves and another reads:
in each turn the second has what the first had in its turn of the same number, in
whatever direction either goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rhino_jax.ir.program import Op, Program, Value

Name = tuple[int, int]
"""A scope and a value of its Program."""


@dataclass(frozen=True)
class Scope:
    """One Program, and where it is run: by which op of which scope (-1: by nobody)."""

    program: Program
    parent: int = -1
    op: int = -1
    body: int = 0


@dataclass
class Scopes:
    """Every Program of a step, outer before inner, forward scans before reverse ones.

    ``inside`` maps an op (by scope and index) to the scopes of its bodies.
    """

    all: list[Scope] = field(default_factory=list)
    inside: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    origin: dict[Name, Name] = field(default_factory=dict)

    @staticmethod
    def of(program: Program) -> Scopes:
        found = Scopes()
        found._enter(Scope(program))
        return found

    def _enter(self, scope: Scope) -> int:
        number = len(self.all)
        self.all.append(scope)
        stacks: dict[int, Name] = {}
        for index, op in enumerate(scope.program.ops):
            for which, body in enumerate(op.programs):
                given = list(self._given(number, op, stacks))
                inner = self._enter(Scope(body, number, index, which))
                self.inside.setdefault((number, index), []).append(inner)
                for value, name in zip(body.inputs, given, strict=False):
                    if name is not None:
                        self.origin[inner, value] = name
                if op.kind == "scan":
                    pairs = zip(op.results, body.outputs, strict=True)
                    saved = list(pairs)[op.param["num_carry"] :]
                    stacks.update((v, self.name(inner, made)) for v, made in saved)
        return number

    def _given(
        self, scope: int, op: Op, stacks: dict[int, Name]
    ) -> Iterator[Name | None]:
        """What each input of an op's body is, where it is an array of elsewhere."""
        if op.kind == "remat2":
            yield from (self.name(scope, v) for v in op.operands)
        elif op.kind == "scan":
            consts, carry = op.param["num_consts"], op.param["num_carry"]
            yield from (self.name(scope, v) for v in op.operands[:consts])
            yield from (None for _ in range(carry))
            yield from (stacks.get(v) for v in op.operands[consts + carry :])

    def name(self, scope: int, value: int) -> Name:
        return self.origin.get((scope, value), (scope, value))

    def value(self, name: Name) -> Value:
        return self.all[name[0]].program.values[name[1]]

    def maker(self, name: Name) -> Op | None:
        """The op that makes an array; None for what comes in, and for literals."""
        program = self.all[name[0]].program
        index = program.producer.get(name[1])
        return None if index is None else program.ops[index]

    def reads(self, name: Name, op: Op) -> list[Name]:
        """The operands of an op of the scope of ``name``."""
        return [self.name(name[0], v) for v in op.operands]

    def turns(self, scope: int) -> int:
        """How often a scope is run in a step, as far as that is known."""
        here, count = self.all[scope], 1
        while here.parent >= 0:
            outer = self.all[here.parent]
            count *= outer.program.ops[here.op].param.get("length", 1)
            here = outer
        return count


def places(shape: tuple[int, ...]) -> dict[int, int]:
    """Dimensions of more than one element, numbered.

    Arrays are looked at without their dimensions of one element: those come and go.

    >>> places((1, 8, 1, 4))
    {1: 0, 3: 1}
    """
    longer = (d for d, n in enumerate(shape) if n != 1)
    return {d: place for place, d in enumerate(longer)}


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


Moved = dict[int, int]
"""Places of an operand to those of the result."""

SHAPES = frozenset("reshape squeeze expand_dims transpose broadcast_in_dim".split())


def moved(op: Op, shape: tuple[int, ...], into: tuple[int, ...]) -> Moved | None:
    """Where an op of :data:`SHAPES` moves an operand's places; None where it is more
    than that (a reshape that joins dimensions or divides one)."""
    before, after = places(shape), places(into)
    if op.kind == "transpose":
        pairs = ((d, to) for to, d in enumerate(op.param["permutation"]))
        return {before[d]: after[to] for d, to in pairs if d in before}
    if op.kind == "broadcast_in_dim":
        to = op.param["broadcast_dimensions"]
        return {place: after[to[d]] for d, place in before.items()}
    if squeezed(shape) != squeezed(into):
        return None
    if op.kind == "reshape" and op.param.get("dimensions"):
        return None
    return {place: place for place in range(len(before))}


def spread(shape: tuple[int, ...], into: tuple[int, ...]) -> Moved:
    """Where the places of an operand of an elementwise op are in its result: its
    dimensions of one element may be longer there.

    >>> spread((1, 8), (4, 8))
    {0: 1}
    """
    after = places(into)
    return {place: after[d] for d, place in places(shape).items()}
