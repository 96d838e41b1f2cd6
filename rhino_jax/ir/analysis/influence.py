"""Which operands each result of an op really depends on, loops and branches opened.

:mod:`rhino_jax.ir.depends` takes an op with nested Programs as one. Here each result
is traced through the bodies, so that a loop's stacked weights are told from its
stacked activations. Sets of inputs are bit masks: bit i stands for the i-th.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rhino_jax.ir.program import Op, Program

Masks = tuple[int, ...]
"""For each result, the operands that it depends on, as bits."""


def influences(op: Op) -> Masks:
    """For each result of ``op``, the operands that it depends on, as bits.

    An op without nested Programs, or of a kind that is not known to hold them, is
    taken as one: each result depends on each operand.

    >>> from rhino_jax.ir.program import Op
    >>> influences(Op("split", (0,), (1, 2)))
    (1, 1)
    """
    if op.programs and op.kind in _THROUGH:
        return _THROUGH[op.kind](op)
    return ((1 << len(op.operands)) - 1,) * len(op.results)


def output_masks(program: Program, inputs: Iterable[int]) -> Masks:
    """For each output of ``program``, the union of the masks it is reached by.

    ``inputs`` gives a mask for each input of the Program.
    """
    held = dict(zip(program.inputs, inputs, strict=True))
    for op in program.ops:
        masks = [held.get(v, 0) for v in op.operands]
        if not op.programs:
            union = 0
            for mask in masks:
                union |= mask
            for value in op.results:
                held[value] = union
            continue
        for value, through in zip(op.results, influences(op), strict=True):
            held[value] = _selected(through, masks)
    return tuple(held.get(v, 0) for v in program.outputs)


def _selected(through: int, masks: list[int]) -> int:
    """The union of those of ``masks`` whose bits are set in ``through``."""
    union = 0
    for i, mask in enumerate(masks):
        if through >> i & 1:
            union |= mask
    return union


def _bits(start: int, count: int) -> list[int]:
    return [1 << (start + i) for i in range(count)]


def _call(op: Op) -> Masks:
    (body,) = op.programs
    return output_masks(body, _bits(0, len(op.operands)))


def _cond(op: Op) -> Masks:
    given = _bits(1, len(op.operands) - 1)
    found = [output_masks(branch, given) for branch in op.programs]
    # Which branch is taken, the first operand, decides every result.
    return tuple(1 | _any(masks) for masks in zip(*found, strict=True))


def _any(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _carried(step: Callable[[list[int]], Masks], start: list[int]) -> list[int]:
    """The masks of a loop's carry once another round adds nothing."""
    carry = start
    while True:
        again = [a | b for a, b in zip(carry, step(carry), strict=True)]
        if again == carry:
            return carry
        carry = again


def _scan(op: Op) -> Masks:
    (body,) = op.programs
    consts, count = op.param["num_consts"], op.param["num_carry"]
    given = _bits(0, len(op.operands))

    def outputs(carry: list[int]) -> Masks:
        return output_masks(body, [*given[:consts], *carry, *given[consts + count :]])

    start = given[consts : consts + count]
    carry = _carried(lambda masks: outputs(masks)[:count], start)
    return (*carry, *outputs(carry)[count:])


def _while(op: Op) -> Masks:
    test, body = op.programs
    split = op.param["cond_nconsts"]
    first = split + op.param["body_nconsts"]
    given = _bits(0, len(op.operands))

    def step(carry: list[int]) -> Masks:
        # How often the body runs decides every result.
        (again,) = output_masks(test, [*given[:split], *carry])
        done = output_masks(body, [*given[split:first], *carry])
        return tuple(mask | again for mask in done)

    return tuple(_carried(step, given[first:]))


_THROUGH: Mapping[str, Callable[[Op], Masks]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _call,
}


def read_by(op: Op) -> tuple[tuple[int, ...], ...]:
    """For each result of ``op``, the values that it depends on."""
    return tuple(
        tuple(v for i, v in enumerate(op.operands) if mask >> i & 1)
        for mask in influences(op)
    )


def reached(program: Program, start: Iterable[int]) -> frozenset[int]:
    """Every value that depends on one of ``start`` (itself included)."""
    found = set(start)
    for op in program.ops:
        if found.isdisjoint(op.operands):
            continue
        if not op.programs:
            found.update(op.results)
            continue
        for value, reads in zip(op.results, read_by(op), strict=True):
            if not found.isdisjoint(reads):
                found.add(value)
    return frozenset(found)


def needed(program: Program, end: Iterable[int]) -> frozenset[int]:
    """Every value that one of ``end`` depends on (itself included)."""
    found = set(end)
    for op in reversed(program.ops):
        if found.isdisjoint(op.results):
            continue
        if not op.programs:
            found.update(op.operands)
            continue
        for value, reads in zip(op.results, read_by(op), strict=True):
            if value in found:
                found.update(reads)
    return frozenset(found)
