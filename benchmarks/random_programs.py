"""Random programs over most of JAX: what a step may be made of, in any order.

A program is a list of lines over numbered values, drawn from a :class:`random.Random`:
the same seed gives the same program, and hypothesis can shrink it. It prints as what it
does. Values stay small and smooth, so that rounding can not decide what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Aval = jax.ShapeDtypeStruct
Fun = Callable[..., Any]

SIZES = (1, 2, 2, 3, 4, 4, 5, 6, 8, 8, 12, 16)
MOST_ELEMENTS = 4096
MOST_DEPTH = 2


@dataclass(frozen=True)
class Line:
    """One value: what makes it, of which values, and how it is written."""

    text: str
    fun: Fun
    reads: tuple[int, ...]


@dataclass(frozen=True)
class RandomProgram:
    """Inputs, lines, and which values are given back; maybe gradients of their sum."""

    inputs: tuple[Aval, ...]
    lines: tuple[Line, ...]
    outputs: tuple[int, ...]
    differentiated: bool = False

    def forward(self, *args: jax.Array) -> list[jax.Array]:
        held = list(args)
        for line in self.lines:
            held.append(line.fun(*(held[i] for i in line.reads)))
        return [held[i] for i in self.outputs]

    def __call__(self, *args: jax.Array) -> list[jax.Array]:
        if not self.differentiated:
            return self.forward(*args)
        floats = [i for i, x in enumerate(args) if is_float(x)]

        def loss(*chosen: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            given = dict(zip(floats, chosen, strict=True))
            outs = self.forward(*(given.get(i, x) for i, x in enumerate(args)))
            terms = [jnp.sum(jnp.sin(x)) for x in outs if is_float(x)]
            return sum(terms, jnp.zeros(())), outs

        grads, outs = jax.grad(loss, tuple(range(len(floats))), has_aux=True)(
            *(args[i] for i in floats)
        )
        return [*outs, *grads]

    def __str__(self) -> str:
        lines = [
            f"v{i} = input {a.dtype}{list(a.shape)}" for i, a in enumerate(self.inputs)
        ]
        for n, line in enumerate(self.lines, len(self.inputs)):
            reads = ", ".join(f"v{i}" for i in line.reads)
            inner = line.text.replace("\n", "\n    ")
            lines.append(f"v{n} = {inner} ({reads})")
        given = ", ".join(f"v{i}" for i in self.outputs)
        how = " and gradients" if self.differentiated else ""
        return "\n".join([*lines, f"give {given}{how}"])

    def arguments(self, seed: int = 0) -> list[np.ndarray]:
        """Arrays for the inputs, of the widest floating type that is on."""
        rng = np.random.default_rng(seed)
        return [_array(rng, a) for a in self.inputs]


def _array(rng: np.random.Generator, aval: Aval) -> np.ndarray:
    if np.issubdtype(aval.dtype, np.floating):
        return rng.normal(size=aval.shape).astype(aval.dtype)
    if aval.dtype == np.bool_:
        return rng.random(aval.shape) < 0.5
    return rng.integers(0, 7, aval.shape).astype(aval.dtype)


def is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def is_int(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.integer))


def random_program(rng: Random, most_lines: int = 8) -> RandomProgram:
    """A program of 3 to ``most_lines`` lines, a third of them differentiated."""
    inputs = [Aval(_shape(rng), jnp.result_type(float)) for _ in range(2)]
    inputs.append(Aval(_shape(rng), jnp.int32))
    lines = _lines(rng, inputs, rng.randint(3, most_lines), 0)
    total = len(inputs) + len(lines)
    outputs = tuple(sorted({total - 1, rng.randrange(len(inputs), total)}))
    return RandomProgram(tuple(inputs), lines, outputs, rng.random() < 0.34)


def _shape(rng: Random, most: int = 512) -> tuple[int, ...]:
    while True:
        shape = tuple(rng.choice(SIZES) for _ in range(rng.choice((1, 2, 2, 3, 3, 4))))
        if math.prod(shape) <= most:
            return shape


def _lines(
    rng: Random, inputs: Sequence[Aval], count: int, depth: int
) -> tuple[Line, ...]:
    held, lines = list(inputs), []
    while len(lines) < count:
        line = _line(rng, held, depth)
        made = line and _made(line, held)
        if line and made is not None:
            lines.append(line)
            held.append(made)
    return tuple(lines)


def _made(line: Line, held: Sequence[Aval]) -> Aval | None:
    made = jax.eval_shape(line.fun, *(held[i] for i in line.reads))
    small = 0 < math.prod(made.shape) <= MOST_ELEMENTS
    return Aval(made.shape, made.dtype) if small else None


def _line(rng: Random, held: Sequence[Aval], depth: int) -> Line | None:
    families = [*FAMILIES, *(NESTING if depth < MOST_DEPTH else ())]
    return rng.choice(families)(_Draw(rng, held, depth))


@dataclass(frozen=True)
class _Draw:
    """What a family draws its line from."""

    rng: Random
    held: Sequence[Aval]
    depth: int

    def pick(self, test: Callable[[Aval], bool] = is_float, rank: int = 0) -> int:
        """A value that passes the test, later ones more often; -1 where none does."""
        fits = [i for i, a in enumerate(self.held) if test(a) and len(a.shape) >= rank]
        if not fits:
            return -1
        return max(self.rng.choice(fits), self.rng.choice(fits))

    def axis(self, at: int) -> int:
        return self.rng.randrange(len(self.held[at].shape))

    def axes(self, at: int) -> tuple[int, ...]:
        rank = len(self.held[at].shape)
        return tuple(sorted(self.rng.sample(range(rank), self.rng.randint(1, rank))))


Family = Callable[[_Draw], Line | None]


# ---- elementwise ------------------------------------------------------------------

UNARY: dict[str, Fun] = {
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "exp(-x*x)": lambda x: jnp.exp(-x * x),
    "sqrt(1 + x*x)": lambda x: jnp.sqrt(1 + x * x),
    "erf": lax.erf,
    "log1p(x*x)": lambda x: jnp.log1p(x * x),
    "neg": jnp.negative,
    "0.5x": lambda x: 0.5 * x,
    "atan2(x, 2)": lambda x: jnp.arctan2(x, 2.0),
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "lgamma(1.5 + x*x)": lambda x: lax.lgamma(1.5 + x * x),
    "digamma(1.5 + x*x)": lambda x: lax.digamma(1.5 + x * x),
    "clamp": lambda x: lax.clamp(-0.7, x, 0.9),
    "cbrt(2 + x*x)": lambda x: jnp.cbrt(2 + x * x),
    "barrier": lambda x: lax.optimization_barrier(x),
    "float32 and back": lambda x: x.astype(jnp.float32).astype(x.dtype),
    "complex abs": lambda x: jnp.abs(lax.complex(x, x + 1) * (2 - 1j)),
    "stop_gradient": lax.stop_gradient,
    "reduce_precision": lambda x: lax.reduce_precision(x, 11, 52),
}


def unary(draw: _Draw) -> Line | None:
    at = draw.pick()
    name = draw.rng.choice(sorted(UNARY))
    return Line(name, UNARY[name], (at,)) if at >= 0 else None


BINARY: dict[str, Fun] = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": lambda x, y: x / (1.5 + y * y),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "where": lambda x, y: jnp.where(x > 0.3, x, y),
    "hypot": lambda x, y: jnp.sqrt(1 + x * x + y * y),
    "pow": lambda x, y: (1.1 + x * x) ** jnp.tanh(y),
}


def binary(draw: _Draw) -> Line | None:
    """Two of one shape, or that broadcast; else the second by its mean."""
    x, y = draw.pick(), draw.pick()
    if min(x, y) < 0:
        return None
    name = draw.rng.choice(sorted(BINARY))
    fun = BINARY[name]
    shapes = draw.held[x].shape, draw.held[y].shape
    try:
        fits = math.prod(np.broadcast_shapes(*shapes)) <= 512
    except ValueError:
        fits = False
    if fits:
        return Line(name, fun, (x, y))
    return Line(f"{name} mean", lambda a, b: fun(a, jnp.mean(b)), (x, y))


def integers(draw: _Draw) -> Line | None:
    at = draw.pick(is_int)
    if at < 0 or draw.rng.random() < 0.4:
        at = draw.pick()
        if at < 0:
            return None
        return Line(
            "round to int32", lambda x: jnp.round(4 * x).astype(jnp.int32), (at,)
        )
    table: dict[str, Fun] = {
        "3i + 1": lambda i: 3 * i + 1,
        "i % 5": lambda i: i % 5,
        "i ^ 6": lambda i: i ^ 6,
        "i & 3": lambda i: i & 3,
        "i >> 1": lambda i: i >> 1,
        "clz": lax.clz,
        "cumsum": lambda i: jnp.cumsum(i, axis=-1) if i.ndim else i,
        "to float": lambda i: jnp.sin(i.astype(float)),
        "is even": lambda i: (i % 2 == 0).astype(jnp.int32),
        "sum last": lambda i: jnp.sum(i, axis=-1) if i.ndim else i,
        "max": jnp.max,
        "xor": lambda i: lax.reduce_xor(i, (0,)) if i.ndim else i,
        "bits": lambda i: lax.bitcast_convert_type(i, jnp.uint8).astype(jnp.int32),
    }
    name = draw.rng.choice(sorted(table))
    return Line(name, table[name], (at,))


# ---- products, sums, shapes -------------------------------------------------------


def contraction(draw: _Draw) -> Line | None:
    """Two values along equal dimensions, one of them maybe a batch dimension."""
    x, y = draw.pick(rank=1), draw.pick(rank=1)
    if min(x, y) < 0:
        return None
    left, right = draw.held[x].shape, draw.held[y].shape
    pairs = [(i, j) for i, n in enumerate(left) for j, m in enumerate(right) if n == m]
    draw.rng.shuffle(pairs)
    chosen: list[tuple[int, int]] = []
    for i, j in pairs:
        if all(i != a and j != b for a, b in chosen) and len(chosen) < 3:
            chosen.append((i, j))
    count = draw.rng.randint(0, len(chosen))
    summed, batch = chosen[:count], chosen[count:][: draw.rng.randint(0, 1)]
    numbers = tuple(
        (tuple(i for i, _ in part), tuple(j for _, j in part))
        for part in (summed, batch)
    )
    return Line(
        f"dot_general {numbers}",
        lambda a, b: 0.3 * lax.dot_general(a, b, numbers),
        (x, y),
    )


REDUCE: dict[str, Fun] = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
    "min": jnp.min,
    "var": jnp.var,
    "logsumexp": jax.nn.logsumexp,
    "prod tanh": lambda x, **kw: jnp.prod(jnp.tanh(x) + 0.2, **kw),
    "any": lambda x, **kw: jnp.any(x > 1, **kw).astype(float),
    "all": lambda x, **kw: jnp.all(x < 1, **kw).astype(float),
}


def reduction(draw: _Draw) -> Line | None:
    at = draw.pick(rank=1)
    if at < 0:
        return None
    name, axes = draw.rng.choice(sorted(REDUCE)), draw.axes(at)
    keep, fun = draw.rng.random() < 0.4, REDUCE[name]
    return Line(
        f"{name} over {axes} keepdims={keep}",
        lambda x: fun(x, axis=axes, keepdims=keep),
        (at,),
    )


ALONG: dict[str, Fun] = {
    "softmax": lambda x, d: jax.nn.softmax(x, d),
    "log_softmax": lambda x, d: jax.nn.log_softmax(x, d),
    "cumsum": lambda x, d: jnp.cumsum(x, d),
    "cumsum reverse": lambda x, d: lax.cumsum(x, d, reverse=True),
    "cumprod": lambda x, d: jnp.cumprod(jnp.tanh(x) + 0.3, d),
    "cummax": lambda x, d: lax.cummax(x, d),
    "cumlogsumexp": lambda x, d: lax.cumlogsumexp(x, d),
    "sort": lambda x, d: jnp.sort(x, d),
    "argmax": lambda x, d: jnp.argmax(x, d).astype(jnp.int32),
    "argsort": lambda x, d: jnp.argsort(x, d).astype(jnp.int32),
    "top": lambda x, d: lax.top_k(jnp.moveaxis(x, d, -1), 1)[0],
    "sort two": lambda x, d: lax.sort((x, jnp.sin(x)), dimension=d, num_keys=1)[1],
    "flip": lambda x, d: jnp.flip(x, d),
    "roll": lambda x, d: jnp.roll(x, 3, d),
    "normalize": lambda x, d: x / jnp.sqrt(1 + jnp.sum(x * x, d, keepdims=True)),
    "diff": lambda x, d: jnp.diff(x, axis=d, prepend=1.0),
    "repeat": lambda x, d: jnp.repeat(x, 2, d),
    "concatenate": lambda x, d: jnp.concatenate([x, 2 * x], d),
    "stack": lambda x, d: jnp.stack([x, jnp.cos(x), x * x], d),
    "halves": lambda x, d: sum(jnp.array_split(x, 2, d)) if x.shape[d] % 2 == 0 else x,
    "associative_scan": lambda x, d: lax.associative_scan(
        lambda a, b: 0.5 * a + b, x, axis=d
    ),
    "affine scan": lambda x, d: lax.associative_scan(
        lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (jnp.tanh(x), x), axis=d
    )[1],
    "rfft": lambda x, d: jnp.abs(jnp.fft.rfft(x, axis=d)),
    "ifft of fft": lambda x, d: jnp.real(jnp.fft.ifft(jnp.fft.fft(x, axis=d), axis=d)),
    "expand": lambda x, d: jnp.expand_dims(x, d),
    "take first": lambda x, d: lax.index_in_dim(x, 0, d, keepdims=False),
    "tile": lambda x, d: jnp.tile(x, [2 if i == d else 1 for i in range(x.ndim)]),
    "one of each": lambda x, d: x[tuple([0] * d)],
}


def along(draw: _Draw) -> Line | None:
    at = draw.pick(rank=1)
    if at < 0:
        return None
    name, axis = draw.rng.choice(sorted(ALONG)), draw.axis(at)
    fun = ALONG[name]
    return Line(f"{name} along {axis}", lambda x: fun(x, axis), (at,))


def shaped(draw: _Draw) -> Line | None:
    """Transposes, reshapes, broadcasts, pads and slices."""
    at = draw.pick(lambda a: is_float(a) or is_int(a), rank=1)
    if at < 0:
        return None
    shape = draw.held[at].shape
    return draw.rng.choice((_transposed, _reshaped, _padded, _sliced, _spread))(
        draw.rng, at, shape
    )


def _transposed(rng: Random, at: int, shape: Sequence[int]) -> Line:
    order = rng.sample(range(len(shape)), len(shape))
    return Line(f"transpose {order}", lambda x: x.transpose(order), (at,))


def _reshaped(rng: Random, at: int, shape: Sequence[int]) -> Line:
    rest, new = math.prod(shape), []
    while rest > 1 and len(new) < 4:
        sizes = [n for n in range(2, rest + 1) if rest % n == 0]
        new.append(rng.choice(sizes))
        rest //= new[-1]
    new = [*new, rest] if rest > 1 or not new else new
    return Line(f"reshape {new}", lambda x: x.reshape(new), (at,))


def _padded(rng: Random, at: int, shape: Sequence[int]) -> Line:
    config = [
        (
            rng.choice((0, 0, 1, 2, 4, -1)),
            rng.choice((0, 0, 1, 3, 4)),
            rng.choice((0, 0, 1)),
        )
        for _ in shape
    ]
    return Line(
        f"pad {config}",
        lambda x: lax.pad(x, jnp.asarray(2, x.dtype), config),
        (at,),
    )


def _sliced(rng: Random, at: int, shape: Sequence[int]) -> Line:
    starts = [rng.randrange(n) if rng.random() < 0.5 else 0 for n in shape]
    limits = [
        rng.randint(s + 1, n) if rng.random() < 0.5 else n
        for s, n in zip(starts, shape, strict=True)
    ]
    steps = [rng.choice((1, 1, 2)) for _ in shape]
    return Line(
        f"slice {starts} {limits} {steps}",
        lambda x: lax.slice(x, starts, limits, steps),
        (at,),
    )


def _spread(rng: Random, at: int, shape: Sequence[int]) -> Line:
    new = (rng.choice((2, 3, 4, 8)), *shape)
    return Line(f"broadcast {new}", lambda x: jnp.broadcast_to(x, new), (at,))


# ---- indexing ---------------------------------------------------------------------


def looked_up(draw: _Draw) -> Line | None:
    """Gathers and scatters by a value of integers."""
    at, by = draw.pick(rank=1), draw.pick(is_int)
    if min(at, by) < 0:
        return None
    axis = draw.axis(at)
    mode = draw.rng.choice(("fill", "clip", "wrap"))
    table: dict[str, Fun] = {
        f"take {mode}": lambda x, i: jnp.take(x, i - 1, axis, mode=mode),
        "take two": lambda x, i: x.at[i.ravel()[:4], ...].get(
            mode="fill", fill_value=0.5
        ),
        "take along": lambda x, i: jnp.take_along_axis(
            x, jnp.broadcast_to(i.ravel()[0] % x.shape[axis], [
                1 if d == axis else n for d, n in enumerate(x.shape)
            ]), axis
        ),
        "add at": lambda x, i: x.at[i.ravel()].add(0.7, mode="drop"),
        "set one": lambda x, i: x.at[i.ravel()[0]].set(0.3, mode="drop"),
        "mul at": lambda x, i: x.at[i.ravel()].mul(0.9, mode="drop"),
        "max at": lambda x, i: x.at[i.ravel()].max(0.2, mode="drop"),
        "min at": lambda x, i: x.at[i.ravel()].min(0.2, mode="drop"),
        "segment_sum": lambda x, i: jax.ops.segment_sum(
            x, jnp.resize(i.ravel() % 4, (x.shape[0],)), num_segments=4
        ),
        "one_hot": lambda x, i: jax.nn.one_hot(i % 6, 6, dtype=x.dtype),
        "dynamic_slice": lambda x, i: lax.dynamic_slice_in_dim(
            x, i.ravel()[0], max(1, x.shape[axis] // 2), axis
        ),
        "dynamic_update": lambda x, i: lax.dynamic_update_slice_in_dim(
            x,
            0.5 * lax.slice_in_dim(x, 0, max(1, x.shape[axis] // 2), axis=axis),
            i.ravel()[-1],
            axis,
        ),
        "dynamic_index": lambda x, i: lax.dynamic_index_in_dim(
            x, i.ravel()[0], axis, keepdims=False
        ),
        "searchsorted": lambda x, i: jnp.searchsorted(
            jnp.arange(5), i % 5
        ).astype(jnp.int32),
    }  # fmt: skip
    name = draw.rng.choice(sorted(table))
    return Line(f"{name} axis {axis}", table[name], (at, by))


# ---- windows, linear algebra, random numbers --------------------------------------


def windowed(draw: _Draw) -> Line | None:
    """Convolutions over the last but one dimension, and pooling."""
    at = draw.pick(rank=2)
    if at < 0:
        return None
    rng, shape = draw.rng, draw.held[at].shape
    width, channels = shape[-2:]
    size, stride = rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 3))
    pad: Any = rng.choice(("SAME", "VALID"))
    groups = rng.choice([g for g in (1, 2, 4) if channels % g == 0])
    dilation = rng.choice((1, 1, 2))
    if (size - 1) * dilation + 1 > width:
        return None
    window = (1,) * (len(shape) - 2) + (size, 1)
    strides = (1,) * (len(shape) - 2) + (stride, 1)

    def conv(x: jax.Array) -> jax.Array:
        batched = x.reshape(-1, width, channels)
        kernel = (size, channels // groups, 2 * groups)
        w = jnp.sin(jnp.arange(math.prod(kernel), dtype=x.dtype)).reshape(kernel)
        out = lax.conv_general_dilated(
            batched, w, (stride,), pad, rhs_dilation=(dilation,),
            dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=groups,
        )  # fmt: skip
        return 0.3 * out

    table: dict[str, Fun] = {
        f"conv {size} by {stride} {pad} groups {groups} dilation {dilation}": conv,
        f"max pool {size} by {stride} {pad}": lambda x: lax.reduce_window(
            x, -jnp.inf, lax.max, window, strides, pad
        ),
        f"sum pool {size} by {stride} {pad}": lambda x: lax.reduce_window(
            x, 0.0, lax.add, window, strides, pad
        ),
    }
    name = rng.choice(sorted(table))
    return Line(name, table[name], (at,))


def _positive(x: jax.Array) -> jax.Array:
    n = x.shape[-2]
    return 0.1 * x @ jnp.swapaxes(x, -1, -2) + 2 * jnp.eye(n, dtype=x.dtype)


MATRICES: dict[str, Fun] = {
    "cholesky": lambda x: jnp.linalg.cholesky(_positive(x)),
    "solve": lambda x: jnp.linalg.solve(_positive(x), x),
    "det": lambda x: jnp.log(jnp.linalg.det(_positive(x))),
    "inverse": lambda x: jnp.linalg.inv(_positive(x)),
    "eigenvalues": lambda x: jnp.linalg.eigvalsh(_positive(x)),
    "triangular": lambda x: lax.linalg.triangular_solve(
        _positive(x), x, left_side=True, lower=True
    ),
    "R of qr": lambda x: jnp.abs(jnp.linalg.qr(_positive(x), mode="r")),
    "singular values": lambda x: jnp.linalg.svd(_positive(x), compute_uv=False),
}


def matrices(draw: _Draw) -> Line | None:
    at = draw.pick(lambda a: is_float(a) and max(a.shape[-2:], default=0) <= 8, rank=2)
    name = draw.rng.choice(sorted(MATRICES))
    return Line(name, MATRICES[name], (at,)) if at >= 0 else None


def randomness(draw: _Draw) -> Line | None:
    at = draw.pick(rank=1)
    if at < 0:
        return None
    seed = draw.rng.randrange(100)

    def key() -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), 3)

    table: dict[str, Fun] = {
        "dropout": lambda x: jnp.where(jax.random.bernoulli(key(), 0.7, x.shape), x, 0),
        "noise": lambda x: x + jax.random.normal(key(), x.shape, x.dtype),
        "shuffle": lambda x: jax.random.permutation(key(), x),
        "categorical": lambda x: jax.random.categorical(key(), x).astype(jnp.int32),
        "keys by row": lambda x: jax.vmap(
            lambda k, r: r + jax.random.uniform(k, r.shape, r.dtype)
        )(jax.random.split(key(), x.shape[0]), x),
        "randint": lambda x: jax.random.randint(key(), x.shape, 0, 6),
        "gumbel": lambda x: x + jax.random.gumbel(key(), x.shape[-1:], x.dtype),
    }
    name = draw.rng.choice(sorted(table))
    return Line(f"{name} of {seed}", table[name], (at,))


FAMILIES: tuple[Family, ...] = (
    unary,
    unary,
    binary,
    binary,
    integers,
    contraction,
    contraction,
    reduction,
    reduction,
    along,
    along,
    along,
    shaped,
    shaped,
    looked_up,
    looked_up,
    windowed,
    matrices,
    randomness,
)


# ---- loops, branches, transformations ---------------------------------------------


def _inside(draw: _Draw, inputs: Sequence[Aval]) -> RandomProgram:
    count = draw.rng.randint(1, 3)
    lines = _lines(draw.rng, inputs, count, draw.depth + 1)
    return RandomProgram(tuple(inputs), lines, (len(inputs) + len(lines) - 1,))


def _like(x: jax.Array, made: jax.Array) -> jax.Array:
    """Something of the shape and type of ``x`` that depends on both."""
    if made.shape == x.shape and is_float(made):
        return 0.6 * x + 0.4 * jnp.tanh(made)
    return 0.6 * x + 0.1 * jnp.sin(jnp.mean(made.astype(x.dtype)))


def nested(draw: _Draw) -> Line | None:
    """A loop, a branch or a transformation around a program of its own."""
    x, y = draw.pick(rank=1), draw.pick(rank=1)
    if min(x, y) < 0:
        return None
    kind = draw.rng.choice(tuple(NESTED))
    return NESTED[kind](draw, x, y)


def _rows(aval: Aval) -> Aval:
    return Aval(aval.shape[1:], aval.dtype)


def _titled(title: str, inner: RandomProgram) -> str:
    return f"{title} of\n{inner}"


def _scan(draw: _Draw, x: int, y: int) -> Line:
    carry, row = draw.held[x], _rows(draw.held[y])
    inner, reverse = _inside(draw, [carry, row]), draw.rng.random() < 0.5
    give = draw.rng.random() < 0.5

    def body(held: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        (made,) = inner.forward(held, row)
        return _like(held, made), _like(row, made)

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        held, ys = lax.scan(body, x, y, reverse=reverse)
        return ys if give else held

    return Line(_titled(f"scan reverse={reverse} stacked={give}", inner), run, (x, y))


def _cache(draw: _Draw, x: int, y: int) -> Line:
    """A scan over time that writes each row into a cache, and reads it all."""
    row = _rows(draw.held[x])
    inner = _inside(draw, [row, draw.held[y]])

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        def body(held: Any, row: jax.Array) -> Any:
            cache, at = held
            (made,) = inner.forward(row, y)
            cache = lax.dynamic_update_index_in_dim(cache, _like(row, made), at, 0)
            return (cache, at + 1), jnp.sum(cache, axis=0)

        (cache, _), ys = lax.scan(body, (jnp.zeros_like(x), jnp.int32(0)), x)
        return cache + ys

    return Line(_titled("scan with a cache", inner), run, (x, y))


def _micro(draw: _Draw, x: int, y: int) -> Line | None:
    """Gradients accumulated by hand: a batch in parts, scanned."""
    rows = draw.held[x].shape[0]
    if rows % 2:
        return None
    steps = draw.rng.choice([n for n in (2, 4) if rows % n == 0])
    part = Aval((rows // steps, *draw.held[x].shape[1:]), draw.held[x].dtype)
    inner = _inside(draw, [part, draw.held[y]])

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        def body(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            (made,) = inner.forward(part, y)
            return _like(total, made) + 0.1 * jnp.mean(part), None

        parts = x.reshape(steps, *part.shape)
        return lax.scan(body, jnp.zeros_like(y), parts)[0]

    return Line(_titled(f"scan over {steps} parts of a batch", inner), run, (x, y))


def _while(draw: _Draw, x: int, y: int) -> Line:
    inner = _inside(draw, [draw.held[x], draw.held[y]])
    most = draw.rng.choice((2, 3, 5))

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        def turn(held: Any) -> Any:
            count, now = held
            return count + 1, _like(now, inner.forward(now, y)[0])

        def test(held: Any) -> jax.Array:
            return (held[0] < most) & (jnp.mean(held[1]) < 50)

        return lax.while_loop(test, turn, (0, lax.stop_gradient(x)))[1]

    def stopped(x: jax.Array, y: jax.Array) -> jax.Array:
        return run(lax.stop_gradient(x), lax.stop_gradient(y))

    return Line(_titled(f"while below {most}", inner), stopped, (x, y))


def _batched_while(draw: _Draw, x: int, y: int) -> Line:
    """A ``while`` under ``vmap``: every row stops by itself."""
    inner = _inside(draw, [_rows(draw.held[x])])

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        def row(held: jax.Array) -> jax.Array:
            most = 1 + jnp.int32(3 * jax.nn.sigmoid(jnp.mean(held)))
            return lax.while_loop(
                lambda h: h[0] < most,
                lambda h: (h[0] + 1, _like(h[1], inner.forward(h[1])[0])),
                (0, held),
            )[1]

        return jax.vmap(row)(lax.stop_gradient(x))

    return Line(_titled("vmap of while", inner), run, (x, y))


def _fori(draw: _Draw, x: int, y: int) -> Line:
    inner = _inside(draw, [draw.held[x], draw.held[y]])
    return Line(
        _titled("fori_loop", inner),
        lambda x, y: lax.fori_loop(
            0, 3, lambda i, h: _like(h, inner.forward(h + i, y)[0]), x
        ),
        (x, y),
    )


def _cond(draw: _Draw, x: int, y: int) -> Line:
    inputs = [draw.held[x], draw.held[y]]
    first, second = _inside(draw, inputs), _inside(draw, inputs)
    text = f"cond of\n{first}\nor\n{second}"
    return Line(
        text,
        lambda x, y: lax.cond(
            jnp.mean(x) > 0,
            lambda x, y: _like(x, first.forward(x, y)[0]),
            lambda x, y: _like(x, second.forward(x, y)[0]),
            x,
            y,
        ),
        (x, y),
    )


def _switch(draw: _Draw, x: int, y: int) -> Line:
    inner = _inside(draw, [draw.held[x], draw.held[y]])
    return Line(
        _titled("switch", inner),
        lambda x, y: lax.switch(
            jnp.int32(3 * jax.nn.sigmoid(jnp.mean(y))),
            [lambda x, y: x, lambda x, y: _like(x, inner.forward(x, y)[0]), lambda x, y: -x],
            x,
            y,
        ),
        (x, y),
    )  # fmt: skip


def _vmap(draw: _Draw, x: int, y: int) -> Line:
    inner = _inside(draw, [_rows(draw.held[x]), draw.held[y]])
    loop = draw.rng.random() < 0.4

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        if loop:
            return lax.map(lambda row: inner.forward(row, y)[0], x)
        return jax.vmap(lambda row: inner.forward(row, y)[0])(x)

    return Line(_titled("map" if loop else "vmap", inner), run, (x, y))


def _checkpoint(draw: _Draw, x: int, y: int) -> Line:
    inner = _inside(draw, [draw.held[x], draw.held[y]])
    wrap = draw.rng.choice((jax.checkpoint, jax.jit))
    return Line(
        _titled(wrap.__name__, inner),
        lambda x, y: wrap(lambda x, y: inner.forward(x, y)[0])(x, y),
        (x, y),
    )


def _custom(draw: _Draw, x: int, y: int) -> Line:
    """A function with a derivative of its own, forward or backward."""
    inner = _inside(draw, [draw.held[x], draw.held[y]])
    by_jvp = draw.rng.random() < 0.5

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return _like(x, inner.forward(x, y)[0])

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        if by_jvp:
            jvp = jax.custom_jvp(plain)
            jvp.defjvp(lambda xs, ts: (plain(*xs), 0.5 * ts[0] * jnp.cos(xs[0])))
            return jvp(x, y)
        vjp = jax.custom_vjp(plain)
        vjp.defvjp(
            lambda x, y: (plain(x, y), (x, y)),
            lambda held, g: (g * jnp.cos(held[0]), jnp.zeros_like(held[1])),
        )
        return vjp(x, y)

    return Line(_titled("custom_jvp" if by_jvp else "custom_vjp", inner), run, (x, y))


def _references(draw: _Draw, x: int, y: int) -> Line:
    inner = _inside(draw, [_rows(draw.held[x]), draw.held[y]])

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        held = jax.new_ref(jnp.zeros_like(y))

        def turn(i: Any, _: Any) -> None:
            (made,) = inner.forward(x[i], y)
            held[...] = _like(held[...], made) + 0.1

        lax.fori_loop(0, x.shape[0], turn, None)
        return jax.freeze(held)

    return Line(
        _titled("a mutable reference", inner),
        lambda x, y: run(lax.stop_gradient(x), lax.stop_gradient(y)),
        (x, y),
    )


NESTED: dict[str, Callable[[_Draw, int, int], Line | None]] = {
    "scan": _scan,
    "cache": _cache,
    "micro": _micro,
    "while": _while,
    "batched while": _batched_while,
    "fori": _fori,
    "cond": _cond,
    "switch": _switch,
    "vmap": _vmap,
    "checkpoint": _checkpoint,
    "custom": _custom,
    "references": _references,
}
NESTING: tuple[Family, ...] = (nested, nested, nested)
