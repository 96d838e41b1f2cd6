"""What the arrays of a Program are, as forms of products and exponentials.

One walk over the ops, in order. An op that is none of :data:`READ` makes an array of
which nothing is known, and so do all that read it. What is noted on the way are the
*uses*: products that read an exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rhino_jax.ir.program import Op, itemsize
from rhino_jax.search.recognize.forms import (
    EXP,
    HIDDEN,
    MAX,
    PRODUCT,
    Atoms,
    Form,
    added,
    constant,
    moved_to,
    power,
    scaled,
    times,
    value_of,
)
from rhino_jax.search.recognize.masks import Indexed, Masks
from rhino_jax.search.recognize.scopes import (
    SHAPES,
    Name,
    Scopes,
    moved,
    places,
    spread,
    squeezed,
)

HIDING = -1e8
"""What hidden scores are set to, at most: an exponential of less is nothing beside that
of any score. (float16 has no such number; its least is taken.)"""
LEAST_FLOAT16 = -6e4
LEAST_SCALE = 0.1
"""By which they may be scaled once they are hidden, and still be nothing."""


@dataclass(frozen=True)
class Use:
    """A product (an op of a scope) that reads an exponential, by operand 0 or 1."""

    scope: int
    op: int
    side: int
    form: Form


@dataclass(frozen=True)
class Scores:
    """What an exponential is of: a product, scaled, some of it hidden.

    Numbers are those of the product's own dimensions. ``seen`` is a mask by the index
    at ``between[0]`` less that at ``between[1]`` (:class:`.masks.Indexed`), as bytes.
    """

    product: int
    scale: float
    seen: bytes = b""
    between: tuple[int, int] = (-1, -1)


@dataclass(frozen=True)
class Exponential:
    """``exp(scores - max)``; the maximum over ``shift`` (a dimension), -1 for none."""

    scores: Scores
    shift: int


class Reading:
    """The forms of every array of a step, and the uses of exponentials."""

    def __init__(self, scopes: Scopes, constants: Mapping[int, Any]) -> None:
        self.scopes = scopes
        self.masks = Masks(scopes, constants)
        self.atoms = Atoms()
        self.forms: dict[Name, Form] = {}
        self.uses: list[Use] = []
        for number, scope in enumerate(scopes.all):
            for index, op in enumerate(scope.program.ops):
                self._read(number, index, op)

    def _read(self, scope: int, index: int, op: Op) -> None:
        if op.kind == PRODUCT_KIND:
            self._product(scope, index, op)
        elif op.kind in READ and len(op.results) == 1:
            name = scope, op.results[0]
            form = READ[op.kind](self, op, name)
            if form is not None:
                self.forms[name] = form

    def form(self, name: Name) -> Form | None:
        literal = self.scopes.value(name).literal
        if literal is None:
            return self.forms.get(name)
        if isinstance(literal, bool) or not isinstance(literal, int | float):
            return None
        return constant(float(literal))

    def sizes(self, name: Name) -> tuple[int, ...]:
        return squeezed(self.scopes.value(name).shape)

    def _product(self, scope: int, index: int, op: Op) -> None:
        name = scope, op.results[0]
        rank = len(self.sizes(name))
        for side, read in enumerate(self.scopes.reads(name, op)):
            form = self.forms.get(read)
            if form and self._exponential(form):
                self.uses.append(Use(scope, index, side, form))
        if rank >= 2:
            atom = self.atoms.number(PRODUCT, name)
            self.forms[name] = ((((atom, tuple(range(rank)), 1),), 1.0),)

    def _exponential(self, form: Form) -> bool:
        return any(self.atoms.kind(a) == EXP for m, _ in form for a, _, _ in m)

    # ---- scores ----------------------------------------------------------------------

    def scores(self, form: Form, rank: int) -> tuple[Scores, tuple[int, ...]] | None:
        """A form that is scores, and where their product's dimensions lie."""
        if len(form) != 1 or len(form[0][0]) != 1:
            return None
        (((atom, dims, n),), scale) = form[0]
        kind, about = self.atoms.all[atom]
        if n != 1 or len(dims) != rank:
            return None
        if kind == PRODUCT:
            return Scores(atom, scale), dims
        if kind == HIDDEN and scale >= LEAST_SCALE:
            assert isinstance(about, Scores)
            return replace(about, scale=about.scale * scale), dims
        return None

    def hidden(self, name: Name, form: Form, mask: Name, seen_if: bool) -> Form | None:
        """Scores where ``mask`` is ``seen_if``, hidden where it is not."""
        found = self.scores(form, len(self.sizes(name)))
        seen = self._mask(name, mask)
        if found is None or seen is None or seen.by_distance is None:
            return None
        scores, dims = found
        visible = seen.by_distance.astype(bool)
        return self._hidden(scores, dims, visible == seen_if, seen.between)

    def _mask(self, name: Name, mask: Name) -> Indexed | None:
        """What a mask is, by places of the array that it is read beside."""
        found = self.masks.of(mask)
        shapes = (self.scopes.value(one).shape for one in (mask, name))
        return None if found is None else found.at(spread(*shapes))

    def _hidden(
        self,
        scores: Scores,
        dims: tuple[int, ...],
        visible: np.ndarray,
        between: tuple[int, int],
    ) -> Form | None:
        if scores.seen:
            return None
        p, q = (dims.index(place) for place in between)
        if p > q:
            p, q, visible = q, p, visible[::-1]
        about = Scores(scores.product, scores.scale, visible.tobytes(), (p, q))
        atom = self.atoms.number(HIDDEN, about)
        return ((((atom, dims, 1),), 1.0),)

    def less(self, name: Name, form: Form, bias: Name) -> Form | None:
        """Scores with a mask added to them: zeros, and minus infinity or so."""
        found = self.scores(form, len(self.sizes(name)))
        seen = self._mask(name, bias) if found else None
        if found is None or seen is None or seen.by_distance is None:
            return None
        visible = seen.by_distance == 0
        least = seen.by_distance[~visible]
        dtype = self.scopes.value(name).dtype
        if least.dtype == bool or not all(_hides(x, dtype) for x in np.unique(least)):
            return None
        return self._hidden(*found, visible, seen.between)

    def nothing_hidden(self, name: Name, form: Form, mask: Name, seen_if: bool) -> bool:
        """Whether every term is zero where ``mask`` is not ``seen_if`` anyway."""
        seen = self._mask(name, mask)
        if seen is None or seen.by_distance is None:
            return False
        visible = seen.by_distance.astype(bool) == seen_if
        either = {
            (visible.tobytes(), seen.between),
            (visible[::-1].tobytes(), seen.between[::-1]),
        }

        def covered(monomial: tuple[tuple[int, tuple[int, ...], int], ...]) -> bool:
            for atom, dims, n in monomial:
                about = self.atoms.all[atom][1]
                if isinstance(about, Exponential) and n > 0 and about.scores.seen:
                    p, q = about.scores.between
                    if (about.scores.seen, (dims[p], dims[q])) in either:
                        return True
            return False

        return all(covered(monomial) for monomial, _ in form)


def _hides(x: float, dtype: str) -> bool:
    return bool(x <= (LEAST_FLOAT16 if dtype == "float16" else HIDING))


PRODUCT_KIND = "dot_general"
Reader = Callable[[Reading, Op, Name], Form | None]


def _forms(reading: Reading, op: Op, name: Name) -> list[Form | None]:
    """Those of an elementwise op's operands, as they lie in its result."""
    into = reading.scopes.value(name).shape
    found = []
    for read in reading.scopes.reads(name, op):
        form, shape = reading.form(read), reading.scopes.value(read).shape
        if form is not None and shape != into:
            form = moved_to(form, spread(shape, into))
        found.append(form)
    return found


def _same(reading: Reading, op: Op, name: Name) -> Form | None:
    return reading.form(reading.scopes.reads(name, op)[0])


def _shape(reading: Reading, op: Op, name: Name) -> Form | None:
    (read, *_) = reading.scopes.reads(name, op)
    form = reading.form(read)
    if form is None:
        return None
    shape, into = reading.scopes.value(read).shape, reading.scopes.value(name).shape
    to = moved(op, shape, into)
    return None if to is None else moved_to(form, to)


def _convert(reading: Reading, op: Op, name: Name) -> Form | None:
    """A cast between floats of two bytes at least: rounding."""
    (read,) = reading.scopes.reads(name, op)
    dtypes = [reading.scopes.value(n).dtype for n in (read, name)]
    floating = all(d.startswith(("float", "bfloat")) for d in dtypes)
    if not floating or min(map(itemsize, dtypes)) < 2:
        return None
    form = reading.form(read)
    number = None if form is None else value_of(form)
    return form if number is None else constant(rounded(number, dtypes[1]))


def rounded(x: float, dtype: str) -> float:
    """A number as a dtype has it.

    >>> rounded(2.8284271, "bfloat16"), rounded(0.1, "float64")
    (2.828125, 0.1)
    """
    if dtype == "bfloat16":
        bits = int(np.float32(x).view(np.uint32))
        bits += 0x7FFF + (bits >> 16 & 1)
        return float(np.uint32(bits & 0xFFFF0000).view(np.float32))
    return float(np.dtype(dtype).type(x))


def _sum(sign: int) -> Reader:
    def read(reading: Reading, op: Op, name: Name) -> Form | None:
        one, other = _forms(reading, op, name)
        if one is not None and other is not None:
            finite = all(math.isfinite(x) for form in (one, other) for _, x in form)
            return added(one, other, sign) if finite else None
        (left, right) = reading.scopes.reads(name, op)
        if sign > 0 and one is not None:
            return reading.less(name, one, right)
        if sign > 0 and other is not None:
            return reading.less(name, other, left)
        return None

    return read


def _mul(reading: Reading, op: Op, name: Name) -> Form | None:
    one, other = _forms(reading, op, name)
    return None if one is None or other is None else times(one, other)


def _div(reading: Reading, op: Op, name: Name) -> Form | None:
    one, other = _forms(reading, op, name)
    if one is None or not other:
        return None
    below = power(other, -1)
    return None if below is None else times(one, below)


def _power(reading: Reading, op: Op, name: Name) -> Form | None:
    form = _same(reading, op, name)
    return None if not form else power(form, op.param["y"])


def _number(apply: Callable[[float], float]) -> Reader:
    """Of numbers alone."""

    def read(reading: Reading, op: Op, name: Name) -> Form | None:
        form = _same(reading, op, name)
        number = None if form is None else value_of(form)
        if number is None or number <= 0:
            return None
        return constant(rounded(apply(number), reading.scopes.value(name).dtype))

    return read


def _neg(reading: Reading, op: Op, name: Name) -> Form | None:
    form = _same(reading, op, name)
    return None if form is None else scaled(form, -1.0)


def _reduce_sum(reading: Reading, op: Op, name: Name) -> Form | None:
    (read,) = reading.scopes.reads(name, op)
    form = reading.form(read)
    if form is None:
        return None
    shape = reading.scopes.value(read).shape
    at = places(shape)
    over = [at[d] for d in op.param["axes"] if d in at]
    return reading.atoms.summed(form, over, squeezed(shape))


def _reduce_max(reading: Reading, op: Op, name: Name) -> Form | None:
    """The maximum of scores over one dimension."""
    (read,) = reading.scopes.reads(name, op)
    form = reading.form(read)
    at = places(reading.scopes.value(read).shape)
    over = [at[d] for d in op.param["axes"] if d in at]
    found = reading.scores(form, len(at)) if form else None
    if found is None or len(over) != 1:
        return None
    scores, dims = found
    axis = dims.index(over[0])
    kept = {p: i for i, p in enumerate(p for p in range(len(at)) if p != over[0])}
    atom = reading.atoms.number(MAX, (scores, axis))
    left = tuple(kept[d] for d in dims if d != over[0])
    return ((((atom, left, 1),), 1.0),)


def _max(reading: Reading, op: Op, name: Name) -> Form | None:
    """Beside minus infinity."""
    one, other = _forms(reading, op, name)
    for form, beside in ((one, other), (other, one)):
        if form is not None and value_of(form) == -math.inf:
            return beside
    return None


def _exp(reading: Reading, op: Op, name: Name) -> Form | None:
    form = _same(reading, op, name)
    rank = len(reading.sizes(name))
    for term in form or ():
        found = reading.scores((term,), rank)
        if found is None:
            continue
        scores, dims = found
        shift = _shift(reading, tuple(t for t in form or () if t != term), found)
        if shift is None:
            return None
        atom = reading.atoms.number(EXP, Exponential(scores, shift))
        return ((((atom, dims, 1),), 1.0),)
    return None


def _shift(
    reading: Reading, rest: Form, found: tuple[Scores, tuple[int, ...]]
) -> int | None:
    """What is taken from scores: -1 for nothing, a dimension for the maximum over it;
    None for anything else."""
    if not rest:
        return -1
    if len(rest) != 1 or len(rest[0][0]) != 1 or rest[0][1] != -1.0:
        return None
    ((atom, left, n),) = rest[0][0]
    kind, about = reading.atoms.all[atom]
    scores, dims = found
    if kind != MAX or n != 1 or not isinstance(about, tuple) or about[0] != scores:
        return None
    axis = int(about[1])
    return axis if left == tuple(d for i, d in enumerate(dims) if i != axis) else None


def _select(reading: Reading, op: Op, name: Name) -> Form | None:
    """Scores beside what hides them; what is zero where it is hidden, beside zeros."""
    if len(op.operands) != 3:
        return None
    mask = reading.scopes.reads(name, op)[0]
    _, no, yes = _forms(reading, op, name)
    for form, beside, seen_if in ((yes, no, True), (no, yes, False)):
        number = None if beside is None else value_of(beside)
        if form is None or number is None or value_of(form) is not None:
            continue
        if number == 0:
            return form if reading.nothing_hidden(name, form, mask, seen_if) else None
        if _hides(number, reading.scopes.value(name).dtype):
            return reading.hidden(name, form, mask, seen_if)
    return None


READ: Mapping[str, Reader] = {
    **dict.fromkeys(SHAPES, _shape),
    "convert_element_type": _convert,
    "copy": _same,
    "stop_gradient": _same,
    "add": _sum(1),
    "add_any": _sum(1),
    "sub": _sum(-1),
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "integer_pow": _power,
    "sqrt": _number(math.sqrt),
    "rsqrt": _number(lambda x: 1 / math.sqrt(x)),
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce_max,
    "max": _max,
    "exp": _exp,
    "select_n": _select,
}
"""How ops are read, by kind."""
