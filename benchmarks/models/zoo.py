"""What the models of the zoo share: the `Model` record, precision, made-up data.

No model here knows rhino: each is a train step as its author would write it for one
device. This module imports neither flax nor any model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

State = Any
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
Config = TypeVar("Config")


@dataclass(frozen=True)
class Model:
    """One train step with all that is needed to trace it or to run it.

    `train_step(state, batch) -> (state, metrics)` is a plain function, not jitted;
    `metrics` holds at least `"loss"`. `init(rng)` is pure and jits; `make_batch(seed)`
    returns numpy arrays of `batch_shapes`, the same ones for the same seed.
    """

    name: str
    train_step: TrainStep
    state_shapes: Any
    batch_shapes: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[jax.Array], State]
    make_batch: Callable[[int], dict[str, np.ndarray]]


class Precision(NamedTuple):
    """The dtype of parameters (and losses), and that of activations and matmuls."""

    param: Any
    compute: Any


PRECISIONS = {
    "float32": Precision(jnp.float32, jnp.float32),
    "float64": Precision(jnp.float64, jnp.float64),
    "bfloat16": Precision(jnp.float32, jnp.bfloat16),
}


def precision(dtype: str) -> Precision:
    """Parameter and compute dtypes for `dtype`.

    `"bfloat16"` is mixed precision: parameters stay in float32.

    Raises:
        ValueError: an unknown name, or `"float64"` while `jax_enable_x64` is off.

    >>> precision("bfloat16").param.__name__
    'float32'
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(PRECISIONS)}")
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise ValueError("dtype 'float64' needs jax.config.update('jax_enable_x64', 1)")
    return PRECISIONS[dtype]


def pick(sizes: Mapping[str, Config], size: str) -> Config:
    """The configuration called `size`.

    Raises:
        ValueError: there is none of that name.
    """
    if size not in sizes:
        raise ValueError(f"size {size!r}: choose one of {', '.join(sizes)}")
    return sizes[size]


def make_model(
    name: str,
    train_step: TrainStep,
    init: Callable[[jax.Array], State],
    batch_shapes: dict[str, jax.ShapeDtypeStruct],
    make_batch: Callable[[np.random.Generator], dict[str, np.ndarray]],
    state_shapes: State | None = None,
) -> Model:
    """Assemble a `Model`: the state's shapes, if not given, are read from `init`."""

    def seeded_batch(seed: int) -> dict[str, np.ndarray]:
        return make_batch(np.random.default_rng(seed))

    return Model(
        name=name,
        train_step=train_step,
        state_shapes=(
            jax.eval_shape(init, jax.random.key(0))
            if state_shapes is None
            else state_shapes
        ),
        batch_shapes=batch_shapes,
        init=init,
        make_batch=seeded_batch,
    )


def run_init(model: Model, seed: int = 0) -> tuple[TrainStep, State, Batch]:
    """`(train_step, state, batch)` of `model` as real arrays on the default device."""
    # An `rbg` key: XLA compiles it in half the time that threefry takes.
    state = jax.jit(model.init)(jax.random.key(seed, impl="rbg"))
    return model.train_step, state, model.make_batch(seed)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """The abstract int32 array of `shape`."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def zipf_tokens(
    rng: np.random.Generator, shape: tuple[int, ...], vocab: int
) -> np.ndarray:
    """int32 ids in [0, vocab), frequent ones low, as in text or in clicks."""
    ids = np.exp(rng.uniform(0.0, np.log(vocab + 1.0), shape)).astype(np.int32) - 1
    return np.clip(ids, 0, vocab - 1)


def labelled_images(
    rng: np.random.Generator, batch: int, image: int, classes: int, dtype: Any
) -> dict[str, np.ndarray]:
    """Noise images `[batch, image, image, 3]`, each tinted according to its label."""
    labels = rng.integers(0, classes, batch, dtype=np.int32)
    tint = np.stack([np.cos(labels), np.sin(labels), labels / classes], axis=-1)
    noise = rng.standard_normal((batch, image, image, 3))
    images = (tint[:, None, None, :] + 0.5 * noise).astype(dtype)
    return {"images": images, "labels": labels}
