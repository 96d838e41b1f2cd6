"""Rules that stand in an op's own parameters: the user's, or Shardy's composed.

What no family knows may come with a rule of its own: one that the user registered
(:func:`rhino_jax.extend.register_rule`), or one that :mod:`rhino_jax.trace.fallback`
read off Shardy's rules for its parts. Tracing writes it into the op's parameters as
plain data, and here it becomes a :class:`~rhino_jax.ir.factors.Rule` again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rhino_jax.errors import RuleError
from rhino_jax.ir.factors import KINDS, Rule
from rhino_jax.ir.notation import parse_rule
from rhino_jax.ir.program import Op, Plain, Value

PARAM = "stated_rule"
REGISTERED, FALLBACK = "registered", "fallback"

_NOTE = re.compile(r"\s*(\w)\s*:\s*(\w+)(?:=(\w+))?\s*")


@dataclass(frozen=True)
class Stated:
    """A rule as text, who states it, and sizes that do not follow from the shapes."""

    origin: str
    text: str
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def plain(self) -> Plain:
        return self.origin, self.text, self.sizes


def stated_in(op: Op) -> Stated | None:
    """The rule that ``op`` brings along, if it does."""
    found = op.param.get(PARAM)
    return Stated(*found) if found else None


def rule_in(stated: Stated, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """The rule for these arrays.

    Raises:
        RuleError: it does not fit their shapes.
    """
    body, notes = split_notes(stated.text)
    return parse_rule(
        body,
        [v.shape for v in reads],
        [v.shape for v in makes],
        {name: kind for name, kind, _ in notes},
        {name: operator for name, _, operator in notes if operator},
        sizes=dict(stated.sizes),
    )


Notes = tuple[tuple[str, str, str], ...]
"""(factor, kind, operator) behind a rule."""


def split_notes(text: str) -> tuple[str, Notes]:
    """The rule itself, and what stands behind it in braces.

    >>> split_notes("ij->i {j:reduction=max}")
    ('ij->i', (('j', 'reduction', 'max'),))
    """
    body, brace, rest = text.partition("{")
    if not brace:
        return text.strip(), ()
    found = []
    for piece in rest.rstrip().removesuffix("}").split(","):
        match = _NOTE.fullmatch(piece)
        if not match or match[2] not in KINDS:
            at = text.index(piece, len(body))
            raise _at(
                text, at, f"{piece.strip()!r} is no factor with a kind ({_kinds()})"
            )
        found.append((match[1], match[2], match[3] or ""))
    return body.strip(), tuple(found)


def _kinds() -> str:
    return ", ".join(KINDS)


def checked_notation(text: str) -> str:
    """``text``, if it is a rule whatever the shapes are.

    Raises:
        RuleError: it does not parse, names a factor twice in one term, or gives a
            factor that no operand has; with a caret under the place.

    >>> checked_notation("bij,jk->bik")
    'bij,jk->bik'
    """
    body, notes = split_notes(text)
    arrow = body.find("->")
    if arrow < 0 or body.count("->") > 1:
        second = body.find("->", arrow + 2)
        raise _at(text, max(second, 0), "a rule has one '->', as in 'bij,jk->bik'")
    read: set[str] = set()
    for start, term in _terms(body):
        seen: set[str] = set()
        depth = 0
        for at, letter in enumerate(term, start):
            if letter.isspace():
                continue
            depth += (letter == "(") - (letter == ")")
            if letter in "()" and 0 <= depth <= 1:
                continue
            if not (letter.isascii() and letter.isalpha()):
                raise _at(text, at, f"{letter!r} is no factor: one letter each")
            if letter in seen:
                raise _at(text, at, f"factor {letter!r} stands twice in one array")
            if start > arrow and letter not in read:
                raise _at(text, at, f"factor {letter!r} is in no operand")
            seen.add(letter)
        if depth:
            raise _at(text, start, "a parenthesis is not closed")
        if start < arrow or arrow == 0:
            read |= seen
    for name, _, _ in notes:
        if name not in read:
            raise _at(text, text.index("{") + 1, f"no operand has a factor {name!r}")
    return text


def _terms(body: str) -> list[tuple[int, str]]:
    """Where each term starts, and the term; those of results behind the arrow."""
    found, start = [], 0
    arrow = body.index("->")
    for side, first in ((body[:arrow], 0), (body[arrow + 2 :], arrow + 2)):
        start = first
        for term in side.split(","):
            found.append((start, term))
            start += len(term) + 1
    return found


def _at(text: str, at: int, what: str) -> RuleError:
    return RuleError(f"{what}:\n  {text}\n  {' ' * at}^")
