"""Attention among the uses of exponentials.

With scores ``S`` (a product of queries and keys), ``P`` their softmax over the keys and
``dP`` the product of a cotangent and the values, the products sought are

- the result: ``P`` and values, over keys;
- gradients: ``P`` and the cotangent, over queries (of values); ``dS = scale P (dP -
  sum(P dP))`` and keys, over keys (of queries); ``dS`` and queries, over queries (of
  keys).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rhino_jax.ir.program import Op
from rhino_jax.search.recognize.forms import (
    EXP,
    PRODUCT,
    Form,
    added,
    near,
    power,
    scaled,
    times,
)
from rhino_jax.search.recognize.products import (
    Array,
    Gradient,
    Labels,
    Made,
    Match,
    Sides,
    operands,
    sides_of,
    views,
)
from rhino_jax.search.recognize.reading import Exponential, Reading, Use
from rhino_jax.search.recognize.scopes import Name, Scopes, places


def matches(reading: Reading) -> tuple[tuple[Match, ...], int]:
    """Every attention, and how many softmaxes there are that a product reads."""
    finder = _Finder(reading, reading.scopes)
    return tuple(finder.run()), len(finder.softmaxes)


@dataclass
class _Softmax:
    """Uses of one exponential: of its probabilities, and of their gradient (with the
    scale and the product ``dP``)."""

    probabilities: list[Use]
    gradients: list[tuple[Use, float, int]]


@dataclass(frozen=True)
class _Known:
    """What is known of an exponential: labels of its scores' dimensions."""

    labels: Labels
    rows: frozenset[str]
    batch: frozenset[str]
    queries: Array
    keys: Array
    scores: Name
    about: Exponential


class _Finder:
    def __init__(self, reading: Reading, scopes: Scopes) -> None:
        self.reading = reading
        self.scopes = scopes
        self.softmaxes: dict[tuple[int, int], _Softmax] = defaultdict(
            lambda: _Softmax([], [])
        )
        """By exponential and the dimension that it is summed over."""

    def run(self) -> Iterator[Match]:
        for use in self.reading.uses:
            self._sort(use)
        for (atom, axis), found in self.softmaxes.items():
            known = self._known(atom, axis)
            if known is not None:
                yield from self._match(known, axis, found)

    # ---- forms -----------------------------------------------------------------------

    def _sort(self, use: Use) -> None:
        """Note a use as one of probabilities or of their gradient, if it is one."""
        atoms = self.reading.atoms
        for atom, dims, n in (f for m, _ in use.form for f in m):
            if atoms.kind(atom) != EXP or n != 1:
                continue
            exponential: Form = ((((atom, dims, 1),), 1.0),)
            sizes = self._sizes(use)
            for axis, place in enumerate(dims):
                share = self._share(exponential, place, sizes)
                if share is None:
                    continue
                if near(use.form, share):
                    self.softmaxes[atom, axis].probabilities.append(use)
                    return
                found = self._gradient(use.form, share, place, sizes)
                if found is not None:
                    self.softmaxes[atom, axis].gradients.append((use, *found))
                    return

    def _sizes(self, use: Use) -> tuple[int, ...]:
        program = self.scopes.all[use.scope].program
        read = program.ops[use.op].operands[use.side]
        return self.reading.sizes((use.scope, read))

    def _share(self, form: Form, place: int, sizes: tuple[int, ...]) -> Form | None:
        """A form over its sum over one place."""
        total = self._total(form, place, sizes)
        below = power(total, -1) if total else None
        return None if below is None else times(form, below)

    def _total(self, form: Form, place: int, sizes: tuple[int, ...]) -> Form | None:
        """The sum over one place, beside the same array."""
        total = self.reading.atoms.summed(form, (place,), sizes)
        if total is None:
            return None
        kept = [p for p in range(len(sizes)) if p != place]
        back = tuple(
            (tuple(sorted((a, tuple(kept[d] for d in dims), n) for a, dims, n in m)), x)
            for m, x in total
        )
        return tuple(sorted(back))

    def _gradient(
        self, form: Form, share: Form, place: int, sizes: tuple[int, ...]
    ) -> tuple[float, int] | None:
        """The scale and the product ``dP`` of ``scale P (dP - sum(P dP))``."""
        rank = len(sizes)
        for monomial, _ in form:
            for atom, dims, n in monomial:
                product = self.reading.atoms.kind(atom) == PRODUCT
                if not product or n != 1 or len(dims) != rank:
                    continue
                inner = times(share, ((((atom, dims, 1),), 1.0),))
                total = self._total(inner, place, sizes) if inner else None
                shared = times(share, total) if total else None
                whole = added(inner, shared, -1) if inner and shared else None
                if not whole:
                    continue
                scale = dict(form).get(whole[0][0])
                if scale and near(form, scaled(whole, scale / whole[0][1])):
                    return scale / whole[0][1], atom
        return None

    # ---- dimensions ------------------------------------------------------------------

    def _product(self, name: Name) -> tuple[Op, list[Name], Sides]:
        op = self.scopes.maker(name)
        assert op is not None
        return self._operands(name[0], op)

    def _operands(self, scope: int, op: Op) -> tuple[Op, list[Name], Sides]:
        reads = [self.scopes.name(scope, v) for v in op.operands]
        shapes = [self.scopes.value(read).shape for read in reads]
        return op, reads, sides_of(op, shapes)

    def _known(self, atom: int, axis: int) -> _Known | None:
        """Labels of scores whose softmax goes over ``axis``; None where queries and
        keys can not be told."""
        about = self.reading.atoms.all[atom][1]
        assert isinstance(about, Exponential)
        name = self.reading.atoms.all[about.scores.product][1]
        assert isinstance(name, tuple)
        if about.shift not in (-1, axis):
            return None
        _, reads, sides = self._product(name)
        columns = [{made for _, made in free} for free in sides.free]
        side = next((i for i in (0, 1) if axis in columns[i]), None)
        if side is None or len(columns[side]) != 1 or len(sides.contracted) != 1:
            return None
        rows = sorted(columns[1 - side])
        if not 1 <= len(rows) <= 2 or len(sides.batch) > 2:
            return None
        sizes = self.reading.sizes(name)
        labels = ["u"] * len(sizes)
        first = self._first_row(about, rows, axis, sizes)
        for row in rows:
            labels[row] = "t" if row == first else "g"
        names = self._batch(sides, side, self.scopes.value(reads[side]).shape)
        for label, (_, made) in zip(names, sides.result, strict=True):
            labels[made] = label
        arrays = operands(reads, sides, labels, "d")
        return _Known(
            tuple(labels),
            frozenset(labels[row] for row in rows),
            frozenset(labels[made] for _, made in sides.result),
            arrays[1 - side],
            arrays[side],
            name,
            about,
        )

    def _first_row(
        self, about: Exponential, rows: list[int], axis: int, sizes: Sequence[int]
    ) -> int:
        """Which dimension is that of queries: the one that the mask knows, else one as
        long as that of keys, else the longest."""
        masked = [row for row in rows if row in about.scores.between]
        alike = [row for row in rows if sizes[row] == sizes[axis]]
        return (masked or alike or sorted(rows, key=lambda r: -sizes[r]))[0]

    def _batch(self, sides: Sides, side: int, shape: tuple[int, ...]) -> list[str]:
        """Examples and heads, as they come in the keys; one alone is of heads unless it
        stands before all else."""
        order = sorted(pair[side] for pair in sides.batch)
        if len(order) == 1:
            first = 0 in places(shape)
            names = {order[0]: "b" if first and order[0] == 0 else "h"}
        else:
            names = dict(zip(order, "bh", strict=False))
        return [names[pair[side]] for pair in sides.batch]

    def _partner(
        self, known: _Known, use: Use, new: str
    ) -> tuple[frozenset[str], Array, Made] | None:
        """Of a product of ``known``'s probabilities (or their gradient): the labels it
        sums over, the other operand and the result; ``new`` is the other's own one."""
        op = self.scopes.all[use.scope].program.ops[use.op]
        _, reads, sides = self._operands(use.scope, op)
        if len(set(op.operands)) != 2:
            return None
        dims = next(
            dims
            for m, _ in use.form
            for a, dims, _ in m
            if self.reading.atoms.kind(a) == EXP
        )
        mine = {place: known.labels[i] for i, place in enumerate(dims)}
        side, other = use.side, 1 - use.side
        labels = [""] * len(self.reading.sizes(reads[other]))
        made: dict[int, str] = {}
        for pairs in (sides.batch, sides.contracted):
            for pair in pairs:
                labels[pair[other]] = mine[pair[side]]
        for pair, (_, at) in zip(sides.batch, sides.result, strict=True):
            made[at] = mine[pair[side]]
        for place, at in sides.free[side]:
            made[at] = mine[place]
        if len(sides.free[other]) != 1:
            return None
        ((place, at),) = sides.free[other]
        labels[place] = made[at] = new
        batch = frozenset(mine[pair[side]] for pair in sides.batch)
        if batch != known.batch:
            return None
        over = frozenset(mine[pair[side]] for pair in sides.contracted)
        result = Made(use.scope, use.op, tuple(made[i] for i in range(len(made))))
        return over, Array(reads[other], tuple(labels)), result

    def _cotangent(
        self, known: _Known, use: Use, atom: int
    ) -> tuple[Array, Array] | None:
        """The operands of ``dP``: the cotangent and the values."""
        dims = next(dims for m, _ in use.form for a, dims, _ in m if a == atom)
        place_of = next(
            dims
            for m, _ in use.form
            for a, dims, _ in m
            if self.reading.atoms.kind(a) == EXP
        )
        label_at = {place: known.labels[i] for i, place in enumerate(place_of)}
        made = [label_at[d] for d in dims]
        name = self.reading.atoms.all[atom][1]
        assert isinstance(name, tuple)
        _, reads, sides = self._product(name)
        if len(sides.contracted) != 1:
            return None
        arrays = operands(reads, sides, made, "e")
        wanted = known.batch | known.rows | {"e"}
        values = known.batch | {"u", "e"}
        for one, other in (arrays, arrays[::-1]):
            if {*one.labels} == wanted and {*other.labels} == values:
                return one, other
        return None

    # ---- all together ----------------------------------------------------------------

    def _match(self, known: _Known, axis: int, found: _Softmax) -> Iterator[Match]:
        result: Made | None = None
        values: Array | None = None
        of_values: tuple[Array, Made] | None = None
        for use in found.probabilities:
            partner = self._partner(known, use, "e")
            if partner is None:
                return
            over, array, made = partner
            if over == {"u"} and result is None:
                values, result = array, made
            elif over == known.rows and of_values is None:
                of_values = array, made
            else:
                return
        mask = self._mask(known, axis)
        if mask is None:
            return
        gradient: Gradient | None = None
        if found.gradients or of_values:
            both = self._gradients(known, found, of_values) if of_values else None
            if both is None:
                return
            gradient, read = both
            if values is not None and not self._same(values, read):
                return
            values = read if values is None else values
        if values is None:
            return
        yield self._made(known, values, mask, result, gradient)

    def _made(
        self,
        known: _Known,
        values: Array,
        mask: tuple[bool, int | None],
        result: Made | None,
        gradient: Gradient | None,
    ) -> Match:
        sizes = dict.fromkeys("bhtgude", 1)
        for array in (known.queries, known.keys, values):
            sizes.update(zip(array.labels, self.reading.sizes(array.name), strict=True))
        scale = known.about.scores.scale
        return Match(
            *(known.queries, known.keys, values, known.scores, sizes, scale),
            *(*mask, result, gradient),
        )

    def _gradients(
        self, known: _Known, found: _Softmax, of_values: tuple[Array, Made]
    ) -> tuple[Gradient, Array] | None:
        """The gradient, where all of it is there, and the values that it reads."""
        parts: dict[str, Made] = {}
        given: list[tuple[Array, Array]] = []
        for use, scale, atom in found.gradients:
            near_one = abs(scale / known.about.scores.scale - 1) < 1e-5
            partner = self._partner(known, use, "d")
            operands = self._cotangent(known, use, atom)
            if partner is None or operands is None or not near_one:
                return None
            over, array, made = partner
            what = "queries" if over == {"u"} else "keys"
            wanted = known.keys if what == "queries" else known.queries
            fits = over == {"u"} or over == known.rows
            if what in parts or not fits or not self._same(array, wanted):
                return None
            parts[what] = made
            given.append(operands)
        if len(parts) != 2:
            return None
        cotangent, made = of_values
        (one, values), (other, again) = given
        if not self._same(values, again):
            return None
        if not (self._same(one, cotangent) and self._same(other, cotangent)):
            return None
        return Gradient(cotangent, parts["queries"], parts["keys"], made), values

    def _same(self, one: Array, other: Array) -> bool:
        """Whether two are one array, looked at in one way or another."""
        return self.views(one)[-1] == self.views(other)[-1]

    def views(self, array: Array) -> list[Array]:
        return views(self.scopes, array)

    def _mask(self, known: _Known, axis: int) -> tuple[bool, int | None] | None:
        """Whether later keys are hidden, and how many are seen; None: neither."""
        scores = known.about.scores
        if not scores.seen:
            return False, None
        if axis not in scores.between:
            return None
        p, q = scores.between
        row = q if p == axis else p
        if known.labels[row] != "t":
            return None
        seen = np.frombuffer(scores.seen, bool)
        sizes = self.reading.sizes(known.scores)
        rows, columns = sizes[row], sizes[axis]
        back = seen if q == axis else seen[::-1]  # by row less column
        distance = np.arange(1 - columns, rows)
        if back.all():
            return False, None
        if np.array_equal(back, distance >= 0):
            return True, None
        window = int(np.count_nonzero(back))
        within = (distance >= 0) & (distance < window)
        slides = window > 0 and rows == columns and np.array_equal(back, within)
        return (True, window) if slides else None
