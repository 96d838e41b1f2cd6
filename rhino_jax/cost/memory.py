"""Peak memory of a device: the real buffers of a plan, by liveness.

Inputs are there from beginning to end; an output that takes over a donated input's
memory costs nothing once that input was last read. Every other buffer stands while it
is held (:mod:`rhino_jax.cost.lives`). What a body holds at most stands beside its loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from rhino_jax.cost.buffers import RuleOf, Unfolded, unfold
from rhino_jax.cost.fusion import Fusion, fusion
from rhino_jax.cost.habits import PLAIN, Habits
from rhino_jax.cost.lives import BEFORE, lives
from rhino_jax.cost.peeled import ahead
from rhino_jax.cost.placement import Span
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program, Where

_NAMED = 8
WORKSPACE = frozenset(("dot_general",))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, pads of ragged shards included.

    Attributes:
        peak_bytes: inputs, outputs with memory of their own and temporaries at once.
        input_bytes: all inputs (parameters, optimizer state, batch).
        output_bytes: outputs that take over no donated input.
        temp_bytes: what stands at the peak beside the inputs.
        op: index of the op of the Program at the peak (-1: before the first).
        where: its place in the user's source.
        at_peak: the largest buffers beside the inputs at the peak, and their bytes.
    """

    peak_bytes: int
    input_bytes: int
    output_bytes: int
    temp_bytes: int
    op: int = BEFORE
    where: Where = field(default=Where())
    at_peak: tuple[tuple[str, int], ...] = ()


def memory(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    rule_of: RuleOf,
    donated: tuple[int, ...] = (),
    habits: Habits = PLAIN,
) -> Memory:
    """Peak bytes of ``program`` under ``assignment``, near linear in its ops.

    Args:
        donated: positions of inputs whose memory outputs may take over.
        habits: what the compiler adds (:data:`HABITS`).
    """
    unfolded = unfold(program, assignment, mesh, rule_of, donated, habits)
    return memory_of(Held(unfolded, fusion(unfolded, habits), habits))


def memory_of(held: Held) -> Memory:
    """:func:`memory` of what was unfolded already."""
    unfolded = held.unfolded
    inputs = sum(unfolded.buffers[b].num_bytes for b in set(unfolded.inputs))
    top = max(held.bytes_at, default=0)
    spot = held.bytes_at.index(top) if top else BEFORE
    at = unfolded.instructions[spot] if spot != BEFORE else None
    taken = {unfolded.outputs[o] for _, o in unfolded.same}
    free = {*unfolded.inputs, *taken}
    return Memory(
        inputs + top,
        inputs,
        sum(unfolded.buffers[b].num_bytes for b in {*unfolded.outputs} - free),
        top,
        at.index if at else BEFORE,
        at.where if at else Where(),
        tuple(held.named(spot)),
    )


class Held:
    """Bytes held beside the inputs during every instruction.

    ``born`` and ``dies`` are the first and the last instruction that a real buffer
    stands during; ``bytes_at`` what stands during each, with what its bodies hold.
    """

    def __init__(self, unfolded: Unfolded, fused: Fusion, habits: Habits) -> None:
        self.unfolded = unfolded
        self.fused = fused
        self.habits = habits
        self.lives = lives(unfolded, fused, habits)
        self.born, self.dies = self.lives.born, self.lives.dies
        self.within = {
            i: max(
                (Held(body, fusion(body, habits), habits) for body in one.bodies),
                key=lambda body: body.peak_bytes,
            )
            for i, one in enumerate(unfolded.instructions)
            if one.bodies
        }
        self.inside = {i: body.peak_bytes for i, body in self.within.items()}
        for i, instruction in enumerate(unfolded.instructions):
            library = habits.workspace_bytes if instruction.kind in WORKSPACE else 0
            if library or instruction.extended_bytes:
                self.inside[i] = library + instruction.extended_bytes
        end = len(unfolded.instructions)
        change = [0] * (end + 2)
        for buffer, birth in self.born.items():
            size = unfolded.buffers[buffer].num_bytes
            change[max(birth, 0)] += size
            change[max(birth, self.dies[buffer] + 1)] -= size
        self.early = list(ahead(unfolded, self.within)) if habits.peels else []
        for first, i, size in self.early:
            change[first] += size
            change[i] -= size
        *held, _ = accumulate(change)
        self.bytes_at = [held[i] + self.inside.get(i, 0) for i in range(end)]

    def stays(self) -> Iterator[tuple[int, int, int]]:
        """Bytes of every memory, and its first and last instruction.

        Buffers written over one another in place are one memory.
        """
        shared = self.lives.shared
        later = set(shared.values())
        for buffer, birth in self.born.items():
            if buffer in later:
                continue
            last = buffer
            while last in shared:
                last = shared[last]
            yield self.unfolded.buffers[buffer].num_bytes, birth, self.dies[last]

    def spans(
        self,
        stays: Iterable[tuple[int, int, int]] | None = None,
        begin: int = 0,
        order: Sequence[int] | None = None,
    ) -> Iterator[Span]:
        """Everything beside the inputs with the ticks during which it stands.

        A loop's body has ticks of its own within those of its instruction.

        Args:
            stays: of the buffers outside bodies, if not :meth:`stays`.
            order: instructions as they run, if not one after the other: ``stays`` are
                then by places in it, and nothing of a peeled loop is ahead of it.
        """
        places = range(len(self.bytes_at)) if order is None else order
        ticks = [begin]
        for i in places:
            within = self.within.get(i)
            ticks.append(ticks[-1] + (within.num_ticks if within else 0) + 1)
        last = len(self.bytes_at) - 1
        for size, birth, dies in self.stays() if stays is None else stays:
            if size and dies >= birth:
                yield Span(size, ticks[max(birth, 0)], ticks[min(dies, last) + 1] - 1)
        for place, i in enumerate(places) if self.inside else ():
            if i in self.within:
                yield from self.within[i].spans(begin=ticks[place])
            elif i in self.inside:
                yield Span(self.inside[i], ticks[place], ticks[place])
        for first, i, size in self.early if order is None else ():
            yield Span(size, ticks[first], ticks[i] - 1)

    @property
    def num_ticks(self) -> int:
        bodies = self.within.values()
        return len(self.bytes_at) + sum(body.num_ticks for body in bodies)

    @property
    def peak_bytes(self) -> int:
        return max(self.bytes_at, default=0)

    def named(self, spot: int) -> Iterator[tuple[str, int]]:
        """The largest buffers held during one instruction, in its bodies too."""
        yield from sorted(self._named(spot), key=lambda pair: (-pair[1], pair[0]))[
            :_NAMED
        ]

    def _named(self, spot: int) -> Iterator[tuple[str, int]]:
        instructions = self.unfolded.instructions
        for buffer, birth in self.born.items():
            if birth <= spot <= self.dies[buffer]:
                held = self.unfolded.buffers[buffer]
                where = instructions[birth].where if birth >= 0 else Where()
                place = f" of {where}" if held.name.startswith("%") and where else ""
                yield held.name + place, held.num_bytes
        if spot in self.within:
            body = self.within[spot]
            yield from body._named(body.bytes_at.index(body.peak_bytes))
        elif self.inside.get(spot):
            yield f"workspace of {instructions[spot].kind}", self.inside[spot]
