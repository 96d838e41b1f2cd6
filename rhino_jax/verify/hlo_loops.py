"""How many times a compiled loop runs.

The CPU and GPU compilers write ``known_trip_count`` beside a loop; the TPU compiler
does not, so there the count is worked out from the loop itself: a counter that starts
at a constant, grows by a constant and is compared with a constant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rhino_jax.verify.hlo_text import Computation, HloModule, Instruction


@dataclass(frozen=True)
class Affine:
    """An integer: ``offset``, plus the loop's carry at ``element`` if not None."""

    element: int | None
    offset: int


Path = tuple[int, ...]
Binding = Callable[[int, Path], Affine | None]
"""What parameter n of a computation is, at a path into its tuple."""

_SAME = {"copy", "convert", "bitcast", "reshape", "copy-start", "copy-done"}
_CALLS = {"fusion": "calls", "call": "to_apply"}
_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_MIRROR = {"GT": "LT", "GE": "LE"}


def nothing_known(number: int, path: Path) -> Affine | None:
    """The binding of a computation whose arguments are unknown."""
    return None


def carried(number: int, path: Path) -> Affine | None:
    """The binding of a loop body: element i of the carry is itself."""
    return Affine(path[0], 0) if len(path) == 1 else None


def evaluate(
    module: HloModule, inside: Computation, name: str, path: Path, binding: Binding
) -> Affine | None:
    """The integer that ``name`` holds at ``path``, or None where that is not known."""
    one = inside.instructions[name]
    operands = one.operands

    def same(operand: str, at: Path) -> Affine | None:
        return evaluate(module, inside, operand, at, binding)

    if one.opcode == "parameter":
        return binding(int(one.operand_text), path)
    if one.opcode == "constant":
        whole = re.fullmatch(r"-?\d+", one.operand_text.strip())
        return Affine(None, int(whole.group())) if whole and not path else None
    if one.opcode == "get-tuple-element":
        return same(operands[0], (int(one.attribute("index")), *path))
    if one.opcode == "tuple" and path:
        return same(operands[path[0]], path[1:])
    if one.opcode in _SAME:
        return same(operands[0], path)
    if one.opcode in ("add", "subtract"):
        return _sum(one, same(operands[0], path), same(operands[1], path))
    if one.opcode in _CALLS:
        called = module.computations[one.attribute(_CALLS[one.opcode])]
        return evaluate(
            module, called, called.root, path, arguments(module, inside, one, binding)
        )
    if one.opcode == "while" and path and _step(module, one, path[0]) == 0:
        return same(operands[0], path)
    return None


def _sum(one: Instruction, left: Affine | None, right: Affine | None) -> Affine | None:
    if left is None or right is None:
        return None
    if one.opcode == "subtract":
        if right.element is not None:
            return None
        return Affine(left.element, left.offset - right.offset)
    if left.element is not None and right.element is not None:
        return None
    element = right.element if left.element is None else left.element
    return Affine(element, left.offset + right.offset)


def arguments(
    module: HloModule,
    inside: Computation,
    caller: Instruction,
    binding: Binding,
    first: int = 0,
) -> Binding:
    """The binding of a computation that takes the caller's operands from ``first``."""
    operands = caller.operands[first:]

    def bound(number: int, path: Path) -> Affine | None:
        return evaluate(module, inside, operands[number], path, binding)

    return bound


def body_binding(
    module: HloModule, inside: Computation, loop: Instruction, binding: Binding
) -> Binding:
    """The binding of a loop body: what is passed through is what it started as."""

    def bound(number: int, path: Path) -> Affine | None:
        if not path or _step(module, loop, path[0]) != 0:
            return None
        return evaluate(module, inside, loop.operands[0], path, binding)

    return bound


def _step(module: HloModule, loop: Instruction, element: int) -> int | None:
    """By how much the body moves an element of the carry (None: not by a constant)."""
    body = module.computations[loop.attribute("body")]
    after = evaluate(module, body, body.root, (element,), carried)
    return after.offset if after is not None and after.element == element else None


def trip_count(
    module: HloModule, inside: Computation, loop: Instruction, binding: Binding
) -> int | None:
    """How often the body of ``loop`` runs, or None where the text does not tell.

    ``binding`` says what the parameters of ``inside`` are known to be.
    """
    if known := _KNOWN.search(loop.rest):
        return int(known.group(1))
    condition = module.computations[loop.attribute("condition")]
    test = _comparison(module, condition, condition.root, carried)
    if test is None:
        return None
    left, right, direction = test

    def line(side: Affine) -> tuple[int, int] | None:
        """(value before the first turn, growth a turn)."""
        if side.element is None:
            return side.offset, 0
        start = evaluate(module, inside, loop.operands[0], (side.element,), binding)
        step = _step(module, loop, side.element)
        if start is None or start.element is not None or step is None:
            return None
        return start.offset + side.offset, step

    first, second = line(left), line(right)
    if first is None or second is None:
        return None
    return _turns(first[0] - second[0], first[1] - second[1], direction)


def _comparison(
    module: HloModule, inside: Computation, name: str, binding: Binding
) -> tuple[Affine, Affine, str] | None:
    one = inside.instructions[name]
    if one.opcode == "compare":
        left, right = (
            evaluate(module, inside, side, (), binding) for side in one.operands
        )
        if left is None or right is None:
            return None
        return left, right, one.attribute("direction")
    if one.opcode in _SAME:
        return _comparison(module, inside, one.operands[0], binding)
    if one.opcode in _CALLS:
        called = module.computations[one.attribute(_CALLS[one.opcode])]
        inner = arguments(module, inside, one, binding)
        return _comparison(module, called, called.root, inner)
    return None


def _turns(gap: int, growth: int, direction: str) -> int | None:
    """How long ``gap + growth * k`` (k = 0, 1, ...) stands in ``direction`` to zero.

    >>> _turns(-5, 1, "LT"), _turns(-5, 2, "LE"), _turns(4, -1, "GT")
    (5, 3, 4)
    """
    if direction in _MIRROR:
        return _turns(-gap, -growth, _MIRROR[direction])
    if direction == "LE":
        return _turns(gap - 1, growth, "LT")
    if direction == "LT":
        if gap >= 0:
            return 0
        return -(gap // growth) if growth > 0 else None
    if direction == "NE":
        if gap == 0:
            return 0
        return -gap // growth if growth and gap % growth == 0 > gap * growth else None
    return None
