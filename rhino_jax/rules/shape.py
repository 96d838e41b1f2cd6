"""Primitives that move elements without changing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rhino_jax.ir.factors import Dims, Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, elementwise, names, plain, sums


def transpose(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    letters = names("i", len(reads[0].shape))
    factors = tuple(
        Factor(n, size) for n, size in zip(letters, reads[0].shape, strict=True)
    )
    moved = plain(letters[d] for d in op.param["permutation"])
    return Rule(factors, (plain(letters),), (moved,), (sums(0),))


def broadcast_in_dim(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """New dimensions, and those that grow from size 1, are factors of the result."""
    shape = makes[0].shape
    letters = names("i", len(shape))
    factors = [Factor(n, size) for n, size in zip(letters, shape, strict=True)]
    dims: list[tuple[str, ...]] = []
    for d, target in enumerate(op.param["broadcast_dimensions"]):
        same = reads[0].shape[d] == shape[target]
        dims.append((letters[target],) if same else ())
    return Rule(tuple(factors), (tuple(dims),), (plain(letters),), (sums(0),))


def reshape(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """The common refinement of both shapes; what has none is one blocked factor."""
    shape = reads[0].shape
    # With ``dimensions`` the operand is transposed first.
    order = tuple(op.param["dimensions"] or range(len(shape)))
    turned, result, factors = refine(tuple(shape[d] for d in order), makes[0].shape)
    operand = tuple(turned[order.index(d)] for d in range(len(shape)))
    return Rule(factors, (operand,), (result,), (sums(0),))


def refine(
    left: tuple[int, ...], right: tuple[int, ...]
) -> tuple[Dims, Dims, tuple[Factor, ...]]:
    """Factors of which the dimensions of both shapes are products, outermost first.

    Both shapes are walked from the innermost dimension. Where two sizes share no
    refinement (6x4 and 8x3) the group that they span keeps its outer common divisor
    as a parallel factor and is blocked inside.

    >>> refine((6, 4), (2, 12))[:2]
    ((('f2', 'f1'), ('f0',)), (('f2',), ('f1', 'f0')))
    """
    factors: list[Factor] = []
    dims: list[list[list[str]]] = [[[] for _ in left], [[] for _ in right]]
    shapes = (left, right)
    at = [len(left) - 1, len(right) - 1]
    rest = [1, 1]

    def fill() -> bool:
        for s in (0, 1):
            while rest[s] == 1 and at[s] >= 0:
                rest[s] = shapes[s][at[s]]
                if rest[s] == 1:
                    at[s] -= 1
        return rest[0] > 1 and rest[1] > 1

    def add(size: int, kind: str = "parallel") -> str:
        name = f"f{len(factors)}"
        factors.append(Factor(name, size, kind))
        return name

    while fill():
        small = min(rest)
        if max(rest) % small:
            _odd_group(shapes, at, rest, dims, add)
            continue
        name = add(small)
        for s in (0, 1):
            dims[s][at[s]].insert(0, name)
            rest[s] //= small
            if rest[s] == 1:
                at[s] -= 1
    frozen = [tuple(tuple(d) for d in side) for side in dims]
    return frozen[0], frozen[1], tuple(factors)


def _odd_group(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    at: list[int],
    rest: list[int],
    dims: list[list[list[str]]],
    add: Callable[..., str],
) -> None:
    """Take the smallest group of dimensions that both sides end together."""
    first, product = list(at), list(rest)
    while product[0] != product[1]:
        s = 0 if product[0] < product[1] else 1
        first[s] -= 1
        product[s] *= shapes[s][first[s]]
    outer = [rest[s] if first[s] == at[s] else shapes[s][first[s]] for s in (0, 1)]
    common = math.gcd(*outer)
    for s in (0, 1):
        for dim in range(at[s], first[s] - 1, -1):
            size = rest[s] if dim == at[s] else shapes[s][dim]
            size //= common if dim == first[s] else 1
            if size > 1:
                dims[s][dim].insert(0, add(size, "blocked"))
    if common > 1:
        name = add(common)
        for s in (0, 1):
            dims[s][first[s]].insert(0, name)
    for s in (0, 1):
        at[s], rest[s] = first[s] - 1, 1


def squeeze(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    shape = reads[0].shape
    gone = {d % len(shape) for d in op.param["dimensions"]}
    letters = names("i", len(shape))
    factors = tuple(Factor(n, size) for n, size in zip(letters, shape, strict=True))
    # A dimension of size 1 holds no factor at all: there is nothing to split.
    operand = tuple(() if d in gone else (n,) for d, n in enumerate(letters))
    kept = plain(n for d, n in enumerate(letters) if d not in gone)
    return Rule(factors, (operand,), (kept,), (sums(0),))


def split(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Equal parts: the split dimension is (parts, rest), and the rest survives."""
    axis, sizes = op.param["axis"], op.param["sizes"]
    shape = reads[0].shape
    letters = names("i", len(shape))
    equal = len(set(sizes)) == 1
    factors = [Factor(n, size) for n, size in zip(letters, shape, strict=True)]
    operand: list[tuple[str, ...]] = [(n,) for n in letters]
    results: list[Dims] = []
    if equal:
        factors[axis] = Factor(letters[axis], sizes[0])
        factors.append(Factor("p", len(sizes), "blocked"))
        operand[axis] = ("p", letters[axis])
        results = [plain(letters)] * len(sizes)
    else:
        factors[axis] = Factor(letters[axis], shape[axis], "blocked")
        for number, size in enumerate(sizes):
            part = f"p{number}"
            factors.append(Factor(part, size, "blocked"))
            results.append(
                plain(part if d == axis else n for d, n in enumerate(letters))
            )
    flow = sums(0, results=tuple(range(len(sizes))))
    return Rule(tuple(factors), (tuple(operand),), tuple(results), (flow,))


def optimization_barrier(
    op: Op, reads: Sequence[Value], makes: Sequence[Value]
) -> Rule:
    """Every operand passes as it is, whatever the others' layouts."""
    factors: list[Factor] = []
    dims: list[Dims] = []
    for i, value in enumerate(reads):
        letters = names(f"o{i}_", len(value.shape))
        factors += [Factor(n, k) for n, k in zip(letters, value.shape, strict=True)]
        dims.append(plain(letters))
    flows = tuple(sums(i, results=(i,)) for i in range(len(reads)))
    return Rule(tuple(factors), tuple(dims), tuple(dims), flows)


def rematerialize(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """An array as it is, once what the op waits for is there."""
    return elementwise(reads, makes)


RULES: Mapping[str, RuleFn] = {
    "rematerialize": rematerialize,
    "optimization_barrier": optimization_barrier,
    "transpose": transpose,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "squeeze": squeeze,
    "split": split,
}
