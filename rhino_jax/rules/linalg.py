"""Linear algebra and Fourier transforms: matrices whole, batch dimensions parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import BLOCKED, Dims, Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, names, whole

CORE_RANKS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "cholesky": ((2,), (2,)),
    "cholesky_update": ((2, 1), (2,)),
    "eig": ((2,), (1, 2, 2)),
    "eigh": ((2,), (2, 1)),
    "geqp3": ((2, 1), (2, 1, 1)),
    "geqrf": ((2,), (2, 1)),
    "hessenberg": ((2,), (2, 1)),
    "householder_product": ((2, 1), (2,)),
    "lu": ((2,), (2, 1, 1)),
    "lu_pivots_to_permutation": ((1,), (1,)),
    "ormqr": ((2, 1, 2), (2,)),
    "qr": ((2,), (2, 2)),
    "schur": ((2,), (2, 2)),
    "svd": ((2,), (1, 2, 2)),
    "symmetric_product": ((2, 2), (2,)),
    "triangular_solve": ((2, 2), (2,)),
    "tridiagonal": ((2,), (2, 1, 1, 1)),
    "tridiagonal_solve": ((1, 1, 1, 2), (2,)),
}
"""How many trailing dimensions of each operand and result belong to one matrix."""


def _batched(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    takes, gives = CORE_RANKS[op.kind]
    ranks = (*takes[: len(reads)], *gives[: len(makes)])
    return batched(reads, makes, ranks)


def batched(
    reads: Sequence[Value], makes: Sequence[Value], ranks: Sequence[int]
) -> Rule:
    """Leading dimensions shared and parallel, the last ``ranks`` of each value whole.

    Values that do not share their leading dimensions are whole.
    """
    values = (*reads, *makes)
    leading = [v.shape[: len(v.shape) - k] for v, k in zip(values, ranks, strict=False)]
    if len(ranks) != len(values) or len(set(leading)) != 1:
        return whole(reads, makes)
    shared = names("b", len(leading[0]))
    factors = [Factor(n, size) for n, size in zip(shared, leading[0], strict=True)]
    dims: list[Dims] = []
    for i, value in enumerate(values):
        core = names(f"m{i}_", len(value.shape) - len(shared))
        sizes = value.shape[len(shared) :]
        factors += [Factor(n, k, BLOCKED) for n, k in zip(core, sizes, strict=True)]
        dims.append(tuple((n,) for n in (*shared, *core)))
    return Rule(tuple(factors), tuple(dims[: len(reads)]), tuple(dims[len(reads) :]))


def _fft(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    rank = len(op.param["fft_lengths"])
    return batched(reads, makes, (rank, rank))


RULES: Mapping[str, RuleFn] = {**dict.fromkeys(CORE_RANKS, _batched), "fft": _fft}
