"""Where the backward pass goes over from one segment to the one before it.

The backward pass runs through the segments from the last to the first. An op that
reads a parameter, or a value that lives within one segment, tells which one it is
about. In between stand ops that do not tell (adding up cotangents, sums for a bias):
there the place is taken that fewest values cross, the first of these. It is right
behind the cotangent of the cut's frontier.
"""

from __future__ import annotations

from collections.abc import Sequence

from rhino_jax.ir.analysis.crossings import Crossings, crossings
from rhino_jax.ir.analysis.ownership import Ownership, reading_segments
from rhino_jax.ir.analysis.regions import BACKWARD, Regions
from rhino_jax.ir.program import Program


def backward_owners(
    program: Program, regions: Regions, owners: Ownership, segments: int
) -> dict[int, int]:
    """The segment of each op of the backward pass; ``segments`` is their number."""
    order = regions.ops(BACKWARD)
    if not order:
        return {}
    told = _told(program, regions, owners, order)
    made = frozenset(v for i in order for v in program.ops[i].results)
    crossed = crossings(program, made - regions.uniform, order)
    place, found = order[0], {}
    places = [0] * segments
    for segment in range(segments - 1, 0, -1):
        place = _crossing(
            told.get(segment, []), told.get(segment - 1, []), place, order[-1], crossed
        )
        places[segment - 1] = place
    segment = segments - 1
    for index in order:
        while segment and index >= places[segment - 1]:
            segment -= 1
        found[index] = segment
    _follow_gradients(program, regions, found)
    return found


def _told(
    program: Program, regions: Regions, owners: Ownership, order: Sequence[int]
) -> dict[int, list[int]]:
    """Segment -> the backward ops that are surely about it, in order."""
    home = {program.inputs[i]: owner for i, owner in owners.parameters.items()}
    last = reading_segments(program, regions, owners)
    for index, owner in owners.ops.items():
        for value in program.ops[index].results:
            if last.get(value, owner) == owner:
                home[value] = owner
    found: dict[int, list[int]] = {}
    for index in order:
        # A uniform value (a denominator, a count) may be read anywhere.
        reads = {
            home[v]
            for v in program.ops[index].operands
            if v in home and v not in regions.uniform
        }
        if len(reads) == 1:
            found.setdefault(reads.pop(), []).append(index)
    return found


def _crossing(
    above: Sequence[int],
    below: Sequence[int],
    first: int,
    last: int,
    crossed: Crossings,
) -> int:
    """The place after the ops of ``above`` and before those of ``below``.

    Where they are mixed, the stretch is taken that leaves fewest of them on the wrong
    side. The place is not before ``first`` nor behind ``last``.
    """
    events = sorted([*((i, 1) for i in above), *((i, 0) for i in below)])
    wrong = len(above)
    starts = [(wrong, first)]
    for index, is_above in events:
        wrong += -1 if is_above else 1
        starts.append((wrong, index + 1))
    least = min(wrong for wrong, _ in starts)
    # Of several such stretches the last: what is late belongs to the segment before.
    at = max(k for k, (wrong, _) in enumerate(starts) if wrong == least)
    low = max(first, starts[at][1])
    high = max(low, events[at][0] if at < len(events) else last)
    return min(range(low, high + 1), key=lambda i: (crossed.count[i], i))


def _follow_gradients(
    program: Program, regions: Regions, found: dict[int, int]
) -> None:
    """Casts and reshapes of a gradient go to the op that they start from."""
    for gradient in regions.gradients.values():
        chain = []
        value = gradient
        while program.producer.get(value) in found:
            index = program.producer[value]
            chain.append(index)
            op = program.ops[index]
            arrays = [v for v in op.operands if v not in regions.uniform]
            if len(arrays) != 1 or len(program.uses[arrays[0]]) != 1 or op.programs:
                break
            if program.values[arrays[0]].size != program.values[gradient].size:
                break
            value = arrays[0]
        for index in chain:
            found[index] = found[chain[-1]]
