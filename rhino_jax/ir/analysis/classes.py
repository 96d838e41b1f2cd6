"""Classes of equal segments, with who corresponds to whom in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rhino_jax.ir.analysis.regions import Regions
from rhino_jax.ir.analysis.segments import Segment, Segmentation
from rhino_jax.ir.program import WAITS, Program


@dataclass(frozen=True)
class SegmentClass:
    """Segments of equal structure: solved once, copied to all.

    ``members`` are indices of segments. ``ops[m]`` and ``values[m]`` are the ops and
    values of the m-th member; what stands at the same place in two of these tuples
    corresponds. Values are those that a segment makes, reads or has on its frontiers;
    members may share some (a mask, a literal's slot is each one's own).
    """

    digest: str
    members: tuple[int, ...]
    ops: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]

    @property
    def multiplicity(self) -> int:
        return len(self.members)

    def op_map(self, source: int, target: int) -> Mapping[int, int]:
        """The op of member ``target`` for each op of member ``source``.

        Both are places in ``members``, as everywhere in a class.
        """
        return dict(zip(self.ops[source], self.ops[target], strict=True))

    def value_map(self, source: int, target: int) -> Mapping[int, int]:
        """The value of member ``target`` for each value of member ``source``."""
        return dict(zip(self.values[source], self.values[target], strict=True))


def segment_classes(
    program: Program,
    regions: Regions,
    segmentation: Segmentation,
    state: Iterable[int] = (),
) -> tuple[SegmentClass, ...]:
    """The classes of ``segmentation``'s segments, in the order of their first members.

    Equal means: the same kinds of ops in the same order, with the same parameters,
    shapes, dtypes and connections, on inputs of the same roles. Names and the values
    of literals do not count: they change no plan. ``state`` are positions of inputs.
    """
    roles = _roles(program, regions, state)
    found: dict[str, list[tuple[Segment, tuple[int, ...]]]] = {}
    for segment in segmentation.segments:
        digest, values = _structure(program, regions, segmentation, segment, roles)
        found.setdefault(digest, []).append((segment, values))
    return tuple(
        SegmentClass(
            digest,
            tuple(segment.index for segment, _ in members),
            tuple(segment.ops for segment, _ in members),
            tuple(values for _, values in members),
        )
        for digest, members in found.items()
    )


def _roles(
    program: Program, regions: Regions, state: Iterable[int]
) -> Mapping[int, str]:
    roles = dict.fromkeys(program.inputs, "input")
    roles.update((program.inputs[i], "state") for i in state)
    roles.update((program.inputs[i], "parameter") for i in regions.parameters)
    return roles


def _structure(
    program: Program,
    regions: Regions,
    segmentation: Segmentation,
    segment: Segment,
    roles: Mapping[int, str],
) -> tuple[str, tuple[int, ...]]:
    """The segment's digest, and its values in the order in which they are met."""
    hasher = hashlib.sha256()
    numbers: dict[int, int] = {}

    def number(value: int) -> int:
        if value not in numbers:
            numbers[value] = len(numbers)
            kind = program.values[value]
            role = "literal" if kind.literal is not None else roles.get(value, "made")
            batch = value in regions.batch
            hasher.update(f"{kind.shape}{kind.dtype}{role}{batch};".encode())
        return numbers[value]

    outputs = frozenset(program.outputs)
    parts = (segment.forward, segment.backward, segment.update)
    hasher.update(f"{[number(v) for v in segment.entry]}".encode())
    for half, indices in enumerate(parts):
        for index in indices:
            op = program.ops[index]
            reads = [number(v) for v in op.operands]
            makes = [number(v) for v in op.results]
            given = [
                v in outputs
                or any(
                    segmentation.owner[use] != segment.index
                    for use in program.uses.get(v, ())
                )
                for v in op.results
            ]
            params = [
                (name, [number(v) for v in p] if name == WAITS else p)
                for name, p in op.params
            ]
            hasher.update(
                f"{half}{regions.of[index]}{op.kind}{reads}{makes}{given}"
                f"{params!r}{op.effects}".encode()
            )
            for body in op.programs:
                hasher.update(body.digest.encode())
    hasher.update(f"{[number(v) for v in segment.exit]}".encode())
    return hasher.hexdigest(), tuple(numbers)
