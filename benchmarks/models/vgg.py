"""VGG-19 in haiku: convolutions and three large dense layers with dropout, momentum.

Four in five of its parameters are the first dense layer's (Simonyan and Zisserman,
arXiv 1409.1556, configuration E).
"""

from dataclasses import dataclass, replace
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.models.zoo import (
    Batch,
    Metrics,
    Model,
    State,
    ints,
    labelled_images,
    make_model,
    pick,
    precision,
)


@dataclass(frozen=True)
class Config:
    """Sizes; `stages` are (filters, convolutions) between poolings."""

    image: int
    stages: tuple[tuple[int, int], ...]
    dense: int
    classes: int
    batch: int


SIZES = {
    "tiny": Config(16, ((16, 1), (32, 2)), dense=64, classes=16, batch=16),
    "medium": Config(64, ((32, 2), (64, 2), (128, 2)), 1024, classes=1024, batch=64),
    "large": Config(
        224, ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)), 4096, 1000, batch=256
    ),
}


def forward(images: jax.Array, cfg: Config) -> jax.Array:
    """Images `[B, I, I, 3]` to logits `[B, classes]`; draws random keys."""
    x = images
    for filters, count in cfg.stages:
        for _ in range(count):
            x = jax.nn.relu(hk.Conv2D(filters, kernel_shape=3)(x))
        x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
    x = hk.Flatten()(x)
    for _ in range(2):
        x = jax.nn.relu(hk.Linear(cfg.dense)(x))
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
    return hk.Linear(cfg.classes)(x)


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. `depth` counts stages."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, stages=cfg.stages[:depth])
    net = hk.transform(lambda images: forward(images, cfg))
    tx = optimizer or optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9)
    )

    def init(rng: jax.Array) -> State:
        image = jnp.zeros((1, cfg.image, cfg.image, 3), prec.param)
        params = net.init(rng, image)
        return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}

    def loss_fn(params: Any, rng: jax.Array, batch: Batch) -> jax.Array:
        params = jax.tree.map(lambda p: p.astype(prec.compute), params)
        logits = net.apply(params, rng, batch["images"].astype(prec.compute))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(prec.param), batch["labels"]
        )
        return jnp.mean(losses)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        rng = jax.random.fold_in(jax.random.key(0), state["step"])
        params = state["params"]
        loss, grads = jax.value_and_grad(loss_fn)(params, rng, batch)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        return new, {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return labelled_images(rng, cfg.batch, cfg.image, cfg.classes, prec.param)

    images = (cfg.batch, cfg.image, cfg.image, 3)
    shapes = {
        "images": jax.ShapeDtypeStruct(images, prec.param),
        "labels": ints(cfg.batch),
    }
    return make_model("vgg", train_step, init, shapes, make_batch)
