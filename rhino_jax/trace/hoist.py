"""Constants found inside a body become operands of the op that holds the body.

A constant inside a loop or a branch (a closed-over table in a jitted helper, say)
must reach the body like any other value: as an input of the outermost Program, handed
down. Each kind of control flow has its own place for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rhino_jax.ir.program import Plain, Program


@dataclass(frozen=True)
class Call:
    """An op with bodies under construction: nested Programs, operands, parameters."""

    bodies: list[Program]
    operands: list[int]
    params: dict[str, Plain]


Hoisted = Sequence[Sequence[int]]
"""Per body, the outer values that stand for its constants (its last inputs)."""


def _first(body: Program, count: int) -> Program:
    """The last ``count`` inputs in front of the others."""
    keep = len(body.inputs) - count
    return replace(body, inputs=(*body.inputs[keep:], *body.inputs[:keep]))


def _counted(params: Mapping[str, Any], **more: int) -> dict[str, Plain]:
    return {**params, **{key: params[key] + n for key, n in more.items()}}


def _scan(call: Call, hoisted: Hoisted) -> Call:
    (body,), (found,) = call.bodies, hoisted
    params = _counted(call.params, num_consts=len(found))
    return Call([_first(body, len(found))], [*found, *call.operands], params)


def _while(call: Call, hoisted: Hoisted) -> Call:
    (test, body), (of_test, of_body) = call.bodies, hoisted
    split = call.params["cond_nconsts"]
    operands = [*of_test, *call.operands[:split], *of_body, *call.operands[split:]]
    params = _counted(call.params, cond_nconsts=len(of_test), body_nconsts=len(of_body))
    return Call(
        [_first(test, len(of_test)), _first(body, len(of_body))], operands, params
    )


def _cond(call: Call, hoisted: Hoisted) -> Call:
    """Every branch takes every branch's constants, and lets those of others lie."""
    every = {outer: None for found in hoisted for outer in found}
    like = {
        outer: body.values[inner]
        for body, found in zip(call.bodies, hoisted, strict=True)
        for outer, inner in _pairs(body, found)
    }
    bodies = []
    for body, found in zip(call.bodies, hoisted, strict=True):
        own = dict(_pairs(body, found))
        values, taken = list(body.values), []
        for outer in every:
            if outer not in own:
                values.append(like[outer])
            taken.append(own.get(outer, len(values) - 1))
        inputs = (*body.inputs[: len(body.inputs) - len(found)], *taken)
        bodies.append(replace(body, values=tuple(values), inputs=inputs))
    return Call(bodies, [*call.operands, *every], call.params)


def _pairs(body: Program, found: Sequence[int]) -> list[tuple[int, int]]:
    inner = body.inputs[len(body.inputs) - len(found) :]
    return list(zip(found, inner, strict=True))


def _call(call: Call, hoisted: Hoisted) -> Call:
    (body,), (found,) = call.bodies, hoisted
    return Call([_first(body, len(found))], [*found, *call.operands], call.params)


HOIST: Mapping[str, Callable[[Call, Hoisted], Call]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _call,
}
