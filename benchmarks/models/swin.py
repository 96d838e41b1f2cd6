"""Swin transformer in flax linen: attention in windows that shift, adamw.

Windows are reshapes, shifts are rolls, biases by relative position are gathered from a
table (Liu et al., arXiv 2103.14030). `large` is Swin-L at 224 x 224.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from benchmarks.models.resnet import shallow
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
    """Sizes; `stages` counts blocks, whose heads have `width / heads` channels."""

    image: int
    patch: int
    window: int
    width: int
    heads: int
    stages: tuple[int, ...]
    classes: int
    batch: int


SIZES = {
    "tiny": Config(32, 4, 4, width=16, heads=2, stages=(2, 1), classes=16, batch=16),
    "medium": Config(64, 4, 4, 128, 4, stages=(2, 2), classes=1024, batch=64),
    "large": Config(224, 4, 7, 192, 6, stages=(2, 2, 18, 2), classes=1000, batch=256),
}


def relative_places(window: int) -> np.ndarray:
    """For two places of a window, which entry of the table holds their bias."""
    at = np.stack(np.meshgrid(*[np.arange(window)] * 2, indexing="ij")).reshape(2, -1)
    apart = at[:, :, None] - at[:, None, :] + window - 1
    return np.asarray(apart[0] * (2 * window - 1) + apart[1], np.int32)


def region_mask(side: int, window: int, shift: int) -> np.ndarray:
    """Which places of each shifted window `[windows, w², w²]` lay side by side."""
    edges = [0, side - window, side - shift, side]
    of = np.repeat(np.arange(3), np.diff(edges))
    regions = (3 * of[:, None] + of[None, :]).reshape(
        side // window, window, side // window, window
    )
    each = regions.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return each[:, :, None] == each[:, None, :]


def to_windows(x: jax.Array, window: int) -> jax.Array:
    """`[B, S, S, C]` to `[B, windows, w², C]`."""
    b, s, _, c = x.shape
    x = x.reshape(b, s // window, window, s // window, window, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, window * window, c)


def from_windows(x: jax.Array, side: int, window: int) -> jax.Array:
    """The inverse of `to_windows`."""
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, side // window, side // window, window, window, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, side, side, c)


class WindowAttention(nn.Module):
    """Attention within windows `[B, windows, w², C]`, one fused projection."""

    heads: int
    window: int
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        b, n, t, c = x.shape
        qkv = nn.Dense(3 * c, name="qkv", **kw)(x)
        qkv = qkv.reshape(b, n, t, 3, self.heads, c // self.heads)
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        scores = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k) * (c // self.heads) ** -0.5
        table = self.param(
            "bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.heads),
            self.prec.param,
        )
        bias = table.astype(scores.dtype)[relative_places(self.window)]
        scores = scores + bias.transpose(2, 0, 1)
        if mask is not None:
            scores = jnp.where(mask[:, None], scores, -1e4)
        y = jnp.einsum("bnhqk,bnkhd->bnqhd", nn.softmax(scores), v)
        return nn.Dense(c, name="out", **kw)(y.reshape(b, n, t, c))


class Block(nn.Module):
    """Window attention, of a shifted image in every second block, and an MLP."""

    heads: int
    window: int
    shift: int
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        side, channels = x.shape[1], x.shape[3]
        y = nn.LayerNorm(**kw)(x)
        if self.shift:
            y = jnp.roll(y, (-self.shift, -self.shift), axis=(1, 2))
        mask = region_mask(side, self.window, self.shift) if self.shift else None
        attention = WindowAttention(self.heads, self.window, self.prec)
        y = attention(to_windows(y, self.window), mask)
        y = from_windows(y, side, self.window)
        if self.shift:
            y = jnp.roll(y, (self.shift, self.shift), axis=(1, 2))
        x = x + y
        y = nn.gelu(nn.Dense(4 * channels, name="up", **kw)(nn.LayerNorm(**kw)(x)))
        return x + nn.Dense(channels, name="down", **kw)(y)


class Swin(nn.Module):
    """Images `[B, I, I, 3]` to logits `[B, classes]`."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        patch = (cfg.patch, cfg.patch)
        x = nn.Conv(cfg.width, patch, strides=patch, padding="VALID", **kw)(images)
        x = nn.LayerNorm(**kw)(x)
        for stage, blocks in enumerate(cfg.stages):
            if stage > 0:
                x = self._merge(x, cfg.width * 2**stage)
            for block in range(blocks):
                shift = cfg.window // 2 if block % 2 and x.shape[1] > cfg.window else 0
                x = Block(cfg.heads * 2**stage, cfg.window, shift, self.prec)(x)
        x = nn.LayerNorm(**kw)(x).mean(axis=(1, 2))
        return nn.Dense(cfg.classes, **kw)(x)

    def _merge(self, x: jax.Array, width: int) -> jax.Array:
        """Four neighbours side by side, projected to `width`."""
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return nn.Dense(width, use_bias=False, **kw)(nn.LayerNorm(**kw)(x))


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
    model = Swin(cfg, prec)
    tx = optimizer or optax.adamw(1e-3, weight_decay=0.05)

    def init(rng: jax.Array) -> State:
        image = jnp.zeros((1, cfg.image, cfg.image, 3), prec.param)
        params = model.init(rng, image)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        def loss_fn(params: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, batch["images"])
            labels = jax.nn.one_hot(batch["labels"], cfg.classes, dtype=prec.param)
            labels = optax.smooth_labels(labels, 0.1)
            return optax.softmax_cross_entropy(logits.astype(prec.param), labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return labelled_images(rng, cfg.batch, cfg.image, cfg.classes, prec.param)

    images = (cfg.batch, cfg.image, cfg.image, 3)
    shapes = {
        "images": jax.ShapeDtypeStruct(images, prec.param),
        "labels": ints(cfg.batch),
    }
    return make_model("swin", train_step, init, shapes, make_batch)
