"""CLIP in equinox: an image tower, a text tower, and a loss between all pairs.

Modules work on one example and are mapped over the batch, as equinox has it. A text
is what stands at its last token (Radford et al., arXiv 2103.00020).
"""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
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
    make_model,
    pick,
    precision,
    zipf_tokens,
)


@dataclass(frozen=True)
class Tower:
    """Sizes of one transformer."""

    width: int
    heads: int
    layers: int


@dataclass(frozen=True)
class Config:
    """Sizes of both towers, of what they read, and of the space where they meet."""

    image: int
    patch: int
    vision: Tower
    vocab: int
    seq: int
    text: Tower
    embed: int
    batch: int


SIZES = {
    "tiny": Config(
        16, 4, Tower(64, 8, 2), vocab=128, seq=8, text=Tower(32, 4, 2), embed=32,
        batch=16,
    ),
    "medium": Config(
        64, 8, Tower(1024, 16, 4), vocab=8192, seq=64, text=Tower(512, 8, 4),
        embed=512, batch=64,
    ),
    "large": Config(
        224, 14, Tower(1024, 16, 24), vocab=49408, seq=77, text=Tower(768, 12, 12),
        embed=768, batch=1024,
    ),
}  # fmt: skip


class Block(eqx.Module):
    """Pre-norm transformer block on `[S, H]`."""

    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, cfg: Tower, dtype: Any, key: jax.Array) -> None:
        k1, k2, k3 = jax.random.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(cfg.width, dtype=dtype)
        self.attention = eqx.nn.MultiheadAttention(
            cfg.heads, cfg.width, dtype=dtype, key=k1
        )
        self.norm2 = eqx.nn.LayerNorm(cfg.width, dtype=dtype)
        self.up = eqx.nn.Linear(cfg.width, 4 * cfg.width, dtype=dtype, key=k2)
        self.down = eqx.nn.Linear(4 * cfg.width, cfg.width, dtype=dtype, key=k3)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask)
        y = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        y = y * jax.nn.sigmoid(1.702 * y)
        return x + jax.vmap(self.down)(y)


class CLIP(eqx.Module):
    """One image `[3, I, I]` and one text `[S]` to two vectors of length one."""

    patches: eqx.nn.Conv2d
    image_places: jax.Array
    image_blocks: list[Block]
    image_norm: eqx.nn.LayerNorm
    image_out: eqx.nn.Linear
    words: eqx.nn.Embedding
    text_places: jax.Array
    text_blocks: list[Block]
    text_norm: eqx.nn.LayerNorm
    text_out: eqx.nn.Linear
    log_scale: jax.Array

    def __init__(self, cfg: Config, dtype: Any, key: jax.Array) -> None:
        keys = iter(jax.random.split(key, 6 + cfg.vision.layers + cfg.text.layers))
        see, read = cfg.vision.width, cfg.text.width
        count = (cfg.image // cfg.patch) ** 2
        self.patches = eqx.nn.Conv2d(
            3, see, cfg.patch, cfg.patch, use_bias=False, dtype=dtype, key=next(keys)
        )
        shape = (count, see)
        self.image_places = 0.02 * jax.random.normal(next(keys), shape, dtype)
        self.image_blocks = [
            Block(cfg.vision, dtype, next(keys)) for _ in range(cfg.vision.layers)
        ]
        self.image_norm = eqx.nn.LayerNorm(see, dtype=dtype)
        self.image_out = _out(see, cfg.embed, dtype, next(keys))
        self.words = eqx.nn.Embedding(
            weight=0.02 * jax.random.normal(next(keys), (cfg.vocab, read), dtype)
        )
        shape = (cfg.seq, read)
        self.text_places = 0.02 * jax.random.normal(next(keys), shape, dtype)
        self.text_blocks = [
            Block(cfg.text, dtype, next(keys)) for _ in range(cfg.text.layers)
        ]
        self.text_norm = eqx.nn.LayerNorm(read, dtype=dtype)
        self.text_out = _out(read, cfg.embed, dtype, next(keys))
        self.log_scale = jnp.asarray(np.log(1 / 0.07), dtype)

    def see(self, image: jax.Array) -> jax.Array:
        """The vector of an image."""
        x = self.patches(image)
        x = x.reshape(x.shape[0], -1).T + self.image_places
        for block in self.image_blocks:
            x = block(x, None)
        x = jax.vmap(self.image_norm)(x)
        return _unit(self.image_out(x.mean(axis=0)))

    def read(self, tokens: jax.Array) -> jax.Array:
        """The vector of a text: the largest token of all is its end."""
        x = jax.vmap(self.words)(tokens) + self.text_places
        causal = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
        for block in self.text_blocks:
            x = block(x, causal)
        x = jax.vmap(self.text_norm)(x)
        return _unit(self.text_out(x[jnp.argmax(tokens)]))


def _out(width: int, embed: int, dtype: Any, key: jax.Array) -> eqx.nn.Linear:
    return eqx.nn.Linear(width, embed, use_bias=False, dtype=dtype, key=key)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x)


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. `depth` is of each tower."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    if depth is not None:
        towers = (replace(tower, layers=depth) for tower in (cfg.vision, cfg.text))
        cfg = replace(cfg, **dict(zip(("vision", "text"), towers, strict=True)))
    tx = optimizer or optax.adamw(5e-4, b2=0.98, eps=1e-6, weight_decay=0.2)

    def make(key: jax.Array) -> CLIP:
        return CLIP(cfg, prec.param, key)

    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    _, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def init(rng: jax.Array) -> State:
        params = eqx.filter(make(rng), eqx.is_array)
        return params, tx.init(params)

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        cast = jax.tree.map(lambda p: p.astype(prec.compute), params)
        model = eqx.combine(cast, static)
        seen = jax.vmap(model.see)(batch["images"].astype(prec.compute))
        read = jax.vmap(model.read)(batch["tokens"])
        logits = (seen @ read.T).astype(prec.param) * jnp.exp(params.log_scale)
        labels = jnp.arange(logits.shape[0])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        by_image = cross_entropy(logits, labels).mean()
        by_text = cross_entropy(logits.T, labels).mean()
        return (by_image + by_text) / 2

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, opt_state = state
        loss, grads = eqx.filter_value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (eqx.apply_updates(params, updates), opt_state), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        tokens = zipf_tokens(rng, (cfg.batch, cfg.seq), cfg.vocab - 1)
        length = rng.integers(cfg.seq // 2, cfg.seq, cfg.batch)
        tokens[np.arange(cfg.batch), length] = cfg.vocab - 1
        noise = rng.standard_normal((cfg.batch, 3, cfg.image, cfg.image))
        tint = tokens[:, :3, None, None] / cfg.vocab
        return {"images": (tint + noise).astype(prec.param), "tokens": tokens}

    images = (cfg.batch, 3, cfg.image, cfg.image)
    batch_shapes = {
        "images": jax.ShapeDtypeStruct(images, prec.param),
        "tokens": ints(cfg.batch, cfg.seq),
    }
    return make_model("clip", train_step, init, batch_shapes, make_batch)
