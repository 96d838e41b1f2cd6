"""Our rules against Shardy's: the same loops, or a difference that is listed.

Two rules are compared by what may be split alone: letters are loops of one size that
a shard can run by itself, a dot is what must be whole or may be split only with help
of the neighbours (a window; Shardy's "permutation"), sizes stand where a dimension is
a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.ad_util import stop_gradient_p
from jax._src.lax.linalg import cholesky_p
from jax._src.lax.windowed_reductions import (
    _select_and_gather_add,
    _select_and_scatter,
    _select_and_scatter_add,
)
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.extend.random import threefry2x32_p

from rhino_jax.ir.factors import BLOCKED, WINDOW, Rule
from rhino_jax.rules import RULES, rule_of
from rhino_jax.trace.shardy import ask, shardy_rule
from tests.lower.local.harness import one_op


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def boolean(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def conv(stride: int = 1, pad: Any = "VALID", **params: Any) -> Callable[..., Any]:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: lax.conv_general_dilated(
        x, w, (stride,) * 2, pad, dimension_numbers=numbers, **params
    )


def for_weight(fun: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda x, w: jnp.sum(fun(x, w) ** 2), 1)


def pool(kind: Callable[..., Any], init: Any, size: int, stride: int) -> Any:
    window, strides = (1, size, 1), (1, stride, 1)
    return lambda x: lax.reduce_window(x, init, kind, window, strides, "VALID")


def gather(**numbers: Any) -> Callable[..., Any]:
    sizes = numbers.pop("slice_sizes")
    return lambda x, i: lax.gather(
        x,
        i,
        lax.GatherDimensionNumbers(**numbers),
        sizes,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def scatter(fun: Callable[..., Any]) -> Callable[..., Any]:
    rows = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lambda x, i, u: fun(x, i, u, rows, mode=mode)


X = f32(8, 6)
PAIRS = ((1, 2, 1), (1, 2, 1), ((0, 0),) * 3)
UNARY = """
abs bessel_i0e cbrt ceil cos exp exp2 expm1 floor is_finite log log1p logistic neg
reduce_precision round rsqrt sign sin sqrt tan tanh
""".split()
BINARY = "add atan2 div eq ge gt le lt max min mul ne pow rem sub".split()
ON_INTEGERS = """
bitwise_and bitwise_or bitwise_xor shift_left shift_right_arithmetic
shift_right_logical
""".split()


def _unary(name: str) -> Callable[..., Any]:
    extra = {"reduce_precision": (5, 10)}.get(name, ())
    return lambda x: getattr(lax, name)(x, *extra)


# case -> (function, its arguments, the op that is meant: the last one if none is named)
CASES: dict[str, tuple[Any, ...]] = {
    "cholesky": (lambda x: cholesky_p.bind(x), f32(4, 3, 5, 5)),
    "triangular_solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True),
        f32(4, 5, 5),
        f32(4, 5, 3),
    ),
    "fft": (
        lambda x: lax.fft(x, "FFT", (5,)),
        jax.ShapeDtypeStruct((4, 3, 5), jnp.complex64),
    ),
    "optimization_barrier": (
        lambda x, y: lax.optimization_barrier((x, y)),
        f32(4, 3),
        f32(5),
    ),
    **{name: (_unary(name), X) for name in UNARY},
    **{name: (getattr(lax, name), X, X) for name in BINARY},
    **{name: (getattr(lax, name), i32(8, 6), i32(8, 6)) for name in ON_INTEGERS},
    "add_any": (lambda x: jax.vjp(lambda y: (y, y), x)[1]((x, x)), X),
    "bitwise_not": (lax.bitwise_not, i32(8, 6)),
    "clz": (lax.clz, i32(8, 6)),
    "population_count": (lax.population_count, i32(8, 6)),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), X),
    "clamp": (lambda x: lax.clamp(0.0, x, 1.0), X),
    "clamp by arrays": (lax.clamp, X, X, X),
    "select_n": (lax.select, boolean(8, 6), X, X),
    "select_n by scalar": (lax.select_n, boolean(), X, X),
    "convert_element_type": (lambda x: x.astype(jnp.bfloat16), X),
    "complex": (lax.complex, X, X),
    "real": (lax.real, jax.ShapeDtypeStruct((8, 6), jnp.complex64)),
    "imag": (lax.imag, jax.ShapeDtypeStruct((8, 6), jnp.complex64)),
    "conj": (lax.conj, jax.ShapeDtypeStruct((8, 6), jnp.complex64)),
    "name": (lambda x: checkpoint_name(x, "here"), X),
    "stop_gradient": (lambda x: stop_gradient_p.bind(x), X),
    "mul by scalar": (lambda x: x * 2.0, X),
    "copy": (lambda x: jnp.array(x, copy=True), X),
    "dot": (jnp.dot, f32(8, 16), f32(16, 12)),
    "ragged_dot_general": (lax.ragged_dot, f32(8, 6), f32(4, 6, 5), i32(4)),
    "dot by batch": (
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b),
        f32(2, 8, 6),
        f32(2, 10, 6),
    ),
    "dot twice contracted": (
        lambda a, b: jnp.tensordot(a, b, 2),
        f32(8, 4, 6),
        f32(4, 6, 5),
    ),
    "outer": (jnp.outer, f32(8), f32(6)),
    "conv 3x3": (conv(pad="SAME"), f32(4, 6, 10, 8), f32(3, 3, 8, 5)),
    "conv 1x1": (conv(), f32(4, 6, 10, 8), f32(1, 1, 8, 5)),
    "conv by stride 2": (conv(2), f32(4, 6, 10, 8), f32(1, 1, 8, 5)),
    "conv of patches": (conv(2), f32(4, 6, 10, 8), f32(2, 2, 8, 5)),
    "conv of the whole": (conv(), f32(4, 6, 10, 8), f32(6, 10, 8, 5)),
    "conv in groups": (
        conv(pad="SAME", feature_group_count=4),
        f32(4, 6, 10, 8),
        f32(3, 3, 2, 12),
    ),
    "conv by depth": (
        conv(pad="SAME", feature_group_count=8),
        f32(4, 6, 10, 8),
        f32(3, 3, 1, 8),
    ),
    "conv for weight": (
        for_weight(conv(pad="SAME")),
        f32(4, 6, 10, 8),
        f32(3, 3, 8, 5),
        "conv_general_dilated",
    ),
    "conv for grouped weight": (
        for_weight(conv(pad="SAME", feature_group_count=4)),
        f32(4, 6, 10, 8),
        f32(3, 3, 2, 12),
        "conv_general_dilated",
    ),
    "reduce_window_sum": (pool(lax.add, 0.0, 3, 1), f32(4, 8, 5)),
    "reduce_window_max": (pool(lax.max, -np.inf, 3, 1), f32(4, 8, 5)),
    "reduce_window_min": (pool(lax.min, np.inf, 3, 1), f32(4, 8, 5)),
    "reduce_window": (pool(lambda a, b: a * b + 1, 0.0, 3, 1), f32(4, 8, 5)),
    "pool by its own stride": (pool(lax.max, -np.inf, 2, 2), f32(4, 8, 5)),
    "pool all": (pool(lax.add, 0.0, 8, 1), f32(4, 8, 5)),
    "select_and_gather_add": (
        lambda t, x: _select_and_gather_add(
            t, x, lax.ge_p, *PAIRS, (1, 1, 1), (1, 1, 1)
        ),
        f32(4, 8, 5),
        f32(4, 8, 5),
    ),
    "select_and_scatter_add": (
        lambda s, x: _select_and_scatter_add(s, x, lax.ge_p, *PAIRS),
        f32(4, 4, 5),
        f32(4, 8, 5),
    ),
    "select_and_scatter": (
        lambda x, s: _select_and_scatter(x, lax.ge, *PAIRS, s, jnp.float32(0), lax.add),
        f32(4, 8, 5),
        f32(4, 4, 5),
    ),
    "reduce_sum": (lambda x: jnp.sum(x, 1), X),
    "reduce_sum of all": (jnp.sum, X),
    "reduce_max": (lambda x: jnp.max(x, 0), X),
    "reduce_min": (lambda x: jnp.min(x, 1), X),
    "reduce_and": (lambda x: jnp.all(x, 1), boolean(8, 6)),
    "reduce_or": (lambda x: jnp.any(x, 0), boolean(8, 6)),
    "reduce_prod": (lambda x: jnp.prod(x, 0), X),
    "reduce_xor": (lambda x: lax.reduce_xor(x, (0,)), i32(8, 6)),
    "reduce": (
        lambda x: lax.reduce(x, np.float32(0), lambda a, b: a * b + 1, (0,)),
        X,
    ),
    "transpose": (lambda x: x.transpose(2, 0, 1), f32(4, 8, 6)),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (4, 8, 6), (1, 2)), X),
    "broadcast of one": (
        lambda x: lax.broadcast_in_dim(x, (4, 8, 6), (1, 2)),
        f32(8, 1),
    ),
    "reshape": (lambda x: x.reshape(4, 2, 24), f32(8, 4, 6)),
    "reshape flat": (lambda x: x.reshape(-1), f32(8, 4, 6)),
    "reshape of odd sizes": (lambda x: x.reshape(8, 3), f32(6, 4)),
    "reshape across": (lambda x: x.reshape(4, 6), f32(6, 4)),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), f32(8, 1, 6)),
    "split": (lambda x: lax.split(x, (8, 8, 8), 1), f32(4, 24)),
    "split unevenly": (lambda x: lax.split(x, (8, 16), 1), f32(4, 24)),
    "slice": (lambda x: lax.slice(x, (0, 0), (8, 2)), X),
    "slice in the middle": (lambda x: lax.slice(x, (1, 0), (6, 6)), X),
    "pad": (lambda x: lax.pad(x, 0.0, ((1, 2, 0), (0, 0, 0))), X),
    "pad by periods": (lambda x: lax.pad(x, 0.0, ((8, 16, 0), (0, 0, 0))), X),
    "device_put": (lambda x: jax.device_put(x), X),
    "stack": (lambda x, y: jnp.stack([x, y]), X, X),
    "unstack": (lambda x: jnp.unstack(x, axis=1), f32(8, 3, 6)),
    "concatenate": (lambda x, y: jnp.concatenate([x, y], 1), X, X),
    "concatenate unevenly": (lambda x, y: jnp.concatenate([x, y], 1), X, f32(8, 5)),
    "rev": (lambda x: lax.rev(x, (0,)), X),
    "bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, jnp.int32), X),
    "tile": (lambda x: lax.tile(x, (1, 3)), X),
    "sort": (lambda x: lax.sort(x, dimension=1), X),
    "sort together": (
        lambda x, y: lax.sort((x, y), dimension=0, num_keys=1),
        X,
        i32(8, 6),
    ),
    "approx_top_k": (lambda x: lax.approx_max_k(x, 2), X),
    "argmax": (lambda x: lax.argmax(x, 1, jnp.int32), X),
    "argmin": (lambda x: lax.argmin(x, 0, jnp.int32), X),
    "cumsum": (lambda x: lax.cumsum(x, 1), X),
    "cummax": (lambda x: lax.cummax(x, 0), X),
    "cummin": (lambda x: lax.cummin(x, 0), X),
    "cumprod": (lambda x: lax.cumprod(x, 0), X),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 0), X),
    "rng_bit_generator": (
        lambda k: lax.rng_bit_generator(k, (8, 6)),
        jax.ShapeDtypeStruct((4,), jnp.uint32),
    ),
    "iota": (lambda: lax.broadcasted_iota(jnp.int32, (4, 5), 1),),
    "gather rows": (
        gather(
            offset_dims=(1,),
            collapsed_slice_dims=(0,),
            start_index_map=(0,),
            slice_sizes=(1, 6),
        ),
        X,
        i32(5, 1),
    ),
    "gather rows by batch": (
        gather(
            offset_dims=(2,),
            collapsed_slice_dims=(1,),
            start_index_map=(1,),
            operand_batching_dims=(0,),
            start_indices_batching_dims=(0,),
            slice_sizes=(1, 1, 6),
        ),
        f32(3, 8, 6),
        i32(3, 5, 1),
    ),
    "gather windows": (
        gather(
            offset_dims=(1, 2),
            collapsed_slice_dims=(),
            start_index_map=(0,),
            slice_sizes=(2, 6),
        ),
        X,
        i32(5, 1),
    ),
    "gather or fill": (
        lambda x, i: x.at[i].get(mode="fill", fill_value=0),
        X,
        i32(5),
        "gather",
    ),
    "scatter": (scatter(lax.scatter), X, i32(5, 1), f32(5, 6)),
    "scatter-add": (scatter(lax.scatter_add), X, i32(5, 1), f32(5, 6)),
    "scatter-sub": (scatter(lax.scatter_sub), X, i32(5, 1), f32(5, 6)),
    "scatter-mul": (scatter(lax.scatter_mul), X, i32(5, 1), f32(5, 6)),
    "scatter-min": (scatter(lax.scatter_min), X, i32(5, 1), f32(5, 6)),
    "scatter-max": (scatter(lax.scatter_max), X, i32(5, 1), f32(5, 6)),
    "dynamic_slice": (
        lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)),
        X,
        i32(),
        "dynamic_slice",
    ),
    "dynamic_update_slice": (
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
        X,
        f32(2, 6),
        i32(),
        "dynamic_update_slice",
    ),
}


def traced(case: str):
    fun, *args = CASES[case]
    kind = args.pop() if args and isinstance(args[-1], str) else ""
    return one_op(fun, *args, kind=kind)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def normal(rule: Rule) -> str:
    """A rule up to names: letters, dots, sizes in products, reductions behind."""
    letters: dict[str, str] = {}

    def dim_text(dim: tuple[str, ...]) -> str:
        parts: list[tuple[str, int]] = []
        for factor in map(rule.factor, dim):
            if factor.size == 1:
                continue
            if factor.kind not in (BLOCKED, WINDOW):
                letter = letters.setdefault(factor.name, LETTERS[len(letters)])
                parts.append((letter, factor.size))
            elif parts and parts[-1][0] == ".":
                parts[-1] = (".", parts[-1][1] * factor.size)
            else:
                parts.append((".", factor.size))
        if len(parts) < 2:
            return parts[0][0] if parts else "1"
        return "(" + " ".join(f"{name}{size}" for name, size in parts) + ")"

    reads, makes = (
        ",".join("".join(map(dim_text, dims)) for dims in side)
        for side in (rule.operands, rule.results)
    )
    summed = [letters[f.name] for f in rule.factors if f.operator and f.name in letters]
    return f"{reads}->{makes}" + (f" {{{','.join(sorted(summed))}}}" if summed else "")


FINER = "ours is finer"
HALO = "Shardy calls them sums and says nothing of the neighbours' elements they need"

# case -> (ours, Shardy's, why ours is right all the same)
LISTED: dict[str, tuple[str, str, str]] = {
    "optimization_barrier": (
        "ab,c->ab,c",
        "..,.->..,.",
        "Shardy knows no rule for a barrier; every operand passes as it is",
    ),
    "conv 1x1": (
        "abcd,11de->abce {d}",
        "a..b,11bc->a..c {b}",
        f"{FINER}: a window of one element has no neighbours",
    ),
    "conv by stride 2": (
        "a(b3 .2)(c5 .2)d,11de->abce {d}",
        "a..b,11bc->a..c {b}",
        f"{FINER}: windows in blocks of their own have no neighbours",
    ),
    "conv of patches": (
        "a(b3 c2)(d5 e2)f,cefg->abdg {c,e,f}",
        "a(.3 b2)(.5 c2)d,bcde->a..e {b,c,d}",
        f"{FINER}: the patches are parallel too",
    ),
    "conv for weight": (
        "a..b,a..c->..bc {a}",
        "abcd,abce->..de {a,b,c}",
        HALO,
    ),
    "conv for grouped weight": (
        "a..(b4 c2),a..(b4 d3)->..c(b4 d3) {a}",
        "abc(d4 e2),abc(d4 f3)->..e(d4 f3) {a,b,c}",
        HALO,
    ),
    "pool by its own stride": (
        "a(b4 c2)d->abd {c}",
        "a.b->a.b",
        f"{FINER}: windows in blocks of their own have no neighbours",
    ),
    "pool all": ("abc->a1c {b}", "a.b->a1b", f"{FINER}: it is a reduction"),
    "select_and_gather_add": (
        "a(b4 .2)c,a(b4 .2)c->abc",
        "a.b,a.b->a.b",
        f"{FINER}: windows in blocks of their own have no neighbours",
    ),
    "select_and_scatter_add": (
        "abc,a(b4 .2)c->a(b4 .2)c",
        "a.b,a.b->a.b",
        f"{FINER}: windows in blocks of their own have no neighbours",
    ),
    "select_and_scatter": (
        "a(b4 .2)c,abc,->a(b4 .2)c",
        "a.b,a.b,->a.b",
        f"{FINER}: windows in blocks of their own have no neighbours",
    ),
    "reshape across": (
        "(a2 .3).->(a2 .2).",
        "(a2 .3)(.2 b2)->(a2 .2)(.3 b2)",
        "ours is coarser: the last index modulo a common divisor survives too",
    ),
    "split": (
        "a(.3 b8)->ab,ab,ab",
        "a.->a.,a.,a.",
        f"{FINER}: equal parts keep their own index (the strided layout)",
    ),
    "slice": ("a(.3 b2)->ab", "a.->a.", f"{FINER}: a whole period is cut out"),
    "pad by periods": (
        "ab,->(.4 a8)b",
        ".a,->.a",
        f"{FINER}: whole periods are added",
    ),
    "concatenate": (
        "ab,ab->a(.2 b6)",
        "a.,a.->a.",
        f"{FINER}: equal parts keep their own index (the strided layout)",
    ),
    "gather or fill": (
        "ab,c1->cb {a}",
        ".a,b1->ba",
        f"{FINER}: the local form masks and fills, so the rows may be split",
    ),
    "ragged_dot_general": (
        "ab,cbd,.->ad {b,c}",
        "ab,.bc,.->ac {b}",
        f"{FINER}: rows and groups may be split, each shard counts its own rows",
    ),
    "scatter-sub": (
        "ab,c1,cb->ab {c}",
        "ab,.1,.b->ab",
        f"{FINER}: what is taken away sums up; Shardy's region names no such operator",
    ),
    "dynamic_slice": (
        "ab,,->cb {a}",
        ".a,,->.a",
        f"{FINER}: each shard answers for the positions that it holds",
    ),
}


CHANGED = ("dynamic_update_slice",)


@pytest.mark.parametrize("case", CASES)
def test_same_loops_or_listed(case):
    if case in CHANGED and not jax.__version__.startswith("0.10."):
        pytest.skip("listed as Shardy of jax 0.10 says; a later one says otherwise")
    program, op = traced(case)
    ours, theirs = normal(rule_of(program, op)), normal(shardy_rule(op))
    if case in LISTED:
        assert ours != theirs, "no longer a disagreement: take it off the list"
        assert (ours, theirs) == LISTED[case][:2], LISTED[case][2]
    else:
        assert ours == theirs


def test_the_list_names_cases():
    assert set(LISTED) <= set(CASES)


U32 = jax.ShapeDtypeStruct((8,), jnp.uint32)

# Lowered to something that Shardy has no rule for: CHLO (which compilers take apart
# first), loops, the old random generator.
NO_RULE: dict[str, tuple[Any, ...]] = {
    **{
        name: (getattr(lax, name), X)
        for name in (
            "acos acosh asin asinh atan atanh bessel_i1e cosh digamma erf erf_inv erfc"
            " lgamma sinh square"
        ).split()
    },
    **{
        name: (getattr(lax, name), X, X)
        for name in "igamma igamma_grad_a igammac nextafter polygamma zeta".split()
    },
    "regularized_incomplete_beta": (lax.betainc, X, X, X),
    "top_k": (lambda x: lax.top_k(x, 2), X),
    "io_callback": (lambda x: io_callback(np.sin, X, x), X),
    "pure_callback": (lambda x: jax.pure_callback(np.sin, X, x), X),
    "debug_callback": (lambda x: jax.debug.callback(print, x), X),
    "debug_print": (lambda x: jax.debug.print("{}", x), X),
    "rng_uniform": (lambda a, b: lax.rng_uniform(a, b, (8, 6)), f32(), f32()),
    "threefry2x32": (threefry2x32_p.bind, U32, U32, U32, U32),
}


@pytest.mark.parametrize("kind", NO_RULE)
def test_shardy_has_no_rule(kind):
    fun, *args = NO_RULE[kind]
    _, op = one_op(fun, *args)
    assert op.kind == kind
    assert any(term.rule is None and term.operands for term in ask(op).terms)


# Random keys have no shape in StableHLO; matrix factorizations are calls into one
# backend's library; some are of a JAX newer than 0.10; the rest no function of JAX's
# own makes.
UNASKED = set(
    """
    cholesky_update eig eigh geqrf hessenberg householder_product lu qr schur svd
    lu_pivots_to_permutation symmetric_product tridiagonal tridiagonal_solve
    log2 one_minus_square eq_to le_to lt_to
    random_bits random_clone random_fold_in random_seed random_split random_unwrap
    random_wrap copy_p random_gamma_grad rematerialize
    mulhi reciprocal tie geqp3 ormqr philox2x32 philox4x32 threefry4x32
    layout_constraint
    reshard
    sharding_constraint ffi_call pallas_call platform_index
    dot_product_attention_fwd_wrapper dot_product_attention_bwd_wrapper
    shard_map psum psum_invariant pmax pmin all_gather all_gather_invariant
    reduce_scatter all_to_all ragged_all_to_all ppermute axis_index pvary
    custom_partitioning
    """.split()
)


def test_every_rule_is_compared():
    compared = {traced(case)[1].kind for case in CASES}
    left = set(RULES) - compared - set(NO_RULE) - UNASKED
    assert UNASKED <= set(RULES)
    assert not left, "primitives with a rule that Shardy was never asked about"
