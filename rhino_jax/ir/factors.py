"""What an op means to a partitioner: its named loops.

A :class:`Rule` says which *factors* (named loops) the dimensions of an op's operands
and results are made of, like an einsum: ``bij,bjk->bik``. A dimension may be a product
of factors, outermost first: a reshape is ``(ab)c->a(bc)``. Sharding an op is handing
digits of its factors to mesh axes (a :class:`Choice`); the layout of every operand and
result follows from that by :func:`layouts`.

A value that is partial may also *flow* through an op that is linear in it; each way
to do so is a :class:`Flow`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rhino_jax.ir.layout import (
    Layout,
    Split,
    contiguous,
    local_size,
    padded_size,
    sorted_dim,
)
from rhino_jax.ir.mesh import TIME, Mesh

PARALLEL = "parallel"
REDUCTION = "reduction"
BLOCKED = "blocked"
WINDOW = "window"
INDEXED = "indexed"
POSITIONAL = "positional"
RING = "ring"
HANDING = (RING, WINDOW)
"""Kinds whose op sends shards, or edges of shards, while it works."""
MANUAL = "manual"
TILED = "tiled"


@dataclass(frozen=True)
class Kind:
    """What may be done to a factor of one kind."""

    split: bool
    strided: bool
    ragged: bool
    why: str


KINDS: Mapping[str, Kind] = {
    PARALLEL: Kind(True, True, True, "each element on its own"),
    REDUCTION: Kind(True, True, True, "a split leaves a partial value"),
    BLOCKED: Kind(False, False, False, "must be whole"),
    WINDOW: Kind(True, False, False, "a split needs a halo"),
    INDEXED: Kind(True, True, True, "indices outside the shard are masked"),
    POSITIONAL: Kind(True, True, True, "the local form needs the global index"),
    RING: Kind(True, True, False, "shards of some operands go around all devices"),
    TILED: Kind(True, False, False, "a shard is one block, and may ask which"),
    MANUAL: Kind(True, False, False, "the user has handed it to the axis of its name"),
}


@dataclass(frozen=True)
class Halo:
    """What a block of a window's factor reads of ``operand`` beside its own elements:
    so many ``before`` them and ``behind`` them, held by its neighbours."""

    operand: int
    before: int
    behind: int


@dataclass(frozen=True)
class Factor:
    """One named loop of an op.

    ``operator`` combines the terms that a split leaves behind: in every result that
    lacks the factor, when the factor is a reduction, or indexed in an operand only.
    ``addends`` are operands that lack the factor and enter the sum once, whatever its
    trip count (the operand of a scatter-add): where the factor is split they are
    wanted partial, so that they are counted once. ``even``: no shard may be padded,
    whatever the kind.

    Of a ring, ``handed`` are operands whose shards every device gets to see, one after
    the other, and ``returned`` results whose terms travel with them and come home.
    Of a window, ``halos`` are what its blocks read of their neighbours'.
    """

    name: str
    size: int
    kind: str = PARALLEL
    operator: str = ""
    addends: tuple[int, ...] = ()
    even: bool = False
    handed: tuple[int, ...] = ()
    returned: tuple[int, ...] = ()
    halos: tuple[Halo, ...] = ()

    @property
    def traits(self) -> Kind:
        return KINDS[self.kind]


@dataclass(frozen=True)
class Flow:
    """Operands that may be partial together, and the results that then are."""

    operator: str
    operands: tuple[int, ...]
    results: tuple[int, ...] = (0,)


Dims = tuple[tuple[str, ...], ...]
"""For each dimension of a value, the factors it is made of, outermost first."""


@dataclass(frozen=True)
class Rule:
    """The factors of one op: its operands' and results' dimensions, and its flows."""

    factors: tuple[Factor, ...]
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    flows: tuple[Flow, ...] = ()
    _index: Mapping[str, Factor] = field(
        default_factory=dict, compare=False, repr=False, init=False
    )
    _implied: dict[Choice, Implied] = field(
        default_factory=dict, compare=False, repr=False, init=False
    )
    _ragged: dict[str, bool] = field(
        default_factory=dict, compare=False, repr=False, init=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {f.name: f for f in self.factors})

    def factor(self, name: str) -> Factor:
        return self._index[name]

    def weight(self, dim: Sequence[str], name: str) -> int:
        """How far apart in ``dim`` two neighbours along factor ``name`` are."""
        inner = dim[list(dim).index(name) + 1 :]
        return math.prod(self._index[n].size for n in inner)

    def place(self, name: str, operand: int) -> tuple[int, tuple[str, ...]]:
        """The dimension of an operand that factor ``name`` is in, and its factors."""
        dims = self.operands[operand]
        return next((d, dim) for d, dim in enumerate(dims) if name in dim)

    def may_be_ragged(self, name: str) -> bool:
        """Whether the last shards of a factor may be padded: its kind must allow it,
        and in every dimension it must be outermost."""
        if name not in self._ragged:
            factor = self.factor(name)
            self._ragged[name] = (
                factor.traits.ragged
                and not factor.even
                and all(
                    dim[0] == name
                    for dims in (*self.operands, *self.results)
                    for dim in dims
                    if name in dim
                )
            )
        return self._ragged[name]

    @cached_property
    def text(self) -> str:
        """The rule in the einsum-like notation, factor kinds written behind it."""
        short = _letters(f.name for f in self.factors)

        def side(values: Sequence[Dims]) -> str:
            return ",".join(
                "".join(
                    short[d[0]]
                    if len(d) == 1
                    else "(" + "".join(short[n] for n in d) + ")"
                    for d in dims
                )
                for dims in values
            )

        notes = [
            f"{short[f.name]}:{f.kind}" + (f"={f.operator}" if f.operator else "")
            for f in self.factors
            if f.kind != PARALLEL
        ]
        body = f"{side(self.operands)}->{side(self.results)}"
        return body + (" {" + ", ".join(notes) + "}" if notes else "")

    def problems(
        self, operands: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]]
    ) -> list[str]:
        """Everything in which this rule does not fit the shapes of an op."""
        found = []
        for what, dims_of, shapes in (
            ("operand", self.operands, operands),
            ("result", self.results, results),
        ):
            if len(dims_of) != len(shapes):
                found.append(f"{len(dims_of)} {what}s in the rule, {len(shapes)} given")
                continue
            for i, (dims, shape) in enumerate(zip(dims_of, shapes, strict=True)):
                sizes = tuple(math.prod(self._index[n].size for n in d) for d in dims)
                if sizes != tuple(shape):
                    found.append(f"{what} {i}: factors give {sizes}, shape is {shape}")
        for factor in self.factors:
            if factor.kind not in KINDS:
                found.append(f"factor {factor.name!r} has unknown kind {factor.kind!r}")
        return found


@dataclass(frozen=True)
class Choice:
    """How one op is sharded: factor -> digits handed to axes, and axis -> flow.

    Strides count within the factor, not within a dimension that holds it.
    """

    splits: tuple[tuple[str, tuple[Split, ...]], ...] = ()
    flows: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(
        splits: Mapping[str, Iterable[Split]] | None = None,
        flows: Mapping[str, int] | None = None,
    ) -> Choice:
        """A choice in normal form.

        >>> str(Choice.of({"i": [Split("d", 4)]}))
        'i: d/4'
        """
        kept = {n: sorted_dim(s) for n, s in sorted((splits or {}).items())}
        return Choice(
            tuple((n, s) for n, s in kept.items() if s),
            tuple(sorted((flows or {}).items())),
        )

    def on(self, name: str) -> tuple[Split, ...]:
        """The digits of factor ``name`` that are handed to axes."""
        return dict(self.splits).get(name, ())

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(s.axis for _, d in self.splits for s in d) + tuple(
            axis for axis, _ in self.flows
        )

    def without(self, axis: str) -> Choice:
        return Choice.of(
            {n: tuple(s for s in d if s.axis != axis) for n, d in self.splits},
            {a: flow for a, flow in self.flows if a != axis},
        )

    def with_split(self, name: str, split: Split) -> Choice:
        splits = dict(self.splits)
        splits[name] = (*splits.get(name, ()), split)
        return Choice.of(splits, dict(self.flows))

    def with_flow(self, axis: str, flow: int) -> Choice:
        return Choice.of(dict(self.splits), {**dict(self.flows), axis: flow})

    def __str__(self) -> str:
        pieces = [
            f"{n}: " + ".".join(f"{s.axis}/{s.stride}" for s in dim)
            for n, dim in self.splits
        ]
        pieces += [f"~{flow}: {axis}" for axis, flow in self.flows]
        return "; ".join(pieces) or "whole"


def parse_choice(text: str) -> Choice:
    """The inverse of ``str(choice)``.

    >>> str(parse_choice("i: d/4; ~0: t"))
    'i: d/4; ~0: t'
    """
    splits: dict[str, list[Split]] = {}
    flows: dict[str, int] = {}
    for piece in text.split("; ") if text != "whole" else []:
        name, _, value = piece.partition(": ")
        if name.startswith("~"):
            flows[value] = int(name[1:])
        else:
            pairs = [p.split("/") for p in value.split(".")]
            splits[name] = [Split(axis, int(stride)) for axis, stride in pairs]
    return Choice.of(splits, flows)


Implied = tuple[tuple[Layout, ...], tuple[Layout, ...]]
"""The layouts of an op's operands, and of its results."""


def layouts(rule: Rule, choice: Choice) -> Implied:
    """The layouts of operands and results that ``choice`` implies.

    A dimension is split at ``weight of the factor in it × stride in the factor``.
    A split factor leaves ``operator`` partial in results that lack it, and a flow
    makes its operands and results partial. Each answer is kept with the rule: the same
    few choices are asked for again and again.
    """
    found = rule._implied.get(choice)
    if found is None:
        found = rule._implied[choice] = _layouts(rule, choice)
    return found


def _layouts(rule: Rule, choice: Choice) -> Implied:
    splits = dict(choice.splits)

    def place(values: tuple[Dims, ...]) -> list[Layout]:
        return [
            Layout(
                tuple(
                    sorted_dim(
                        Split(s.axis, s.stride * rule.weight(dim, name))
                        for name in dim
                        for s in splits.get(name, ())
                    )
                    for dim in dims
                )
            )
            for dims in values
        ]

    operands, results = place(rule.operands), place(rule.results)
    for name, digits in choice.splits:
        factor = rule.factor(name)
        for split in digits:
            if factor.operator:
                for i, dims in enumerate(rule.results):
                    if not any(name in dim for dim in dims):
                        results[i] = results[i].with_partial(
                            split.axis, factor.operator
                        )
            for i in factor.addends:
                operands[i] = operands[i].with_partial(split.axis, factor.operator)
    for axis, number in choice.flows:
        flow = rule.flows[number]
        for i in flow.operands:
            operands[i] = operands[i].with_partial(axis, flow.operator)
        for i in flow.results:
            results[i] = results[i].with_partial(axis, flow.operator)
    return tuple(operands), tuple(results)


def manual_choice(rule: Rule, mesh: Mesh) -> Choice | None:
    """The one choice of an op that the user has split; None of all others."""
    names = [f.name for f in rule.factors if f.kind == MANUAL]
    wide = [name for name in names if mesh.size(name) > 1]
    return Choice.of({name: [Split(name, 1)] for name in wide}) if names else None


def choice_problems(rule: Rule, choice: Choice, mesh: Mesh) -> list[str]:
    """Everything that keeps ``choice`` from being carried out under ``rule``."""
    found = []
    axes = choice.axes
    if len(set(axes)) != len(axes):
        found.append(f"an axis is used twice: {choice}")
    for name, digits in choice.splits:
        if name not in rule._index:
            found.append(f"no factor {name!r} in {rule.text}")
            continue
        factor = rule.factor(name)
        traits = factor.traits
        if not traits.split:
            found.append(f"factor {name!r} is {factor.kind}: {traits.why}")
        layout = Layout((digits,))
        found += layout.problems((factor.size,), mesh)
        if factor.kind == MANUAL and any(split.axis != name for split in digits):
            found.append(f"factor {name!r} is manual: {traits.why}")
        if factor.kind in HANDING and any(split.axis == TIME for split in digits):
            found.append(
                f"factor {name!r} is a {factor.kind}: turns hand nothing around"
            )
        ragged = padded_size(factor.size, digits, mesh) != factor.size
        if ragged and not rule.may_be_ragged(name):
            found.append(
                f"factor {name!r} of size {factor.size} is split unevenly, and as "
                f"{factor.kind} factor (or inner part of a dimension) it can not be"
            )
        if not traits.strided and digits and not ragged:
            if contiguous(factor.size, (s.axis for s in digits), mesh) != digits:
                found.append(f"factor {name!r} is {factor.kind} and can not be strided")
        found += _halo_problems(rule, factor, digits, mesh)
    for axis, number in choice.flows:
        if not 0 <= number < len(rule.flows):
            found.append(f"no flow {number} over {axis!r} in {rule.text}")
    return found


def _halo_problems(
    rule: Rule, factor: Factor, digits: Sequence[Split], mesh: Mesh
) -> Iterator[str]:
    """Halos that are wider than the block of one neighbour."""
    if not factor.halos or not digits:
        return
    count = local_size(factor.size, tuple(digits), mesh)
    for halo in factor.halos:
        _, dim = rule.place(factor.name, halo.operand)
        held, needed = count * rule.weight(dim, factor.name), (halo.before, halo.behind)
        if max(needed) > held:
            yield (
                f"factor {factor.name!r} in blocks of {held} of operand {halo.operand} "
                f"needs {max(needed)} of a neighbour's"
            )


def follow(
    rule: Rule, dims: Dims, dim: int, split: Split, size: int
) -> tuple[str, Split] | None:
    """The factor digit that a split of one operand's or result's dimension is.

    ``size`` is the size of the split's axis. None where the digit does not lie in
    one factor.
    """
    for name in dims[dim]:
        weight = rule.weight(dims[dim], name)
        top = rule.factor(name).size * weight
        inner = split.stride % weight == 0 and split.stride * size <= top
        ragged_top = name == dims[dim][0] and split.stride % weight == 0
        if split.stride >= weight and (inner or (ragged_top and split.stride < top)):
            return name, Split(split.axis, split.stride // weight)
    return None


def _letters(names: Iterable[str]) -> dict[str, str]:
    pool = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    names = list(names)
    if all(len(n) == 1 for n in names):
        return {n: n for n in names}
    return {n: next(pool, n) for n in names}
