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
