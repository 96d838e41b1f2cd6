"""The one value through which everything that is known of another has passed.

Take the values that depend on some sources (the batch). The *immediate dominator* of
such a value is the last value that lies on every path from the sources to it. So the
gradient of a parameter dominates the new parameter: whatever the optimizer does, the
batch is heard of through the gradient alone.

Uniform values (scalars, and scalars spread over a shape) are no path where there is
another: the norm of all gradients scales every one of them, and joins none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rhino_jax.ir.analysis.influence import read_by
from rhino_jax.ir.program import Op, Program

ROOT = -1
"""The dominator of the sources, and of what has paths that never meet."""


@dataclass(frozen=True)
class Dominators:
    """The immediate dominator of every value that the sources reach."""

    above: Mapping[int, int]

    def chain(self, value: int) -> Iterator[int]:
        """``value`` and its dominators, nearest first, without the root."""
        while value in self.above:
            yield value
            value = self.above[value]


def dominators(
    program: Program, sources: Iterable[int], uniform: frozenset[int]
) -> Dominators:
    """Immediate dominators of all values that depend on ``sources``."""
    tree = _Tree()
    for value in sources:
        tree.put(value, ROOT)
    for op in program.ops:
        if not any(v in tree.above for v in op.operands):
            continue
        for value, reads in zip(op.results, _read_by(op), strict=True):
            paths = [v for v in dict.fromkeys(reads) if v in tree.above]
            if value not in uniform:
                paths = [v for v in paths if v not in uniform] or paths
            if paths:
                meet = paths[0]
                for other in paths[1:]:
                    meet = tree.meet(meet, other)
                tree.put(value, meet)
    return Dominators(tree.above)


def _read_by(op: Op) -> tuple[tuple[int, ...], ...]:
    return read_by(op) if op.programs else (op.operands,) * len(op.results)


def uniform_values(program: Program) -> frozenset[int]:
    """Values of one element, and those that are made of nothing else, spread out.

    Ops that draw or count (random bits, iota) give something else than a scalar
    spread out: only a broadcast, and ops that keep the shape of an operand, count.
    """
    values = program.values
    found = {v for v, value in enumerate(values) if value.size <= 1}
    for op in program.ops:
        if op.programs or not op.operands or not found.issuperset(op.operands):
            continue
        shapes = {values[v].shape for v in op.operands}
        spread = op.kind == "broadcast_in_dim"
        found.update(v for v in op.results if spread or values[v].shape in shapes)
    return frozenset(found)


class _Tree:
    """A tree that grows at its leaves, with jumps towards the root.

    A node's jump is set so that any ancestor is reached in O(log depth) steps (Myers,
    An applicative random-access stack, 1983).
    """

    def __init__(self) -> None:
        self.above: dict[int, int] = {}
        self._jump: dict[int, int] = {ROOT: ROOT}
        self._depth: dict[int, int] = {ROOT: 0}

    def put(self, node: int, parent: int) -> None:
        jump, depth = self._jump, self._depth
        near = jump[parent]
        far = jump[near]
        even = depth[parent] - depth[near] == depth[near] - depth[far]
        self.above[node] = parent
        jump[node] = far if even else parent
        depth[node] = depth[parent] + 1

    def meet(self, a: int, b: int) -> int:
        """The lowest node above (or at) both."""
        a, b = self._lift(a, self._depth[b]), self._lift(b, self._depth[a])
        while a != b:
            # At equal depths jumps are equally long.
            if self._jump[a] != self._jump[b]:
                a, b = self._jump[a], self._jump[b]
            else:
                a, b = self.above[a], self.above[b]
        return a

    def _lift(self, node: int, depth: int) -> int:
        while self._depth[node] > depth:
            over = self._jump[node]
            node = over if self._depth[over] >= depth else self.above[node]
        return node
