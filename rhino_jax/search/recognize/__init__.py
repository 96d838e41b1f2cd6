"""Attention that was written as products and a softmax, made one op.

A pass over a Program: what is exactly ``softmax(scale q k) v``, all keys seen or those
that a causal mask or a sliding window leaves, and its gradient, become the ops of
:mod:`rhino_jax.rules.attention`, which keep no scores. Anything else stays as it is: a
softmax whose probabilities something more reads (dropout, an output, a statistic),
another mask, a bias, a gradient that is stopped somewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rhino_jax.ir.check import check
from rhino_jax.ir.program import Program
from rhino_jax.search.recognize.matching import matches
from rhino_jax.search.recognize.products import Match
from rhino_jax.search.recognize.reading import Reading
from rhino_jax.search.recognize.rewriting import Rewriting, Unreachable
from rhino_jax.search.recognize.scopes import Scopes


@dataclass(frozen=True)
class Recognized:
    """A Program with attention recognized.

    ``count`` of ``softmaxes`` that meet a product became attention; where none did,
    ``program`` is the one that was given. ``scores`` are arrays of scores, one of each.
    """

    program: Program = field(repr=False)
    count: int
    softmaxes: int
    scores: Bytes


@dataclass(frozen=True)
class Bytes:
    """Of arrays of one kind: of all, loops multiplied out, and of the largest."""

    total: int = 0
    largest: int = 0


def exponentials(program: Program) -> Bytes:
    """Those of the exponentials of a Program: no scores are more."""
    each = list(_exponentials(program, 1))
    return Bytes(sum(n * k for n, k in each), max((n for n, _ in each), default=0))


def _exponentials(program: Program, turns: int) -> Iterator[tuple[int, int]]:
    """The bytes of each, and how often it is made in a step."""
    for op in program.ops:
        if op.kind == "exp":
            held = (*program.operand_values(op), *program.result_values(op))
            yield max(value.num_bytes for value in held), turns
        for inner in op.programs:
            yield from _exponentials(inner, turns * op.param.get("length", 1))


def recognize(
    program: Program, constants: Mapping[int, Any] = MappingProxyType({})
) -> Recognized:
    """``program`` with all attention in it recognized.

    ``constants``: values of its inputs that are known (arrays of numpy or like them).
    """
    scopes = Scopes.of(program)
    reading = Reading(scopes, constants)
    found, softmaxes = matches(reading)
    while found:
        rewriting = Rewriting(scopes)
        done = []
        for match in found:
            try:
                rewriting.add(match)
            except Unreachable:
                continue
            done.append(match)
        if len(done) == len(found):
            after = rewriting.program()
            done = _rid_of_scores(after, scopes, found)
        if len(done) == len(found):
            if _effects(after) != _effects(program):
                break
            after = check(after, "recognizing attention")
            return Recognized(after, len(found), softmaxes, _bytes(scopes, found))
        found = tuple(done)
    return Recognized(program, 0, softmaxes, Bytes())


def _rid_of_scores(
    after: Program, scopes: Scopes, found: Sequence[Match]
) -> list[Match]:
    """The matches whose scores are not made any more: of others something else reads
    them, or what is made of them."""
    left = {id(op) for _, op in after.walk()}
    return [match for match in found if id(scopes.maker(match.scores)) not in left]


def _effects(program: Program) -> list[tuple[str, tuple[int, ...]]]:
    """What is done beside making values, in order."""
    return [(op.kind, op.results) for _, op in program.walk() if op.effects]


def _bytes(scopes: Scopes, found: Sequence[Match]) -> Bytes:
    each = [scopes.value(match.scores).num_bytes for match in found]
    turns = [scopes.turns(match.scores[0]) for match in found]
    return Bytes(sum(n * k for n, k in zip(each, turns, strict=True)), max(each))
