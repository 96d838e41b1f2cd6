"""The Rhino IR: one traced step as flat, immutable data.

A :class:`Program` is a list of ops over values in single assignment. Loops and
branches are ops that hold Programs of their own. What an op *means* is not here: it
is a :class:`~rhino_jax.ir.factors.Rule`, looked up by the op's ``kind``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Plain = Any
"""Numbers, strings, None and tuples of them: what rules may read of an op."""

_BITS = re.compile(r"\d+")


def itemsize(dtype: str) -> float:
    """Bytes of one element, by the dtype's name; a typed key counts its words.

    >>> itemsize("bfloat16"), itemsize("bool"), itemsize("int4"), itemsize("complex64")
    (2.0, 1.0, 0.5, 8.0)
    """
    if dtype == "bool":
        return 1.0
    if dtype.startswith("key<"):
        return 16.0 if "rbg" in dtype else 8.0
    bits = _BITS.search(dtype)
    assert bits, f"no size known for dtype {dtype!r}"
    return int(bits.group()) / 8


def accumulator_dtype(dtype: str) -> str:
    """In which dtype terms are added up over turns or ticks: float32 at least.

    >>> accumulator_dtype("bfloat16"), accumulator_dtype("int8")
    ('float32', 'int8')
    """
    floating = dtype.startswith(("float", "bfloat"))
    return "float32" if floating and itemsize(dtype) < 4 else dtype


WAITS = "waits"
"""The parameter of an op that names values: ones that must be there before it runs."""


@dataclass(frozen=True)
class Value:
    """One array of a Program: its shape and dtype, and a literal scalar's value."""

    shape: tuple[int, ...]
    dtype: str
    name: str = ""
    literal: bool | int | float | complex | None = None
    weak: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return math.ceil(self.size * itemsize(self.dtype))

    def __str__(self) -> str:
        if self.literal is not None:
            return f"{self.literal}"
        return f"{short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Where:
    """Where an op was written: the user's file and line, and the name stack."""

    file: str = ""
    line: int = 0
    name_stack: str = ""

    def __str__(self) -> str:
        place = f"{self.file.rsplit('/', 1)[-1]}:{self.line}" if self.file else ""
        return place or self.name_stack


@dataclass(frozen=True)
class Op:
    """One operation: its kind, its operands and results as numbers of values.

    ``params`` holds plain data that rules read; ``source`` is the traced equation,
    which only trace/ and lower/ open; ``programs`` are the bodies of control flow.
    ``local`` is what every device runs on its shard where the user has written that
    (``shard_map``): no plan is made for it.
    """

    kind: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    params: tuple[tuple[str, Plain], ...] = ()
    programs: tuple[Program, ...] = ()
    where: Where = field(default=Where(), compare=False)
    source: Any = field(default=None, compare=False, repr=False)
    effects: tuple[str, ...] = ()
    local: Program | None = field(default=None, compare=False, repr=False)

    @cached_property
    def param(self) -> Mapping[str, Plain]:
        return dict(self.params)


@dataclass(frozen=True)
class Program:
    """A traced step: values in single assignment, ops in order.

    ``inputs`` and ``outputs`` are numbers of values. Literals are values too, defined
    by nobody. An output may repeat, and may be an input.
    """

    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    name: str = "step"

    @cached_property
    def uses(self) -> Mapping[int, tuple[int, ...]]:
        """Value -> the ops that read it, in order, one entry per op."""
        found: dict[int, list[int]] = {}
        for index, op in enumerate(self.ops):
            for value in dict.fromkeys(op.operands):
                found.setdefault(value, []).append(index)
        return {value: tuple(ops) for value, ops in found.items()}

    @cached_property
    def producer(self) -> Mapping[int, int]:
        """Value -> the op that makes it (inputs and literals have none)."""
        return {v: i for i, op in enumerate(self.ops) for v in op.results}

    def shapes(self, values: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(self.values[v].shape for v in values)

    def operand_values(self, op: Op) -> tuple[Value, ...]:
        return tuple(self.values[v] for v in op.operands)

    def result_values(self, op: Op) -> tuple[Value, ...]:
        return tuple(self.values[v] for v in op.results)

    def walk(self) -> Iterator[tuple[Program, Op]]:
        """Every op of this Program and of those inside it, outer before inner."""
        for op in self.ops:
            yield self, op
            for inner in op.programs:
                yield from inner.walk()

    @cached_property
    def digest(self) -> str:
        """A hash of everything but names and source lines, stable across processes."""
        hasher = hashlib.sha256()

        def feed(program: Program) -> None:
            for value in program.values:
                # A type's name keeps 1, 1.0 and True apart.
                kind = type(value.literal).__name__
                hasher.update(
                    f"{value.shape}{value.dtype}{kind}{value.literal!r};".encode()
                )
            hasher.update(f"{program.inputs}{program.outputs}|".encode())
            for op in program.ops:
                hasher.update(
                    f"{op.kind}{op.operands}{op.results}{op.params!r}"
                    f"{op.effects}\n".encode()
                )
                for inner in op.programs:
                    feed(inner)

        feed(self)
        return hasher.hexdigest()


_SHORT = (
    ("bfloat", "bf"),
    ("float", "f"),
    ("uint", "u"),
    ("int", "i"),
    ("complex", "c"),
)


def short_dtype(dtype: str) -> str:
    """``float32`` -> ``f32``, as compilers write it."""
    for long, short in _SHORT:
        if dtype.startswith(long):
            return dtype.replace(long, short, 1)
    return dtype
