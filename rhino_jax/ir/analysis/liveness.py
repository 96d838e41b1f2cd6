"""How long each value must be kept, and how many bytes that is at each op."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate

from rhino_jax.ir.program import Program

BEFORE = -1
"""The birth of inputs: before the first op."""


@dataclass(frozen=True)
class Liveness:
    """Lifetimes in op indices, and bytes held while each op runs.

    A value lives from the op that makes it (``born``) to the last op that reads it
    (``dies``), both included: an op holds its operands and its results. A result that
    nobody reads lives during its own op. What outlives the Program dies at
    ``len(program.ops)``. Literals hold nothing and are not listed.

    ``bytes_at[i]`` are the bytes held during op i, ``inside`` the part of them that
    bodies of control flow hold on top of what crosses their boundary.
    """

    born: Mapping[int, int]
    dies: Mapping[int, int]
    bytes_at: tuple[int, ...]
    inside: Mapping[int, int]
    boundary_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes held at once; of a Program without ops, its boundary's."""
        return max(self.bytes_at, default=self.boundary_bytes)

    @property
    def peak_op(self) -> int:
        """The first op during which ``peak_bytes`` are held (-1 without ops)."""
        return self.bytes_at.index(self.peak_bytes) if self.bytes_at else BEFORE

    def live_at(self, index: int) -> frozenset[int]:
        """The values held during op ``index``. Linear in the Program: for a few."""
        return frozenset(
            v for v, birth in self.born.items() if birth <= index <= self.dies[v]
        )


def liveness(program: Program, donated: Collection[int] = ()) -> Liveness:
    """Lifetimes of all values of ``program``, in time linear in its size.

    ``donated`` are positions of inputs whose buffers may be reused: they die at their
    last use (at once, if there is none). Other inputs belong to the caller and live to
    the end, as outputs do.
    """
    kept = [v for i, v in enumerate(program.inputs) if i not in donated]
    return _lifetimes(program, (*kept, *program.outputs), frozenset())


def _lifetimes(
    program: Program, to_the_end: tuple[int, ...], free: frozenset[int]
) -> Liveness:
    """``free`` values hold no bytes here: they are counted elsewhere."""
    end = len(program.ops)
    born = dict.fromkeys(program.inputs, BEFORE)
    dies = dict.fromkeys(program.inputs, BEFORE)
    for index, op in enumerate(program.ops):
        for value in op.operands:
            if value in dies:
                dies[value] = index
        for value in op.results:
            born[value] = dies[value] = index
    dies.update((v, end) for v in to_the_end if v in born)
    inside = {
        index: max(_peak_inside(body) for body in op.programs)
        for index, op in enumerate(program.ops)
        if op.programs
    }
    # Differences: what is born during an op, less what died with the one before.
    change = [0] * (end + 2)
    for value, birth in born.items():
        if value not in free and dies[value] > BEFORE:
            size = program.values[value].num_bytes
            change[max(birth, 0)] += size
            change[dies[value] + 1] -= size
    *held, _ = accumulate(change)
    bytes_at = tuple(held[i] + inside.get(i, 0) for i in range(end))
    return Liveness(born, dies, bytes_at, inside, held[end])


def _peak_inside(body: Program) -> int:
    """The bytes that a body holds at most, but for its inputs and outputs.

    Those are the operands and results of the op around it, or slices of them.
    """
    boundary = frozenset((*body.inputs, *body.outputs))
    return max(_lifetimes(body, (), boundary).bytes_at, default=0)
