"""Elementwise primitives: every dimension on its own.

Linear ones let partial sums through: ``add`` where both sides are partial, ``mul``
where one side is, ``neg`` and dtype changes as they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import Flow, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, elementwise, sums

_FLOAT = ("float", "bfloat", "complex")


def _pure(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    return elementwise(reads, makes)


def _flowing(*flows: Flow) -> RuleFn:
    def rule(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
        return elementwise(reads, makes, flows)

    return rule


def _convert(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    # Rounding a term is not rounding the sum: only a change between floating types
    # commutes with adding (to rounding), and only one that does not lose range.
    both = all(v.dtype.startswith(_FLOAT) for v in (*reads, *makes))
    return elementwise(reads, makes, (sums(0),) if both else ())


def _select_n(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    # The predicate must be known; the cases may be partial together.
    return elementwise(reads, makes, (sums(*range(1, len(reads))),))


_NONLINEAR = """
abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
clz cos cosh digamma eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
integer_pow is_finite le lgamma log log1p logistic lt ne nextafter not or
polygamma population_count pow reduce_precision regularized_incomplete_beta rem round
rsqrt shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
tan tanh xor zeta igamma_grad_a random_gamma_grad stop_gradient
log2 one_minus_square eq_to le_to lt_to reciprocal mulhi
""".split()

RULES: Mapping[str, RuleFn] = {
    **dict.fromkeys(_NONLINEAR, _pure),
    "add": _flowing(sums(0, 1)),
    "tie": _flowing(sums(1)),
    "add_any": _flowing(sums(0, 1)),
    "sub": _flowing(sums(0, 1)),
    "neg": _flowing(sums(0)),
    "mul": _flowing(sums(0), sums(1)),
    "div": _flowing(sums(0)),
    "max": _flowing(Flow("max", (0, 1))),
    "min": _flowing(Flow("min", (0, 1))),
    "real": _flowing(sums(0)),
    "imag": _flowing(sums(0)),
    "conj": _flowing(sums(0)),
    "complex": _flowing(sums(0, 1)),
    "convert_element_type": _convert,
    "copy": _flowing(sums(0)),
    "copy_p": _flowing(sums(0)),
    "name": _flowing(sums(0)),
    "select_n": _select_n,
}
