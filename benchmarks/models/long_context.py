"""A decoder for long sequences in plain JAX, as papers on long contexts train it.

Layers scanned and rematerialized, rotary positions, grouped query heads, gated MLP,
tied embedding, adamw. Attention is ``jax.nn.dot_product_attention``, cuDNN's unless
asked otherwise. Not one of the zoo's: it compares plans for one long sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
    zipf_tokens,
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    depth: int
    inner: int
    layers: int
    seq: int
    batch: int = 1


SIZES = {
    "tiny": Config(128, 64, 8, 4, 8, 128, layers=2, seq=64),
    "1B": Config(50304, 2048, 16, 8, 128, 5632, layers=20, seq=131072),
    "1B, 3 heads": Config(50304, 2048, 3, 3, 128, 5632, layers=20, seq=131072),
    "22B": Config(50304, 6144, 48, 48, 128, 16384, layers=48, seq=131072),
}
"""Three heads are too few for eight devices: their sequence goes around a ring."""


def init(cfg: Config, rng: jax.Array) -> Any:
    """float32 parameters, those of all layers stacked."""
    shapes = {
        "query": (cfg.hidden, cfg.heads, cfg.depth),
        "key": (cfg.hidden, cfg.kv_heads, cfg.depth),
        "value": (cfg.hidden, cfg.kv_heads, cfg.depth),
        "out": (cfg.heads, cfg.depth, cfg.hidden),
        "gate": (cfg.hidden, cfg.inner),
        "up": (cfg.hidden, cfg.inner),
        "down": (cfg.inner, cfg.hidden),
    }
    keys = iter(jax.random.split(rng, len(shapes) + 1))
    layers: dict[str, Any] = {
        name: 0.02 * jax.random.normal(next(keys), (cfg.layers, *shape))
        for name, shape in shapes.items()
    }
    for name in ("before_attention", "before_mlp"):
        layers[name] = jnp.ones((cfg.layers, cfg.hidden))
    embed = 0.02 * jax.random.normal(next(keys), (cfg.vocab, cfg.hidden))
    return {"embed": embed, "layers": layers, "last": jnp.ones(cfg.hidden)}


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions (Su et al., 2021) for [batch, sequence, heads, depth]."""
    half = x.shape[-1] // 2
    speed = 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * speed
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate(
        [left * cos - right * sin, right * cos + left * sin], axis=-1
    )
    return turned.astype(x.dtype)


def loss_of(params: Any, batch: Batch, implementation: str) -> jax.Array:
    """Mean cross entropy of the next token; bfloat16 but for norms and the loss."""

    def low(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16)

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        y = normed(x, p["before_attention"])
        q, k, v = (
            jnp.einsum("bsd,dnh->bsnh", y, low(p[name]))
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(
            rotated(q), rotated(k), v, is_causal=True, implementation=implementation
        )
        x = x + jnp.einsum("bsnh,nhd->bsd", y, low(p["out"]))
        y = normed(x, p["before_mlp"])
        y = jax.nn.silu(y @ low(p["gate"])) * (y @ low(p["up"]))
        return x + y @ low(p["down"]), None

    x = low(params["embed"])[batch["inputs"]]
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    logits = normed(x, params["last"]) @ low(params["embed"]).T
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch["targets"]
    )
    return jnp.mean(losses)


def build(
    size: str = "tiny",
    *,
    implementation: str = "cudnn",
    optimizer: optax.GradientTransformation | None = None,
    heads: tuple[int, int] | None = None,
) -> Model:
    """Build the model.

    Args:
        implementation: of ``jax.nn.dot_product_attention``: ``"cudnn"`` or ``"xla"``.
        optimizer: in place of adamw.
        heads: how many of queries and of keys, in place of the size's.
    """
    cfg = pick(SIZES, size)
    if heads is not None:
        cfg = replace(cfg, heads=heads[0], kv_heads=heads[1])
    tx = optimizer or optax.adamw(1e-3)

    def start(rng: jax.Array) -> State:
        params = init(cfg, rng)
        return {"params": params, "opt_state": tx.init(params)}

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = state["params"]
        loss, grads = jax.value_and_grad(loss_of)(params, batch, implementation)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state}, {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = zipf_tokens(rng, (cfg.batch, cfg.seq + 1), cfg.vocab)
        return {"inputs": text[:, :-1], "targets": text[:, 1:]}

    tokens = ints(cfg.batch, cfg.seq)
    shapes = {"inputs": tokens, "targets": tokens}
    return make_model("long_context", train_step, start, shapes, make_batch)
