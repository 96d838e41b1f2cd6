"""A scan cut along its layers: every stage runs its own, one microbatch a tick.

The layer dimension of a scan is divided among the devices along one mesh axis. In every
tick each stage takes one microbatch through the layers it holds and hands the carry on
to the next; after ``microbatches + stages - 1`` ticks all have passed all (GPipe: Huang
et al., "GPipe", NeurIPS 2019). With several ``rounds`` a stage holds as many groups of
layers, every ``stages`` apart, and microbatches go around (the circular schedule of
Megatron's interleaving, forward and backward passes one after the other: Narayanan et
al., "Efficient Large-Scale Language Model Training", SC 2021).

Outside the loop all of that is layout: stacked values are split along their leading
dimension, the carry goes in whole and comes out as terms of a sum, of which the stage
that has it holds all. Inside, microbatches are a split over time, as in the loop that
accumulates gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from rhino_jax.ir.analysis.loops import accumulators, kept
from rhino_jax.ir.layout import Dim, Layout, Split
from rhino_jax.ir.mesh import STAGE, TIME, Axis, Mesh
from rhino_jax.ir.program import Op


@dataclass(frozen=True)
class Staged:
    """How a scan is cut: among how many stages, in how many microbatches and rounds.

    >>> cut = Staged(4, 8)
    >>> cut.ticks, cut.turns(24), round(cut.bubble, 3)
    (11, 6, 0.273)
    """

    stages: int
    microbatches: int
    rounds: int = 1

    @property
    def work(self) -> int:
        """Ticks in which one stage does something."""
        return self.rounds * self.microbatches

    @property
    def ticks(self) -> int:
        return self.work + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its ticks that a stage does nothing of use in."""
        return (self.stages - 1) / self.ticks

    def __str__(self) -> str:
        each = f" of {self.rounds} rounds, circular" if self.rounds > 1 else ", gpipe"
        return f"{self.stages} stages in one program{each} ({self.bubble:.0%} idle)"

    def turns(self, length: int) -> int:
        """Layers that one stage runs in one tick, of a scan over ``length``."""
        return length // (self.stages * self.rounds)

    def over(self, mesh: Mesh) -> Mesh:
        """``mesh`` and the time axis that the layouts inside name."""
        if TIME in mesh.names:
            return mesh
        return Mesh((*mesh.axes, Axis(TIME, self.microbatches)))

    def stack(self, length: int) -> Dim:
        """The split of a stacked value's leading dimension."""
        return (Split(STAGE, self.turns(length)),)


@dataclass(frozen=True)
class Lift:
    """How a value of a loop's body is seen outside the loop.

    ``stack``: the split of the leading dimension, of a scanned input or output.
    ``partial``: it is a term of a sum there. ``timed``: the body is run for parts of
    the batch that are together again outside.
    """

    stack: Dim | None = None
    partial: tuple[tuple[str, str], ...] = ()
    timed: bool = False

    def __call__(self, inside: Layout) -> Layout:
        found = inside.without((TIME,)) if self.timed else inside
        if self.stack is not None:
            found = found.prepended(self.stack)
        for axis, operator in self.partial:
            found = found.with_partial(axis, operator)
        return found


AS_IT_IS, STACKED = Lift(), Lift(())


def lifts(op: Op, staged: Staged | None) -> tuple[tuple[Lift, ...], tuple[Lift, ...]]:
    """How a scan's operands and its results are seen: a lift for each."""
    consts, carry = op.param["num_consts"], op.param["num_carry"]
    (body,) = op.programs
    slices = len(op.operands) - consts - carry
    stacks = len(op.results) - carry
    if staged is None:
        return (
            (AS_IT_IS,) * (consts + carry) + (STACKED,) * slices,
            (AS_IT_IS,) * carry + (STACKED,) * stacks,
        )
    whole = Lift(timed=True)
    stack = Lift(staged.stack(op.param["length"]), timed=True)
    terms = [
        Lift(partial=((STAGE, "or" if dtype == "bool" else "sum"),), timed=True)
        for dtype in (body.values[v].dtype for v in body.outputs[:carry])
    ]
    added, same = accumulators(body, consts, carry), kept(body, consts, carry)
    entering = (term if i in added else whole for i, term in enumerate(terms))
    leaving = (whole if i in same else term for i, term in enumerate(terms))
    return (
        (*(whole,) * consts, *entering, *(stack,) * slices),
        (*leaving, *(stack,) * stacks),
    )
