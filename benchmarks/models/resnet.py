"""ResNet in flax linen: bottleneck blocks, batch norm (`batch_stats`), SGD momentum.

`tiny` uses silu so that it can be compared to rounding; `large` is ResNet-50 with relu.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from benchmarks.models.zoo import (
    Batch,
    Metrics,
    Model,
    Precision,
    State,
    ints,
    labelled_images,
    make_model,
    pick,
    precision,
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch; `stages` counts blocks."""

    image: int
    width: int
    stages: tuple[int, ...]
    classes: int
    batch: int
    activation: Callable[[jax.Array], jax.Array]


SIZES = {
    "tiny": Config(32, 16, (1, 1), classes=16, batch=16, activation=nn.silu),
    "small": Config(32, 64, (1, 1), classes=64, batch=64, activation=nn.relu),
    "medium": Config(64, 64, (1, 1), classes=1024, batch=64, activation=nn.relu),
    "large": Config(224, 64, (3, 4, 6, 3), 1000, batch=256, activation=nn.relu),
    "one image": Config(2048, 64, (3, 4, 6, 3), 1000, batch=1, activation=nn.relu),
    "one small image": Config(64, 16, (1, 1), 16, batch=1, activation=nn.silu),
}


class TrainState(train_state.TrainState):
    """The usual state and the running statistics of batch norm."""

    batch_stats: Any


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a skip, projected where shapes differ."""

    filters: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.strides, self.strides)
        y = self.activation(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = self.activation(self.norm()(self.conv(self.filters, (3, 3), strides)(y)))
        y = self.norm()(self.conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.filters, (1, 1), strides, name="project")(x)
            x = self.norm(name="project_norm")(x)
        return self.activation(x + y)


class ResNet(nn.Module):
    """Images `[B, I, I, 3]` to logits `[B, classes]`."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        conv: Callable[..., nn.Module] = partial(nn.Conv, use_bias=False, **kw)
        norm: Callable[..., nn.Module] = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, **kw
        )
        x = conv(cfg.width, (7, 7), (2, 2), name="stem")(images)
        x = cfg.activation(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(cfg.stages):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                filters = cfg.width * 2**stage
                x = Bottleneck(filters, strides, conv, norm, cfg.activation)(x)
        return nn.Dense(cfg.classes, **kw)(x.mean(axis=(1, 2)))


def shallow(stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """`depth` blocks shared out over the same number of stages, early ones first.

    >>> shallow((3, 4, 6, 3), 6)
    (2, 2, 1, 1)
    """
    even, more = divmod(depth, len(stages))
    return tuple(even + (stage < more) for stage in range(len(stages)))


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. `depth` counts blocks."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    if depth is not None:
        cfg = replace(cfg, stages=shallow(cfg.stages, depth))
    model = ResNet(cfg, prec)
    tx = optimizer or optax.sgd(0.02, momentum=0.9, nesterov=True)

    def init(rng: jax.Array) -> State:
        image = jnp.zeros((1, cfg.image, cfg.image, 3), prec.param)
        variables = model.init(rng, image, train=False)
        # BatchNorm makes its statistics float32 whatever `param_dtype` says.
        variables = jax.tree.map(lambda x: x.astype(prec.param), variables)
        return TrainState.create(apply_fn=model.apply, tx=tx, **variables)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch["images"],
                train=True,
                mutable=["batch_stats"],
            )
            logits = logits.astype(prec.param)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["labels"]
            )
            return losses.mean(), (logits, updates)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, updates)), grads = grad_fn(state.params)
        state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
        hits = jnp.argmax(logits, -1) == batch["labels"]
        accuracy = hits.mean(dtype=prec.param)
        return state, {"loss": loss, "accuracy": accuracy}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return labelled_images(rng, cfg.batch, cfg.image, cfg.classes, prec.param)

    images = (cfg.batch, cfg.image, cfg.image, 3)
    shapes = {
        "images": jax.ShapeDtypeStruct(images, prec.param),
        "labels": ints(cfg.batch),
    }
    return make_model("resnet", train_step, init, shapes, make_batch)
