"""The decoder that `lora` and `decode` share, in plain JAX: Llama 2, layers stacked.

RMS norm, rotary positions, grouped queries, gated MLP (Touvron et al., arXiv
2307.09288). Parameters of all layers are stacked, to be scanned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Sizes of the model, of the global batch, and of a row of it."""

    vocab: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    seq: int
    batch: int
    rank: int = 16

    @property
    def head(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Weights of one layer; what each sums over comes first."""
        h, d = self.hidden, self.head
        return {
            "q": (h, self.heads, d),
            "k": (h, self.kv_heads, d),
            "v": (h, self.kv_heads, d),
            "o": (self.heads, d, h),
            "gate": (h, self.ffn),
            "up": (h, self.ffn),
            "down": (self.ffn, h),
        }


def init_params(rng: jax.Array, cfg: Config, dtype: Any) -> Params:
    """Parameters of the whole model; those of `layers` have a first dimension more."""
    keys = iter(jax.random.split(rng, len(cfg.shapes) + 2))
    norm = jnp.ones((cfg.layers, cfg.hidden), dtype)
    layers = {
        name: 0.02 * jax.random.normal(next(keys), (cfg.layers, *shape), dtype)
        for name, shape in cfg.shapes.items()
    }
    table = (cfg.vocab, cfg.hidden)
    return {
        "embed": jax.random.normal(next(keys), table, dtype),
        "layers": {**layers, "norm1": norm, "norm2": norm},
        "norm": jnp.ones(cfg.hidden, dtype),
        "head": 0.02 * jax.random.normal(next(keys), table[::-1], dtype),
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Over the last dimension; the mean in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Heads `[B, S, N, D]` turned by their positions `[B, S]` or `[1, S]`."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** -(jnp.arange(half, dtype=x.dtype) / half)
    angles = positions[..., None, None].astype(x.dtype) * rates
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


Project = Callable[[str, jax.Array], jax.Array]


def queries_keys_values(
    project: Project, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of normalized `[B, S, H]`, by a function that multiplies with a named weight."""
    q, k = (rotated(project(name, x), positions) for name in ("q", "k"))
    return q, k, project("v", x)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Grouped attention `[B, Q, N, D]` to `[B, K, KV, D]`, where `seen` `[B, Q, K]`."""
    b, s, n, d = q.shape
    q = q.reshape(b, s, k.shape[2], n // k.shape[2], d)
    scores = jnp.einsum("bqgnd,bkgd->bgnqk", q, k) * d**-0.5
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], wide, -1e30), axis=-1)
    y = jnp.einsum("bgnqk,bkgd->bqgnd", weights.astype(q.dtype), v)
    return y.reshape(b, s, n, d)


def mlp(layer: Params, x: jax.Array) -> jax.Array:
    """Gated feed-forward of `[B, S, H]`."""
    return (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
