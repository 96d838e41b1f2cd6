"""Public functions of JAX, each with arguments: what can get into a step.

A broad table of ``jax.lax``, ``jax.numpy``, ``jax.nn``, ``jax.random``, ``jax.scipy``,
``jax.ops`` and of what is written around them (loops, callbacks, references).
``benchmarks.primitives`` traces them all to see which primitives they are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.scipy import linalg as slinalg
from jax.scipy import special, stats

Call = tuple[Callable[..., Any], tuple[Any, ...]]

X = jax.ShapeDtypeStruct((8, 6), jnp.float32)
S = jax.ShapeDtypeStruct((6, 6), jnp.float32)
B = jax.ShapeDtypeStruct((4, 6, 6), jnp.float32)
V = jax.ShapeDtypeStruct((6,), jnp.float32)
I = jax.ShapeDtypeStruct((8, 6), jnp.int32)  # noqa: E741
J = jax.ShapeDtypeStruct((5,), jnp.int32)
U = jax.ShapeDtypeStruct((8, 6), jnp.uint32)
P = jax.ShapeDtypeStruct((8, 6), jnp.bool_)
C = jax.ShapeDtypeStruct((8, 6), jnp.complex64)
N = jax.ShapeDtypeStruct((), jnp.int32)
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
FILTER = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))
RBG = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))

BY_NAME: Mapping[str, tuple[Any, str, tuple[Any, ...]]] = {
    "lax, one array": (
        lax,
        """abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh
        digamma erf erf_inv erfc exp exp2 expm1 floor integer_pow(3) is_finite lgamma
        log log1p logistic neg reciprocal reduce_precision(5,10) round rsqrt sign sin
        sinh sqrt square tan tanh stop_gradient cumsum cumprod cummax cummin
        cumlogsumexp sort top_k(2) approx_max_k(2) approx_min_k(2) argmax(1,"int32")
        argmin(0,"int32") reduce_sum((0,)) reduce_prod((0,)) reduce_max((0,))
        reduce_min((1,)) expand_dims((1,)) rev((0,)) transpose((1,0))
        optimization_barrier cumsum(1,True)""",
        (X,),
    ),
    "lax, two arrays": (
        lax,
        """add atan2 div eq ge gt igamma igamma_grad_a igammac le lt max min mul ne
        nextafter polygamma pow random_gamma_grad rem sub zeta complex dot_general((((1,
        ),(1,)),((),())))""",
        (X, X),
    ),
    "lax, integers": (
        lax,
        """bitwise_and bitwise_or bitwise_xor shift_left shift_right_arithmetic
        shift_right_logical rem mulhi""",
        (I, I),
    ),
    "lax, one array of integers": (
        lax,
        """bitwise_not clz population_count reduce_xor((0,)) reduce_and((0,))
        reduce_or((1,)) sign abs""",
        (I,),
    ),
    "lax, complex": (lax, "real imag conj abs sign sqrt fft('FFT',(6,))", (C,)),
    "numpy, one array": (
        jnp,
        """abs absolute acos all any amax amin angle argmax argmin argpartition(3)
        argsort argwhere(size=4) around array asarray astype("float16")
        atleast_1d atleast_2d atleast_3d average  broadcast_to((4,8,6)) cbrt
        ceil clip(0,1) conj conjugate copy corrcoef cos cosh count_nonzero cov cumprod
        cumsum cumulative_sum(axis=0) cumulative_prod(axis=1) deg2rad degrees
        diag diagonal diff  ediff1d empty_like exp exp2 expand_dims(0) expm1
        fabs flatnonzero(size=3) flip fliplr flipud float_power(2) floor frexp
        full_like(2.0)  gradient histogram i0 imag iscomplex isfinite isinf
        isnan isneginf isposinf isreal linalg.norm log log10 log1p log2  max
        mean median min modf moveaxis(0,1) nan_to_num nanargmax nanargmin nancumprod
        nancumsum nanmax nanmean nanmedian nanmin nanpercentile(30.0) nanprod
        nanquantile(0.3) nanstd nansum nanvar ndim negative nonzero(size=4) ones_like
         pad(2) pad(2,mode="reflect") pad(1,mode="edge") pad(1,mode="wrap")
        pad(1,mode="linear_ramp") pad(1,mode="mean") partition(3) percentile(30.0)
        permute_dims((1,0))  positive power(2) prod ptp quantile(0.3) rad2deg
        radians ravel real reciprocal repeat(2,axis=0) reshape((4,12)) rint roll(2)
        rollaxis(1) rot90 round shape sign signbit sin sinc sinh size sort
         split(2) sqrt square squeeze std sum swapaxes(0,1) tan tanh
        tile((2,3)) trace transpose trapezoid  tril triu trunc  unique(size=3)
        unwrap  var zeros_like sort(descending=True) sort_complex unstack
        array_split(3) hsplit(2) vsplit(2) unique_values(size=3)""",
        (X,),
    ),
    "numpy, two arrays": (
        jnp,
        """add allclose arctan2 array_equal copysign  divide divmod  equal
        floor_divide fmax fmin fmod greater greater_equal heaviside hypot inner isclose
        kron less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor
        maximum minimum mod multiply nextafter not_equal outer power remainder subtract
        tensordot true_divide vdot vecdot  union1d(size=5)
        intersect1d(size=5) setdiff1d(size=5) setxor1d(size=5) isin""",
        (X, X),
    ),
    "numpy, integers": (
        jnp,
        """bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor gcd
        lcm left_shift right_shift floor_divide""",
        (I, I),
    ),
    "numpy, one array of integers": (
        jnp,
        """bitwise_count bitwise_invert invert """,
        (I,),
    ),
    "numpy, a square": (
        jnp,
        """linalg.cholesky linalg.cond linalg.det linalg.eig linalg.eigh linalg.eigvals
        linalg.eigvalsh linalg.inv linalg.matrix_norm linalg.matrix_power(3)
        linalg.matrix_rank linalg.pinv linalg.qr linalg.slogdet linalg.svd
        linalg.svdvals
         linalg.trace linalg.diagonal linalg.vector_norm
        linalg.matrix_transpose fft.fft fft.fft2 fft.fftn fft.fftshift
        fft.ifft fft.ifft2 fft.ifftn fft.ifftshift fft.rfft fft.rfft2 fft.rfftn
        fft.irfft fft.irfft2 fft.irfftn fft.hfft fft.ihfft""",
        (S,),
    ),
    "numpy, two squares": (
        jnp,
        """linalg.solve linalg.lstsq linalg.matmul  
        linalg.tensordot linalg.vecdot  matmul   
         """,
        (S, S),
    ),
    "numpy, vectors": (
        jnp,
        """ convolve correlate dot   ix_  meshgrid
        polyadd polydiv polymul polysub polyval searchsorted vecdot""",
        (V, V),
    ),
    "nn": (
        jax.nn,
        """celu elu gelu gelu(approximate=False) glu hard_sigmoid hard_silu hard_swish
        hard_tanh leaky_relu log_sigmoid log_softmax logsumexp mish relu relu6 selu
        sigmoid silu soft_sign softmax softplus sparse_plus sparse_sigmoid squareplus
        standardize swish tanh log1mexp""",
        (X,),
    ),
    "scipy.special, one array": (
        special,
        """  digamma entr erf erfc erfinv exp1 expi expit
        factorial gammaln gamma i0 i0e i1 i1e log_ndtr log_softmax logit logsumexp
        ndtr ndtri softmax spence   fresnel sici""",
        (X,),
    ),
    "scipy.special, two arrays": (
        special,
        """beta betaln gammainc gammaincc  kl_div rel_entr xlog1py xlogy zeta
         poch""",
        (X, X),
    ),
    "scipy.special, three arrays": (special, "betainc hyp1f1", (X, X, X)),
    "scipy.linalg, a square": (
        slinalg,
        """cholesky cho_factor det eigh expm   inv lu lu_factor polar
        qr  schur sqrtm svd toeplitz  eigh(eigvals_only=True)""",
        (S,),
    ),
    "scipy.linalg, two squares": (
        slinalg,
        "solve solve_triangular block_diag ",
        (S, S),
    ),
    "scipy.stats": (
        stats,
        """norm.logpdf norm.cdf norm.ppf cauchy.pdf laplace.cdf logistic.logpdf
        expon.pdf t.pdf(3.0) chi2.logpdf(3.0) gamma.cdf(2.0) beta.pdf(2.0,3.0)
        rankdata mode  poisson.pmf(2.0) uniform.pdf vonmises.pdf(1.0)""",
        (X,),
    ),
    "random, a key": (
        jax.random,
        """ball(3,shape=(4,)) bernoulli(0.5,(8,6)) beta(1.0,2.0,(8,)) bits((8,6))
        binomial(5.0,0.5,(8,)) cauchy((8,)) chisquare(2.0,(8,)) choice(10,(4,))
        choice(10,(4,),replace=False) clone dirichlet(np.ones(3),(4,))
        double_sided_maxwell(0.0,1.0,(8,)) exponential((8,)) f(2.0,3.0,(8,))
        fold_in(3) gamma(2.0,(8,)) generalized_normal(2.0,(8,)) geometric(0.5,(8,))
        gumbel((8,)) key_data laplace((8,)) loggamma(2.0,(8,)) logistic((8,))
        lognormal(shape=(8,)) maxwell((8,)) 
        multivariate_normal(np.zeros(3),np.eye(3),(4,))
        normal((8,6)) normal((8,),dtype="complex64") orthogonal(4) pareto(2.0,(8,))
        permutation(10) poisson(2.0,(8,)) rademacher((8,)) randint((8,),0,9)
        rayleigh(1.0,(8,)) split(3) t(2.0,(8,)) triangular(0.0,0.5,1.0,(8,))
        truncated_normal(-1.0,1.0,(8,)) uniform((8,6)) wald(1.0,(8,))
        weibull_min(1.0,2.0,(8,))
        """,
        (KEY,),
    ),
    "random, a key and an array": (
        jax.random,
        """categorical permutation choice permutation(axis=1,independent=True)
        bernoulli """,
        (KEY, X),
    ),
    "random, a key of rbg": (jax.random, "normal((8,6)) split(3) fold_in(2)", (RBG,)),
}
"""(module, names with what follows the arrays, arrays)."""


def by_name() -> Iterator[tuple[str, Call]]:
    """The functions of :data:`BY_NAME`."""
    for title, (module, text, args) in BY_NAME.items():
        for written in _words(text):
            name, _, more = written.partition("(")
            fun = functools.reduce(getattr, name.split("."), module)
            given, keywords = _arguments(more)
            yield (
                f"{title}: {written}",
                (functools.partial(_called, fun, len(args), given, keywords), args),
            )


def _words(text: str) -> list[str]:
    """Split at blanks outside parentheses."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter.isspace():
            if depth == 0 and found[-1]:
                found.append("")
            continue
        found[-1] += letter
    return [word for word in found if word]


def _arguments(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def taken(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    if not text:
        return (), {}
    found: tuple[tuple[Any, ...], dict[str, Any]] = eval(
        f"taken({text}", {"taken": taken, "np": np}
    )
    return found


def _called(
    fun: Callable[..., Any],
    count: int,
    given: tuple[Any, ...],
    keywords: Mapping[str, Any],
    *arrays: Any,
) -> Any:
    assert len(arrays) == count
    return fun(*arrays, *given, **keywords)


def _conv(**more: Any) -> Callable[..., Any]:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, **more
    )


def _pool(fun: Any, start: float) -> Callable[..., Any]:
    window = (1, 2, 2, 1)
    return lambda x: lax.reduce_window(x, start, fun, window, window, "VALID")


def _grad(fun: Callable[..., Any], at: int = 0) -> Callable[..., Any]:
    return jax.grad(lambda *args: jnp.sum(jnp.sin(fun(*args))), at)


def _reference(x: jax.Array) -> jax.Array:
    held = jax.new_ref(jnp.zeros(6))

    def turn(i: jax.Array, _: None) -> None:
        held[...] += x[i]

    lax.fori_loop(0, 8, turn, None)
    return jax.freeze(held)


@jax.custom_jvp
def _by_jvp(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


_by_jvp.defjvp(lambda xs, ts: (jnp.sin(xs[0]), ts[0] * jnp.cos(xs[0])))


@jax.custom_vjp
def _by_vjp(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


_by_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def _called_back(x: np.ndarray) -> np.ndarray:
    return np.sin(x)


WRITTEN: Mapping[str, Call] = {
    "convolution": (_conv(), (IMAGE, FILTER)),
    "convolution, dilated": (_conv(rhs_dilation=(2, 2)), (IMAGE, FILTER)),
    "convolution, gradient for the image": (_grad(_conv()), (IMAGE, FILTER)),
    "convolution, gradient for the weight": (_grad(_conv(), 1), (IMAGE, FILTER)),
    "convolution transposed": (
        lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME"),
        (IMAGE, FILTER),
    ),
    "pooling, maximum": (_pool(lax.max, -jnp.inf), (IMAGE,)),
    "pooling, minimum": (_pool(lax.min, jnp.inf), (IMAGE,)),
    "pooling, sum": (_pool(lax.add, 0.0), (IMAGE,)),
    "pooling, any function": (_pool(lambda a, b: a * b + 1, 0.0), (IMAGE,)),
    "pooling, gradient": (_grad(_pool(lax.max, -jnp.inf)), (IMAGE,)),
    "pooling, its jvp": (
        lambda x: jax.jvp(_pool(lax.max, -jnp.inf), (x,), (x,)),
        (IMAGE,),
    ),
    "reduce": (
        lambda x: lax.reduce(x, np.float32(0), lambda a, b: a * b + 1, (0,)),
        (X,),
    ),
    "index": (lambda x, i: x[i], (X, J)),
    "index, gradient": (_grad(lambda x, i: x[i]), (X, J)),
    "at set": (lambda x, i: x.at[i].set(1), (X, J)),
    "at add": (lambda x, i: x.at[i].add(1), (X, J)),
    "at subtract": (lambda x, i: x.at[i].subtract(1), (X, J)),
    "at mul": (lambda x, i: x.at[i].mul(2), (X, J)),
    "at min": (lambda x, i: x.at[i].min(0), (X, J)),
    "at max": (lambda x, i: x.at[i].max(0), (X, J)),
    "at apply": (lambda x, i: x.at[i].apply(jnp.sin), (X, J)),
    "take_along_axis": (lambda x, i: jnp.take_along_axis(x, i % 6, 1), (X, I)),
    "dynamic_slice": (lambda x, n: lax.dynamic_slice(x, (n, 0), (2, 6)), (X, N)),
    "dynamic_update_slice": (
        lambda x, n: lax.dynamic_update_slice(x, x[:2], (n, 0)),
        (X, N),
    ),
    "segment_sum": (lambda x, i: jax.ops.segment_sum(x[:5], i, 4), (X, J)),
    "segment_max": (lambda x, i: jax.ops.segment_max(x[:5], i, 4), (X, J)),
    "segment_prod": (lambda x, i: jax.ops.segment_prod(x[:5], i, 4), (X, J)),
    "ragged_dot": (
        lambda x, w, counts: lax.ragged_dot(x, w, counts),
        (X, B, jax.ShapeDtypeStruct((4,), jnp.int32)),
    ),
    "einsum": (lambda x, w: jnp.einsum("ij,bjk->bik", x, w), (X, B)),
    "sort of two": (lambda x, i: lax.sort((x, i), num_keys=1), (X, I)),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, jnp.uint8), (X,)),
    "scan": (lambda x: lax.scan(lambda c, r: (c + r, c * r), x[0], x), (X,)),
    "scan, gradient": (
        _grad(lambda x: lax.scan(lambda c, r: (jnp.sin(c + r), c), x[0], x)[0]),
        (X,),
    ),
    "while": (
        lambda x: lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c + 1, x),
        (X,),
    ),
    "while under vmap": (
        jax.vmap(lambda x: lax.while_loop(lambda c: jnp.sum(c) < 9, jnp.exp, x)),
        (X,),
    ),
    "fori_loop": (lambda x: lax.fori_loop(0, 3, lambda i, c: c + i, x), (X,)),
    "cond": (lambda x: lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x), (X,)),
    "switch": (lambda n, x: lax.switch(n, [jnp.sin, jnp.cos, jnp.tan], x), (N, X)),
    "map": (lambda x: lax.map(jnp.sin, x), (X,)),
    "associative_scan": (lambda x: lax.associative_scan(jnp.add, x), (X,)),
    "checkpoint": (_grad(jax.checkpoint(jnp.sin)), (X,)),
    "checkpoint_name": (lambda x: checkpoint_name(x, "here"), (X,)),
    "custom_jvp": (_grad(_by_jvp), (X,)),
    "custom_vjp": (_by_vjp, (X,)),
    "custom_root": (
        lambda x: lax.custom_root(
            lambda y: y - jnp.sin(x), x, lambda f, y: jnp.sin(x), lambda g, y: y
        ),
        (X,),
    ),
    "cg": (
        lambda s, v: jax.scipy.sparse.linalg.cg(lambda u: s @ s.T @ u + u, v)[0],
        (S, V),
    ),
    "reference": (_reference, (X,)),
    "debug.print": (lambda x: (jax.debug.print("{}", x), x)[1], (X,)),
    "debug.callback": (lambda x: (jax.debug.callback(print, x), x)[1], (X,)),
    "pure_callback": (lambda x: jax.pure_callback(_called_back, X, x), (X,)),
    "io_callback": (lambda x: io_callback(_called_back, X, x), (X,)),
    "device_put": (jax.device_put, (X,)),
    "platform_dependent": (
        lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos),
        (X,),
    ),
    "seed": (lambda n: jax.random.key_data(jax.random.key(n)), (N,)),
    "wrap": (
        jax.random.wrap_key_data,
        (jax.ShapeDtypeStruct((3, 2), jnp.uint32),),
    ),
    "rng_bit_generator": (
        lambda k: lax.rng_bit_generator(k, (8, 6)),
        (jax.ShapeDtypeStruct((4,), jnp.uint32),),
    ),
    "rng_uniform": (lambda: lax.rng_uniform(0.0, 1.0, (8, 6)), ()),
    "dot_product_attention": (
        lambda x: jax.nn.dot_product_attention(x, x, x, is_causal=True),
        (jax.ShapeDtypeStruct((2, 8, 4, 6), jnp.float32),),
    ),
    "lu_pivots_to_permutation": (
        lambda x: lax.linalg.lu(x)[2],
        (B,),
    ),
    "triangular_solve of a batch": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        (B, B),
    ),
    "keys by row": (
        lambda i, k: jax.vmap(lambda n: jax.random.fold_in(k, n))(i),
        (J, KEY),
    ),
    "qr, reduced": (lambda x: lax.linalg.qr(x, full_matrices=False), (B,)),
    "qr with pivoting": (lambda x: slinalg.qr(x, pivoting=True), (S,)),
    "hessenberg": (lax.linalg.hessenberg, (S,)),
    "tridiagonal": (lambda x: lax.linalg.tridiagonal(x, lower=True), (B,)),
    "tridiagonal_solve": (
        lambda v, b: lax.linalg.tridiagonal_solve(v, v, v, b[:, :2]),
        (V, S),
    ),
    "householder_product": (lax.linalg.householder_product, (S, V)),
    "symmetric_product": (lax.linalg.symmetric_product, (S, S)),
    "cholesky_update": (lax.linalg.cholesky_update, (S, V)),
}
"""What takes more than a name: windows, indices, loops, callbacks, references."""


def every_call() -> Iterator[tuple[str, Call]]:
    """All functions of the table, with a title."""
    yield from by_name()
    yield from WRITTEN.items()


def steps() -> Iterator[tuple[str, Any]]:
    """The traced jaxpr of every function."""
    for title, (fun, args) in every_call():
        yield title, jax.jit(fun).trace(*args).jaxpr
