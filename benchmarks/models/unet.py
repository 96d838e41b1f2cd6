"""U-Net in flax linen: images cut into classes, skips joined on the way up, adam.

Two convolutions a level, pooled four times and brought up again by transposed ones
(Ronneberger et al., arXiv 1505.04597), with group norms and "SAME" borders.
"""

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
    make_model,
    pick,
    precision,
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch; `levels` counts those below."""

    image: int
    width: int
    levels: int
    classes: int
    batch: int


SIZES = {
    "tiny": Config(16, 8, levels=2, classes=4, batch=16),
    "medium": Config(128, 32, levels=3, classes=8, batch=16),
    "large": Config(512, 64, levels=4, classes=2, batch=64),
    "one image": Config(2048, 64, levels=4, classes=2, batch=1),
    "one small image": Config(32, 8, levels=1, classes=4, batch=1),
}


class Level(nn.Module):
    """Two convolutions, each with a group norm and relu."""

    filters: int
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        for _ in range(2):
            x = nn.Conv(self.filters, (3, 3), use_bias=False, **kw)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8, **kw)(x))
        return x


class UNet(nn.Module):
    """Images `[B, I, I, 3]` to logits `[B, I, I, classes]`."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        widths = [cfg.width * 2**level for level in range(cfg.levels)]
        skips = []
        for width in widths:
            x = Level(width, self.prec)(x)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = Level(cfg.width * 2**cfg.levels, self.prec)(x)
        for width in reversed(widths):
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2), **kw)(x)
            x = jnp.concatenate([skips.pop(), x], axis=-1)
            x = Level(width, self.prec)(x)
        return nn.Conv(cfg.classes, (1, 1), **kw)(x)


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. `depth` counts levels."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, levels=cfg.levels if depth is None else depth)
    model = UNet(cfg, prec)
    tx = optimizer or optax.adam(1e-3)

    def init(rng: jax.Array) -> State:
        image = jnp.zeros((1, cfg.image, cfg.image, 3), prec.param)
        params = model.init(rng, image)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        def loss_fn(params: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, batch["images"])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(prec.param), batch["classes"]
            )
            return jnp.mean(losses)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        coarse = rng.integers(0, cfg.classes, (cfg.batch, 4, 4))
        block = np.ones((1, cfg.image // 4, cfg.image // 4), np.int64)
        classes = np.kron(coarse, block).astype(np.int32)
        noise = rng.standard_normal((cfg.batch, cfg.image, cfg.image, 3))
        images = (classes[..., None] + 0.5 * noise).astype(prec.param)
        return {"images": images, "classes": classes}

    images = (cfg.batch, cfg.image, cfg.image)
    shapes = {
        "images": jax.ShapeDtypeStruct((*images, 3), prec.param),
        "classes": ints(*images),
    }
    return make_model("unet", train_step, init, shapes, make_batch)
