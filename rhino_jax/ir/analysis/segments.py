"""What lies between two cuts, with its backward half and its parameters' updates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.ir.analysis.cuts import Cut
from rhino_jax.ir.analysis.mirror import backward_owners
from rhino_jax.ir.analysis.ownership import SHARED, Ownership, ownership
from rhino_jax.ir.analysis.regions import BACKWARD, EPILOGUE, FORWARD, Regions
from rhino_jax.ir.program import Program

PROLOGUE_OWNER = -1
EPILOGUE_OWNER = -2


@dataclass(frozen=True)
class Segment:
    """The ops of one segment, each tuple in program order.

    ``forward`` holds residual ops too (side results that only the backward pass
    reads). ``update`` are epilogue ops that serve this segment's parameters alone.
    ``entry`` and ``exit`` are the frontiers of the cuts before and behind it;
    ``parameters`` are positions of the inputs that this segment alone reads.
    """

    index: int
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    update: tuple[int, ...]
    entry: tuple[int, ...]
    exit: tuple[int, ...]
    parameters: tuple[int, ...]

    @property
    def ops(self) -> tuple[int, ...]:
        """Forward, backward, update: each in program order."""
        return (*self.forward, *self.backward, *self.update)


@dataclass(frozen=True)
class Segmentation:
    """Every op in exactly one segment, or in the prologue or the epilogue.

    The *prologue* are light forward ops that several segments read: masks, position
    tables, a tied parameter's cast. The *epilogue* is what no single segment owns: the
    global norm, counters, updates of shared parameters. ``owner`` has an entry an op:
    a segment's index, ``PROLOGUE_OWNER`` or ``EPILOGUE_OWNER``.
    """

    segments: tuple[Segment, ...]
    prologue: tuple[int, ...]
    epilogue: tuple[int, ...]
    owner: tuple[int, ...]
    cuts: tuple[Cut, ...]


def segments(
    program: Program,
    regions: Regions,
    cuts: Sequence[Cut],
    state: Collection[int],
    heavy: Collection[str],
) -> Segmentation:
    """The segments that ``cuts`` divide ``program`` into."""
    count = len(cuts) + 1
    owners = ownership(program, regions, cuts, state, heavy)
    found = {
        index: PROLOGUE_OWNER if owner == SHARED else owner
        for index, owner in owners.ops.items()
    }
    found |= backward_owners(program, regions, owners, count)
    late = (i for i in regions.ops(FORWARD) if i not in found)
    found |= dict.fromkeys(late, count - 1)
    found |= _update_owners(program, regions, owners, found)
    owner = tuple(found[i] for i in range(len(program.ops)))
    return _gather(regions, cuts, owners, owner)


def _gather(
    regions: Regions, cuts: Sequence[Cut], owners: Ownership, owner: tuple[int, ...]
) -> Segmentation:
    halves: list[tuple[list[int], list[int], list[int]]] = [
        ([], [], []) for _ in range(len(cuts) + 1)
    ]
    others: Mapping[int, list[int]] = {PROLOGUE_OWNER: [], EPILOGUE_OWNER: []}
    which = {BACKWARD: 1, EPILOGUE: 2}
    for index, segment in enumerate(owner):
        if segment in others:
            others[segment].append(index)
        else:
            halves[segment][which.get(regions.of[index], 0)].append(index)
    owned: list[list[int]] = [[] for _ in halves]
    for position, segment in sorted(owners.parameters.items()):
        if segment != SHARED:
            owned[segment].append(position)
    frontiers = [(), *(cut.frontier for cut in cuts), ()]
    return Segmentation(
        tuple(
            Segment(
                i,
                tuple(forward),
                tuple(backward),
                tuple(update),
                frontiers[i],
                frontiers[i + 1],
                tuple(owned[i]),
            )
            for i, (forward, backward, update) in enumerate(halves)
        ),
        tuple(others[PROLOGUE_OWNER]),
        tuple(others[EPILOGUE_OWNER]),
        owner,
        tuple(cuts),
    )


def _update_owners(
    program: Program, regions: Regions, owners: Ownership, found: Mapping[int, int]
) -> dict[int, int]:
    """The owner of each epilogue op.

    An op belongs to the one segment whose gradients, parameters or activations it is
    made from; to the epilogue, if there are several, or if it computes uniform values
    from uniform values only (adding up norms, counting). An op that reads none of
    those (decaying a moment) belongs to whoever reads it.
    """
    homes = _homes(program, regions, owners, found)
    epilogue = regions.ops(EPILOGUE)
    result: dict[int, int] = {}
    for index in epilogue:
        op = program.ops[index]
        if regions.uniform.issuperset((*op.operands, *op.results)) and all(
            program.values[v].size <= 1 for v in op.results
        ):
            result[index] = EPILOGUE_OWNER
            continue
        reads = {
            homes[v] for v in op.operands if v in homes and v not in regions.uniform
        }
        if reads:
            result[index] = reads.pop() if len(reads) == 1 else EPILOGUE_OWNER
            homes.update((v, result[index]) for v in op.results)
    for index in reversed(epilogue):
        if index in result:
            continue
        readers = {
            result[use]
            for v in program.ops[index].results
            for use in program.uses.get(v, ())
            if use in result
        }
        result[index] = readers.pop() if len(readers) == 1 else EPILOGUE_OWNER
    return result


def _homes(
    program: Program, regions: Regions, owners: Ownership, found: Mapping[int, int]
) -> dict[int, int]:
    """Value -> who owns it, before the epilogue begins."""
    homes = {
        v: segment
        for index, segment in found.items()
        if segment != PROLOGUE_OWNER
        for v in program.ops[index].results
    }
    for position, segment in owners.parameters.items():
        home = EPILOGUE_OWNER if segment == SHARED else segment
        homes[program.inputs[position]] = home
        if position in regions.gradients:
            homes[regions.gradients[position]] = home
    return homes
