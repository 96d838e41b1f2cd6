"""Which arguments are state: a part of the result takes their place in the next call.

An argument (or a part of one) and a part of the result are a pair when their leaves
have the same paths, shapes and dtypes, weak types aside, and more than half of the
leaves are carried forward in place (:mod:`rhino_jax.trace.inplace`). So new parameters
succeed old ones, and predictions do not succeed the batch they have the shape of.

What is donated is deleted, so in doubt there is no pair:

- a part of an argument pairs only where the whole does not, and only with two leaves
  or more: labels handed through to the metrics stay labels;
- an argument that is one array says too little to be told from a target whose residual
  is returned. It pairs only in a leading run of such arguments (``w, b, x, y``), with
  the result or an entry of the result's tuple, and only if it is no scalar.

An argument most of whose leaves are paired with their like in one part of the result
pairs as a whole: what an optimizer only writes (the last gradient, what its line search
saw) comes back where it was, too.

Where several results fit, as many pairs as possible are made, then arguments and
results are taken in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.ir.program import Program
from rhino_jax.trace.inplace import carried

Path = tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """The leaves ``start`` to ``stop``, which share a path so far."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Leaves:
    """The flat leaves of one side: their paths, what they are, their parts."""

    def __init__(
        self, program: Program, paths: Sequence[Path], values: Sequence[int]
    ) -> None:
        self.paths = paths
        self.kinds = [
            (program.values[v].shape, program.values[v].dtype) for v in values
        ]
        self.free = [True] * len(paths)

    def parts(self, depth: int, within: _Part) -> list[_Part]:
        """The parts of ``within`` whose path has ``depth`` entries, in order."""
        found: list[_Part] = []
        for leaf in range(within.start, within.stop):
            path = self.paths[leaf][:depth]
            if len(path) < depth:
                continue
            if found and found[-1].path == path:
                found[-1] = _Part(path, found[-1].start, leaf + 1)
            else:
                found.append(_Part(path, leaf, leaf + 1))
        return found

    def all_parts(self) -> list[_Part]:
        """The parts of every depth, in order, outer before inner."""
        depth = max((len(path) for path in self.paths), default=0)
        whole = _Part((), 0, len(self.paths))
        found = [b for d in range(depth + 1) for b in self.parts(d, whole)]
        return sorted(found, key=lambda b: b.start)

    def signature(self, part: _Part) -> tuple[object, ...]:
        skip = len(part.path)
        return tuple(
            (self.paths[k][skip:], *self.kinds[k]) for k in range(part.start, part.stop)
        )

    def is_free(self, part: _Part) -> bool:
        return all(self.free[part.start : part.stop])

    def claim(self, part: _Part) -> None:
        self.free[part.start : part.stop] = [False] * part.size


def state_pairs(
    program: Program, inputs: Sequence[Path], outputs: Sequence[Path]
) -> tuple[tuple[int, int], ...]:
    """Pairs (input leaf, output leaf), in the order of the inputs.

    ``inputs`` are the paths of the leaves of ``(args, kwargs)``, ``outputs`` of the
    result's; they come first among the Program's own.
    """
    ins = _Leaves(program, inputs, program.inputs[: len(inputs)])
    outs = _Leaves(program, outputs, program.outputs)
    marks = carried(program)

    def fits(a: _Part, b: _Part) -> bool:
        kept = sum(marks[b.start + k] >> (a.start + k) & 1 for k in range(a.size))
        return 2 * kept > a.size

    arguments = ins.parts(2, _Part((), 0, len(inputs)))
    pairs = _trees(arguments, ins, outs, fits)
    pairs += _single_arrays(arguments, ins, outs, fits)
    leaves = {a.start + k: b.start + k for a, b in pairs for k in range(a.size)}
    return tuple(sorted({**leaves, **_rest(arguments, ins, outs, leaves)}.items()))


Fits = Callable[[_Part, _Part], bool]


def _trees(
    arguments: Sequence[_Part], ins: _Leaves, outs: _Leaves, fits: Fits
) -> list[tuple[_Part, _Part]]:
    """Pairs of parts of two leaves or more, the largest first."""
    results = outs.all_parts()
    waiting = list(arguments)
    pairs = []
    while waiting := [a for a in waiting if a.size > 1]:
        size = max(a.size for a in waiting)
        group = [a for a in waiting if a.size == size]
        waiting = [a for a in waiting if a.size != size]
        offered: dict[tuple[object, ...], list[_Part]] = {}
        for b in results:
            if b.size == size and outs.is_free(b):
                offered.setdefault(outs.signature(b), []).append(b)
        fitting = [
            [b for b in offered.get(ins.signature(a), ()) if fits(a, b)] for a in group
        ]
        for a, found in zip(group, _match(fitting), strict=True):
            if found is None:
                waiting += ins.parts(len(a.path) + 1, a)
            elif outs.is_free(found):
                outs.claim(found)
                pairs.append((a, found))
    return pairs


def _rest(
    arguments: Sequence[_Part],
    ins: _Leaves,
    outs: _Leaves,
    leaves: Mapping[int, int],
) -> dict[int, int]:
    """What is left of arguments that are mostly paired, with its like."""
    found: dict[int, int] = {}
    results = outs.all_parts()
    for a in arguments:
        for b in results:
            if b.size != a.size or outs.signature(b) != ins.signature(a):
                continue
            like = [(a.start + k, b.start + k) for k in range(a.size)]
            kept = sum(leaves.get(i) == o for i, o in like)
            if 2 * kept > a.size:
                found.update(
                    (i, o) for i, o in like if i not in leaves and outs.free[o]
                )
    return found


def _match(fitting: Sequence[Sequence[_Part]]) -> list[_Part | None]:
    """One part for each, no part twice, as many as can be (augmenting paths)."""
    taken: dict[_Part, int] = {}

    def place(k: int, seen: set[_Part]) -> bool:
        for part in fitting[k]:
            if part not in seen:
                seen.add(part)
                if part not in taken or place(taken[part], seen):
                    taken[part] = k
                    return True
        return False

    for k in range(len(fitting)):
        place(k, set())
    chosen = {k: part for part, k in taken.items()}
    return [chosen.get(k) for k in range(len(fitting))]


def _single_arrays(
    arguments: Sequence[_Part], ins: _Leaves, outs: _Leaves, fits: Fits
) -> list[tuple[_Part, _Part]]:
    """Pairs of the leading arguments that are one array each."""
    whole = _Part((), 0, len(outs.paths))
    entries = [b for b in outs.parts(1, whole) if b.path[0].isdigit()]
    results = [b for b in (whole, *entries) if b.size == 1]
    pairs = []
    for a in arguments:
        if a.path[0] != "0" or a.size != 1 or ins.kinds[a.start][0] == ():
            break
        fitting = (
            b
            for b in results
            if outs.is_free(b) and outs.signature(b) == ins.signature(a) and fits(a, b)
        )
        found = next(fitting, None)
        if found is None:
            break
        outs.claim(found)
        pairs.append((a, found))
    return pairs
