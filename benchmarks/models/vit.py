"""Vision transformer in flax linen: convolutional patch embedding, mean pool, adamw."""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

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
    """Sizes of the model and of the global batch."""

    image: int
    patch: int
    hidden: int
    heads: int
    layers: int
    classes: int
    batch: int


SIZES = {
    "tiny": Config(16, 4, hidden=64, heads=8, layers=2, classes=16, batch=16),
    "medium": Config(64, 8, hidden=1024, heads=16, layers=4, classes=1024, batch=64),
    "large": Config(224, 16, hidden=1024, heads=16, layers=24, classes=1000, batch=256),
}


class Block(nn.Module):
    """Pre-norm encoder block."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        y = nn.LayerNorm(**kw)(x)
        x = x + nn.MultiHeadDotProductAttention(self.cfg.heads, **kw)(y, y)
        y = nn.LayerNorm(**kw)(x)
        y = nn.gelu(nn.Dense(4 * self.cfg.hidden, **kw)(y))
        return x + nn.Dense(self.cfg.hidden, **kw)(y)


class ViT(nn.Module):
    """Images `[B, I, I, 3]` to logits `[B, classes]`."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        patch = (cfg.patch, cfg.patch)
        x = nn.Conv(cfg.hidden, patch, strides=patch, padding="VALID", **kw)(images)
        x = x.reshape(x.shape[0], -1, cfg.hidden)
        positions = self.param(
            "positions",
            nn.initializers.normal(0.02),
            (1, x.shape[1], cfg.hidden),
            self.prec.param,
        )
        x = x + positions.astype(self.prec.compute)
        for _ in range(cfg.layers):
            x = Block(cfg, self.prec)(x)
        x = nn.LayerNorm(**kw)(x).mean(axis=1)
        return nn.Dense(cfg.classes, **kw)(x)


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, layers=cfg.layers if depth is None else depth)
    model = ViT(cfg, prec)
    tx = optimizer or optax.adamw(1e-3, weight_decay=0.05)

    def init(rng: jax.Array) -> State:
        image = jnp.zeros((1, cfg.image, cfg.image, 3), prec.param)
        params = model.init(rng, image)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = state.apply_fn({"params": params}, batch["images"])
            logits = logits.astype(prec.param)
            targets = jax.nn.one_hot(batch["labels"], cfg.classes, dtype=prec.param)
            return optax.softmax_cross_entropy(logits, targets).mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        hits = jnp.argmax(logits, -1) == batch["labels"]
        accuracy = hits.mean(dtype=prec.param)
        return state.apply_gradients(grads=grads), {"loss": loss, "accuracy": accuracy}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return labelled_images(rng, cfg.batch, cfg.image, cfg.classes, prec.param)

    images = (cfg.batch, cfg.image, cfg.image, 3)
    shapes = {
        "images": jax.ShapeDtypeStruct(images, prec.param),
        "labels": ints(cfg.batch),
    }
    return make_model("vit", train_step, init, shapes, make_batch)
