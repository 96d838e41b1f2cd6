"""Rules written like an einsum: from text to :class:`~rhino_jax.ir.factors.Rule`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from rhino_jax.errors import RuleError
from rhino_jax.ir.factors import INDEXED, PARALLEL, REDUCTION, Dims, Factor, Flow, Rule

_TOKEN = re.compile(r"\(([a-zA-Z]*)\)|([a-zA-Z])|(\s+)|(.)")


def parse_rule(
    text: str,
    operands: Sequence[tuple[int, ...]],
    results: Sequence[tuple[int, ...]],
    kinds: Mapping[str, str] | None = None,
    operators: Mapping[str, str] | None = None,
    flows: Sequence[Flow] = (),
    sizes: Mapping[str, int] | None = None,
) -> Rule:
    """A rule from the einsum-like notation and the shapes of an op.

    A factor in no result is a sum reduction unless ``kinds``/``operators`` say
    otherwise. ``sizes`` are those that do not follow from the shapes. Raises
    :class:`RuleError` with a caret under the fault.

    >>> parse_rule("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)]).text
    'bij,bjk->bik {j:reduction=sum}'
    """
    if text.count("->") != 1:
        raise RuleError(f"a rule needs one '->':\n  {text}")
    left, right = text.split("->")
    sides = []
    for side, start, shapes in (
        (left, 0, operands),
        (right, len(left) + 2, results),
    ):
        values = side.split(",") if side or len(shapes) else []
        if len(values) != len(shapes):
            raise RuleError(
                f"{len(values)} terms for {len(shapes)} shapes:\n  {text}\n  "
                + " " * start
                + "^"
            )
        parsed = []
        for value in values:
            parsed.append(_parse_dims(value, text, start))
            start += len(value) + 1
        sides.append(tuple(parsed))
    known = _sizes(sides[0] + sides[1], (*operands, *results), text, sizes or {})
    in_results = {n for dims in sides[1] for dim in dims for n in dim}
    factors = []
    for name, size in known.items():
        kind = (kinds or {}).get(name, PARALLEL if name in in_results else REDUCTION)
        default = "sum" if kind in (REDUCTION, INDEXED) else ""
        if name in in_results:
            default = ""
        operator = (operators or {}).get(name, default)
        factors.append(Factor(name, size, kind, operator))
    rule = Rule(tuple(factors), sides[0], sides[1], tuple(flows))
    found = rule.problems(operands, results)
    if found:
        raise RuleError("the rule does not fit the shapes:\n  " + "\n  ".join(found))
    return rule


def _parse_dims(value: str, text: str, start: int) -> Dims:
    dims: list[tuple[str, ...]] = []
    for match in _TOKEN.finditer(value):
        group, letter, _, bad = match.groups()
        if bad:
            caret = " " * (start + match.start()) + "^"
            raise RuleError(f"unexpected {bad!r} in a rule:\n  {text}\n  {caret}")
        if group is not None:
            dims.append(tuple(group))
        elif letter:
            dims.append((letter,))
    return tuple(dims)


def _sizes(
    values: Sequence[Dims],
    shapes: Sequence[tuple[int, ...]],
    text: str,
    given: Mapping[str, int],
) -> dict[str, int]:
    order = list(dict.fromkeys(n for dims in values for dim in dims for n in dim))
    known: dict[str, int] = {**given}
    for _ in range(len(order) + 1):
        for dims, shape in zip(values, shapes, strict=True):
            if len(dims) != len(shape):
                raise RuleError(
                    f"{len(dims)} dimensions in a term for shape {shape}:\n  {text}"
                )
            for dim, n in zip(dims, shape, strict=True):
                unknown = [name for name in dim if name not in known]
                if len(unknown) == 1:
                    rest = math.prod(known[name] for name in dim if name in known)
                    known[unknown[0]] = n // max(rest, 1)
    missing = [name for name in order if name not in known]
    if missing:
        raise RuleError(f"no size follows for factors {missing}:\n  {text}")
    return {name: known[name] for name in order}
