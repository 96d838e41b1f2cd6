"""Where compilers leave the order of the plan: what runs later, or earlier.

**Combined collectives.** XLA joins collectives of one kind over the same devices into
one, up to a size of its results (``xla_gpu_*_combine_threshold_bytes``). What the first
one reads then waits for the last: full gradients stand side by side until one
reduce-scatter takes them all. The rule used here, in the order of the plan: a
collective joins the open group of its kind if nothing reads a result of the group
before it (all then run where it stands), or if what it reads was there when the group
began (all then run where that stands).

**Products that add.** A matrix product whose result is only added to something becomes
one library call that adds (``beta = 1``). It waits for what it is added to: the logits'
gradient of a tied embedding is kept until the look-up's gradient is there too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rhino_jax.cost.buffers import Unfolded
from rhino_jax.ir.steps import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER

ADDS = frozenset(("add", "add_any"))
COMBINED = frozenset((ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER))


@dataclass
class _Group:
    members: list[int] = field(default_factory=list)
    num_bytes: int = 0
    first_read: int = 0


def combined_at(
    unfolded: Unfolded, reads: list[tuple[int, ...]], threshold_bytes: int
) -> dict[int, int]:
    """Collective -> the instruction at whose place it runs; only those in groups.

    Args:
        reads: for each instruction the real buffers that it needs.
        threshold_bytes: the most a group's results may have; 0 combines nothing.
    """
    first_read, ready = _first_reads(unfolded, reads), _ready(unfolded)
    open_groups: dict[tuple[object, ...], _Group] = {}
    found: dict[int, int] = {}
    for index, instruction in enumerate(unfolded.instructions):
        step = instruction.step
        if step is None or step.kind not in COMBINED or not threshold_bytes:
            continue
        (source,), (made,) = instruction.reads, instruction.writes
        num_bytes = unfolded.buffers[made].num_bytes
        operators = tuple(dict(step.source.partial).get(axis) for axis in step.axes)
        key = step.kind, step.axes, operators
        group = open_groups.get(key)
        if group and group.num_bytes + num_bytes <= threshold_bytes:
            later = group.first_read > index
            early = ready[source] < group.members[0] and not later
            if later or early:
                group.members.append(index)
                group.num_bytes += num_bytes
                group.first_read = min(group.first_read, first_read[made])
                place = index if later else group.members[0]
                found.update(dict.fromkeys(group.members, place))
                continue
        open_groups[key] = _Group([index], num_bytes, first_read[made])
    return found


def products_at(unfolded: Unfolded) -> dict[int, int]:
    """Product -> the addition that it becomes part of."""
    ready = _ready(unfolded)
    found = {}
    for index, instruction in enumerate(unfolded.instructions):
        if instruction.kind != "dot_general":
            continue
        (made,) = instruction.writes
        readers = unfolded.readers[made]
        if len(readers) != 1 or unfolded.instructions[readers[0]].kind not in ADDS:
            continue
        others = [b for b in unfolded.instructions[readers[0]].reads if b != made]
        size = unfolded.buffers[made].num_bytes
        if any(
            ready[b] > index and unfolded.buffers[b].num_bytes == size for b in others
        ):
            found[index] = readers[0]
    return found


def _first_reads(unfolded: Unfolded, reads: list[tuple[int, ...]]) -> list[int]:
    found = [len(unfolded.instructions)] * len(unfolded.buffers)
    for index in reversed(range(len(reads))):
        for buffer in reads[index]:
            found[buffer] = index
    return found


def _ready(unfolded: Unfolded) -> list[int]:
    """Where each buffer is made; -1 for inputs."""
    found = [-1] * len(unfolded.buffers)
    for index, instruction in enumerate(unfolded.instructions):
        for buffer in instruction.writes:
            found[buffer] = index
    return found
