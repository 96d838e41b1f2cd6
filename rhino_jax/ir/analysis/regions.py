"""Which ops are the forward pass, which the backward pass, which the epilogue.

Found from what depends on what, not from names:

- *Metrics* are the outputs that are no state and depend on the batch: the loss,
  accuracies, but also norms of gradients. They are gone through from the one with the
  fewest values behind it to the one with the most; one that lies behind gradients, as
  they are found from those before it, is made from gradients and does not count.
- A *parameter* is floating state that a metric which counts depends on.
- The *gradient* of a parameter is a value on every path from the batch to the new
  parameter (:mod:`rhino_jax.ir.analysis.dominance`), that is made outside the forward
  pass, depends on no state but what the forward pass reads, and has the parameter's
  shape. There may be several, one behind the other: ``g``, ``g`` reshaped, ``g``
  clipped, ``-lr * g``. JAX's name stack breaks the tie: the last one that it says a
  transposition made, or else the first. Where there is none of that shape (an
  optimizer that works on all parameters as one vector) it is the first of any shape.
- *Forward* ops are those behind the metrics that count. *Backward* ops are the others
  that lie behind gradients; those of them that stand among the forward ops are
  *residual*: side results that only the backward pass reads. All the rest is
  *epilogue*: clip, optimizer, moving averages, counters, and what nobody reads.

A step that gives nothing but its state has no metric to start from. There, and only
there, the name stack says what is forward: what transposed ops depend on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.ir.analysis.dominance import Dominators, dominators, uniform_values
from rhino_jax.ir.analysis.influence import needed, reached
from rhino_jax.ir.program import Op, Program

FORWARD = "forward"
RESIDUAL = "residual"
BACKWARD = "backward"
EPILOGUE = "epilogue"

_FLOATING = ("float", "bfloat", "complex")


@dataclass(frozen=True)
class Regions:
    """The region of each op, and what was found on the way.

    ``parameters`` are input positions. ``gradients`` maps them to values; one without
    a gradient (frozen, or fed by no batch) is left out. ``turn`` is the last forward
    op that the backward pass depends on (-1 if there is none). ``batch`` are the
    values that depend on the batch, ``uniform`` scalars and scalars spread out.
    """

    of: tuple[str, ...]
    parameters: tuple[int, ...]
    gradients: Mapping[int, int]
    turn: int
    batch: frozenset[int]
    uniform: frozenset[int]

    def ops(self, *regions: str) -> tuple[int, ...]:
        """The ops of some regions, in order."""
        return tuple(i for i, region in enumerate(self.of) if region in regions)


def regions(
    program: Program, pairs: Mapping[int, int], batch_inputs: Collection[int]
) -> Regions:
    """The regions of ``program``.

    ``pairs`` maps positions of state inputs to those of the outputs that succeed them;
    ``batch_inputs`` are the positions of what a call brings anew.
    """
    sources = tuple(program.inputs[i] for i in batch_inputs)
    batch = reached(program, sources)
    uniform = uniform_values(program)
    above = dominators(program, sources, uniform)
    forward: frozenset[int] = frozenset()
    gradients: dict[int, int] = {}
    for values in _behind_metrics(program, pairs, batch):
        if values.isdisjoint(gradients.values()):
            forward |= values
            gradients = _gradients(program, pairs, forward, above)
    state = {program.inputs[i] for i in pairs}
    if forward.isdisjoint(state):
        forward |= _hinted_forward(program)
        gradients = _gradients(program, pairs, forward, above)
    of, turn = _classify(program, forward, needed(program, gradients.values()))
    parameters = tuple(_parameters(program, pairs, forward))
    return Regions(of, parameters, gradients, turn, batch, uniform)


def _parameters(
    program: Program, pairs: Iterable[int], forward: frozenset[int]
) -> Iterator[int]:
    for position in pairs:
        value = program.inputs[position]
        if value in forward and program.values[value].dtype.startswith(_FLOATING):
            yield position


def _behind_metrics(
    program: Program, pairs: Mapping[int, int], batch: frozenset[int]
) -> list[frozenset[int]]:
    """What lies behind each output of the batch that is no state, least first."""
    state = set(pairs.values())
    metrics = dict.fromkeys(v for i, v in enumerate(program.outputs) if i not in state)
    return sorted((needed(program, (v,)) for v in metrics if v in batch), key=len)


def _hinted_forward(program: Program) -> frozenset[int]:
    """The values that transposed ops start from, by the name stack."""
    transposed = [op for op in program.ops if _transposed(op)]
    made = {v for op in transposed for v in op.results}
    return needed(program, {v for op in transposed for v in op.operands} - made) - made


def _transposed(op: Op) -> bool:
    return "transpose(" in op.where.name_stack


def _gradients(
    program: Program,
    pairs: Mapping[int, int],
    forward: frozenset[int],
    above: Dominators,
) -> dict[int, int]:
    """The gradient of each parameter that has one."""
    other_state = (program.inputs[i] for i in pairs)
    foreign = reached(program, (v for v in other_state if v not in forward))
    found = {}
    for position in _parameters(program, pairs, forward):
        chain = []
        for value in above.chain(program.outputs[pairs[position]]):
            if value in forward:
                break
            if value not in foreign:
                chain.append(value)
        # Nearest the batch first; what is handed through unchanged is no gradient.
        chain = [v for v in reversed(chain) if v in program.producer]
        if chain:
            found[position] = _choose(program, program.inputs[position], chain)
    return found


def _choose(program: Program, parameter: int, chain: Sequence[int]) -> int:
    """The gradient among the values on all paths from the batch, nearest it first."""
    shape = program.values[parameter].shape
    fitting = [v for v in chain if program.values[v].shape == shape]
    hinted = [v for v in fitting if _transposed(program.ops[program.producer[v]])]
    return (hinted[-1:] or fitting[:1] or chain[:1])[0]


def _classify(
    program: Program, forward: Iterable[int], backward: Iterable[int]
) -> tuple[tuple[str, ...], int]:
    """The region of each op, and the last forward op that the backward pass needs."""
    is_forward, is_backward = set(forward), set(backward)
    turn = -1
    of = []
    for index, op in enumerate(program.ops):
        ahead = not is_forward.isdisjoint(op.results)
        behind = not is_backward.isdisjoint(op.results)
        if ahead and behind:
            turn = index
        of.append(FORWARD if ahead else BACKWARD if behind else EPILOGUE)
    return tuple(
        RESIDUAL if region == BACKWARD and index < turn else region
        for index, region in enumerate(of)
    ), turn
