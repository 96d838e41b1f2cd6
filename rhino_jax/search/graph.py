"""The search's picture of a Program: what is to be decided, and who reads whom.

Everything that the search decides is a *variable*. A **site** is an op: its values are
choices. A **port** is a value at a boundary, or one that many read: its values are
layouts. A **link** says that one reads what another gives, so that a layout given in
one way and wanted in another has its price. Loops and branches are opened up: what
runs ``n`` times weighs ``n`` times, and a loop's carry is one port, which is how it
lies on entry, inside and on exit.

Segments of one class share their variables (:class:`Ties`): a network of 96 equal
layers is no larger here than one of 24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rhino_jax.ir.factors import PARALLEL, Rule
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.ir.staged import AS_IT_IS, Lift
from rhino_jax.search.rows import NO_LIMITS, Fed, Limits

INPUT, STATE, OUTPUT = "input", "state", "output"
INNER, SUMMED, READ = "inner", "summed", "read"
"""Ports inside: what enters a body; what a loop carries or a body gives, which may stay
partial; what several read."""
STORED = frozenset((INPUT, STATE, OUTPUT))
"""Roles of ports whose layout JAX must be able to hold: contiguous and even."""

Path = tuple[int, ...]
"""Where a nested Program is: op, number of the body, op inside it, and so on."""


@dataclass(frozen=True)
class Endpoint:
    """One value as a variable gives it (or wants it).

    ``index`` counts the results of a site from 0, its operands down from -1; a port has
    index 0. ``lift`` says how what the variable speaks of is seen outside its loop.
    """

    var: int
    index: int = 0
    lift: Lift = AS_IT_IS


@dataclass
class Var:
    """One variable. ``op`` is None for a port.

    ``weight``: how often it runs in a step. ``held``: for each result (of a port: for
    itself) how many instances of it stand in memory at the peak. ``fused``: for every
    operand, then every result of a site, that it is no real buffer.
    """

    program: Program
    op: Op | None
    rule: Rule | None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    role: str = ""
    weight: int = 0
    held: dict[int, int] = field(default_factory=dict)
    fused: tuple[bool, ...] = ()
    heavy: bool = False
    fixed: Layout | None = None
    wanted: tuple[tuple[str, ...], ...] | None = None
    """Per dimension the axes that a pin asks for, of a ``rhino.name``."""
    lifted: bool = False
    settled: bool = False
    """Gives no partial value: several read it, or it is a number of no batch."""
    limits: Limits = NO_LIMITS
    """Of what is inside a pipelined loop."""

    @property
    def is_site(self) -> bool:
        return self.op is not None

    @property
    def reads(self) -> tuple[Value, ...]:
        assert self.op is not None
        return self.program.operand_values(self.op)

    @property
    def makes(self) -> tuple[Value, ...]:
        assert self.op is not None
        return self.program.result_values(self.op)


Link = tuple[Endpoint, Endpoint, tuple[int, ...], str]
"""Who gives, who reads, and the shape and dtype of what is read."""


@dataclass(frozen=True)
class Body:
    """The boundary of a nested Program; None stands for a literal."""

    inputs: tuple[Endpoint | None, ...]
    outputs: tuple[Endpoint | None, ...]


@dataclass
class Graph:
    """All variables and links, and where each is in the Program."""

    program: Program
    vars: list[Var] = field(default_factory=list)
    links: dict[Link, int] = field(default_factory=dict)
    sites: dict[tuple[Path, int], int] = field(default_factory=dict)
    bodies: dict[tuple[Path, int, int], Body] = field(default_factory=dict)
    reads: dict[tuple[Path, int, str], int] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def link(
        self, source: Endpoint | None, target: Endpoint, value: Value, weight: int
    ) -> None:
        if source is not None and source != target:
            key = source, target, value.shape, value.dtype
            self.links[key] = self.links.get(key, 0) + weight


@dataclass(frozen=True)
class Ties:
    """Ops and values of the Program that stand for others like them.

    Who is not named stands for itself.
    """

    ops: Mapping[int, int] = field(default_factory=dict)
    values: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What is known of a Program before anything is decided.

    ``roles``: of each input. ``successor``: input position of an output that is the
    next value of that input. ``region``: of each op of the outermost Program, and
    ``batch`` its values that depend on the batch; ``gradients`` are values that wait
    for the update together. ``fed``: scans (ops) that are pipelined, and
    what is known of their bodies.
    """

    roles: Sequence[str]
    successor: Mapping[int, int]
    region: Sequence[str]
    batch: frozenset[int]
    gradients: frozenset[int] = frozenset()
    ties: Ties = Ties()
    fed: Mapping[int, Fed] = field(default_factory=dict)


def group_of(batch: bool, region: str) -> str:
    """Readers of a value that may share what was moved.

    An activation that was moved once is kept; a weight is gathered anew in the
    backward pass.
    """
    return "" if batch else region


def is_light(rule: Rule) -> bool:
    """Whether an op moves or maps elements: compilers fuse it with its neighbours."""
    return all(factor.kind == PARALLEL for factor in rule.factors)


def is_light_kind(var: Var) -> bool:
    """Whether a site is a light op, by the kinds of its factors."""
    return var.rule is not None and is_light(var.rule)


def batch_inputs(op: Op, number: int, batch: frozenset[int]) -> list[int]:
    """The inputs of a body of ``op`` that depend on the batch, as the graph has it."""
    program = op.programs[number]
    operands: list[int] = list(op.operands)
    if op.kind == "scan":
        consts, carry = op.param["num_consts"], op.param["num_carry"]
        touched = any(v in batch for v in operands)
        return [
            inner
            for i, (inner, v) in enumerate(zip(program.inputs, operands, strict=True))
            if v in batch or (touched and consts <= i < consts + carry)
        ]
    if op.kind == "while":
        split, consts = op.param["cond_nconsts"], op.param["body_nconsts"]
        operands = (
            [*operands[:split], *operands[split + consts :]]
            if number == 0
            else operands[split:]
        )
    if op.kind == "cond":
        operands = operands[1:]
    return [
        inner for inner, v in zip(program.inputs, operands, strict=True) if v in batch
    ]
