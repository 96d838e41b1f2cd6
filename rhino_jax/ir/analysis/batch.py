"""Which dimension of every value holds the examples of the batch, and who mixes them.

The leading dimension of the batch inputs is followed through the factors of every op,
into loops and branches. An op that combines different examples (a mean over them, batch
norm, a product of all with all) is reported; its result has lost those digits of the
example's number that it mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rhino_jax.ir.analysis.digits import (
    Digit,
    Place,
    Share,
    along_first,
    clashing,
    common,
    moved,
    placed,
    shares,
    within,
)
from rhino_jax.ir.factors import BLOCKED, RING, WINDOW, Rule
from rhino_jax.ir.program import Op, Program

RuleOf = Callable[[Program, Op], Rule]

WHOLE = (BLOCKED, RING, WINDOW)
"""Kinds of factors whose elements must meet on one device, or at one time."""

PAIRED = "paired"
UNALIGNED = "unaligned"
LOOPED = "looped"
INSIDE = "inside"


@dataclass(frozen=True)
class Mixing:
    """Op ``op`` combines different examples.

    ``how`` is the kind of the factor that holds them (reduction, blocked, ring, window,
    indexed), ``paired`` (different examples meet), ``unaligned`` (a reshape that
    leaves no whole digit), ``looped`` (a loop runs over examples, or its carry changes
    where they lie), or ``inside`` (its body does). ``operator`` is that of a reduction.
    ``far`` says that examples of different parts of the batch meet; else only
    neighbours do (tokens of two examples in one group), and parts stay independent.
    """

    op: int
    how: str
    operator: str = ""
    far: bool = True


@dataclass(frozen=True)
class BatchDims:
    """Where each value of one Program holds examples, and which ops mix them.

    A value without an entry in ``places`` holds none. ``inner`` has an entry for each
    op with bodies that examples enter: one BatchDims a body, of its own values.
    """

    batch_size: int
    places: Mapping[int, Place]
    mixing: tuple[Mixing, ...]
    inner: Mapping[int, tuple[BatchDims, ...]]

    def dim(self, value: int) -> int | None:
        """The dimension that the outermost digit of the examples lies along, if any.

        None as well for a value that has lost that digit: it can not be split by
        examples.
        """
        place = self.places.get(value, ())
        outer = place[0] if place else None
        if outer is None or outer.of * outer.size != self.batch_size:
            return None
        return outer.dim


def common_batch_size(program: Program, batch_inputs: Collection[int]) -> int:
    """The leading dimension that most batch inputs have (0 if none has any).

    Of several as frequent, the one with the most bytes behind it; then the largest.
    """
    weight: dict[int, tuple[int, int]] = {}
    for position in batch_inputs:
        value = program.values[program.inputs[position]]
        if value.shape:
            count, size = weight.get(value.shape[0], (0, 0))
            weight[value.shape[0]] = (count + 1, size + value.num_bytes)
    return max(weight, key=lambda n: (weight[n], n), default=0)


def batch_dims(
    program: Program,
    batch_inputs: Collection[int],
    rule_of: RuleOf,
    batch_size: int | None = None,
) -> BatchDims:
    """Where the values of ``program`` hold the examples.

    Examples lie along the first dimension of those ``batch_inputs`` (positions) where
    it is ``batch_size`` long: by default the length that most of them have.
    """
    size = batch_size or common_batch_size(program, batch_inputs)
    start = {
        i: (Digit(1, size, 0, 1),)
        for i in batch_inputs
        if size > 1 and program.values[program.inputs[i]].shape[:1] == (size,)
    }
    entering = [start.get(i, ()) for i in range(len(program.inputs))]
    return _follow(program, entering, size, rule_of)


def _follow(
    program: Program, entering: Sequence[Place], size: int, rule_of: RuleOf
) -> BatchDims:
    places = {v: p for v, p in zip(program.inputs, entering, strict=True) if p}
    mixing: list[Mixing] = []
    inner: dict[int, tuple[BatchDims, ...]] = {}
    for index, op in enumerate(program.ops):
        given = [places.get(v, ()) for v in op.operands]
        if not any(given):
            continue
        if op.kind in _INSIDE:
            step = _INSIDE[op.kind](op, given, size, rule_of)
            inner[index] = step.bodies
            within_bodies = [m for body in step.bodies for m in body.mixing]
            if within_bodies:
                far = any(m.far for m in within_bodies)
                mixing.append(Mixing(index, INSIDE, far=far))
        else:
            step = _through_rule(program, op, rule_of(program, op), given, size)
        places |= {v: p for v, p in zip(op.results, step.results, strict=True) if p}
        mixing += (Mixing(index, *how) for how in dict.fromkeys(step.how))
    return BatchDims(size, places, tuple(mixing), inner)


How = tuple[str, str, bool]
"""The fields of a Mixing behind its op."""


@dataclass(frozen=True)
class _Step:
    """What one op does: places of its results, how it mixes, what is in its bodies."""

    results: tuple[Place, ...]
    how: tuple[How, ...] = ()
    bodies: tuple[BatchDims, ...] = ()


def _through_rule(
    program: Program, op: Op, rule: Rule, given: Sequence[Place], size: int
) -> _Step:
    told: dict[Share, None] = {}
    how: list[How] = []
    for value, dims, place in zip(op.operands, rule.operands, given, strict=True):
        found = shares(rule, dims, program.values[value].shape, place)
        if found is None:
            how.append((UNALIGNED, "", True))
        else:
            told |= dict.fromkeys(found)
    wrong = clashing(tuple(told))
    if wrong:
        how.append((PAIRED, "", any(_is_far(share, size) for share in wrong)))
    kept = [share for share in told if share not in wrong]
    how += (why for share in kept for why in _mixed(rule, share, size))
    kept = [s for s in kept if rule.factor(s.factor).kind not in WHOLE]
    return _Step(tuple(placed(rule, dims, kept) for dims in rule.results), tuple(how))


def _is_far(share: Share, size: int) -> bool:
    return share.of * share.size == size


def _mixed(rule: Rule, share: Share, size: int) -> Iterator[How]:
    """How an op mixes the examples that lie along a factor, if it does."""
    factor = rule.factor(share.factor)
    everywhere = all(any(share.factor in dim for dim in dims) for dims in rule.results)
    if factor.kind in WHOLE:
        yield factor.kind, "", _is_far(share, size)
    elif factor.operator and not everywhere:
        yield factor.kind, factor.operator, _is_far(share, size)


def _call(op: Op, given: Sequence[Place], size: int, rule_of: RuleOf) -> _Step:
    (body,) = op.programs
    found = _follow(body, given, size, rule_of)
    return _Step(_outputs(body, found), bodies=(found,))


def _cond(op: Op, given: Sequence[Place], size: int, rule_of: RuleOf) -> _Step:
    found = tuple(_follow(body, given[1:], size, rule_of) for body in op.programs)
    ends = [_outputs(b, f) for b, f in zip(op.programs, found, strict=True)]
    # A branch that gives a constant has no examples to lay out.
    results = tuple(
        common([p for p in places if p] or [()]) for places in zip(*ends, strict=True)
    )
    return _Step(results, bodies=found)


def _scan(op: Op, given: Sequence[Place], size: int, rule_of: RuleOf) -> _Step:
    (body,) = op.programs
    consts, count = op.param["num_consts"], op.param["num_carry"]
    first = consts + count
    slices = [within(place) for place in given[first:]]

    def run(carry: Sequence[Place]) -> BatchDims:
        entering = [*given[:consts], *carry, *slices]
        return _follow(body, entering, size, rule_of)

    carry, found, moves = _settled(body, run, given[consts:first])
    stacked = [moved(place, 1) for place in _outputs(body, found)[count:]]
    over = any(True for place in given[first:] for _ in along_first(place))
    how = ((LOOPED, "", True),) if over or moves else ()
    return _Step((*carry, *stacked), how, (found,))


def _while(op: Op, given: Sequence[Place], size: int, rule_of: RuleOf) -> _Step:
    test, body = op.programs
    split = op.param["cond_nconsts"]
    first = split + op.param["body_nconsts"]

    def run(carry: Sequence[Place]) -> BatchDims:
        return _follow(body, [*given[split:first], *carry], size, rule_of)

    carry, found, moves = _settled(body, run, given[first:])
    tested = _follow(test, [*given[:split], *carry], size, rule_of)
    return _Step(carry, ((LOOPED, "", True),) if moves else (), (tested, found))


def _settled(
    body: Program, run: Callable[[Sequence[Place]], BatchDims], start: Sequence[Place]
) -> tuple[tuple[Place, ...], BatchDims, bool]:
    """A carry that comes out as it went in, and whether digits were given up for it.

    A carry that starts without examples (zeros) takes the place that the body gives
    it; after that it only loses digits, so the search ends.
    """
    carry = tuple(start)
    filled = [bool(place) for place in carry]
    gave_up = False
    while True:
        found = run(carry)
        after = []
        for i, (old, new) in enumerate(
            zip(carry, _outputs(body, found)[: len(carry)], strict=True)
        ):
            if not filled[i] and new:
                filled[i] = True
                after.append(new)
            else:
                after.append(common((old, new)))
                gave_up |= after[-1] != old
        if tuple(after) == carry:
            return carry, found, gave_up
        carry = tuple(after)


def _outputs(body: Program, found: BatchDims) -> tuple[Place, ...]:
    return tuple(found.places.get(v, ()) for v in body.outputs)


_INSIDE: Mapping[str, Callable[[Op, Sequence[Place], int, RuleOf], _Step]] = {
    "remat2": _call,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
