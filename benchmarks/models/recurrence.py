"""Hawk in equinox: gated linear recurrences by an associative scan over time, adamw.

Every block is a causal convolution of width 4, a real-gated linear recurrence and a
gated MLP (De et al., arXiv 2402.19427). Layers are stacked, scanned, rematerialized.
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
class Config:
    """Sizes; `recurrent` channels have gates within `heads` groups of them."""

    vocab: int
    width: int
    recurrent: int
    ffn: int
    heads: int
    layers: int
    seq: int
    batch: int


SIZES = {
    "tiny": Config(128, 32, 64, 64, heads=4, layers=2, seq=16, batch=16),
    "medium": Config(8192, 512, 768, 1536, heads=8, layers=4, seq=256, batch=32),
    "large": Config(
        32768, 2048, 2560, 6144, heads=16, layers=24, seq=2048, batch=64
    ),
}  # fmt: skip


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A weight whose second last dimension is what it sums over."""
    return jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5


class Recurrence(eqx.Module):
    """`h = a h + sqrt(1 - a^2) (i x)`, with `a` and `i` gated by `x` `[T, R]`."""

    gate: jax.Array
    decay: jax.Array
    rate: jax.Array

    def __init__(self, cfg: Config, dtype: Any, key: jax.Array) -> None:
        k1, k2 = jax.random.split(key)
        each = cfg.recurrent // cfg.heads
        self.gate = normal(k1, (cfg.heads, each, each), dtype)
        self.decay = normal(k2, (cfg.heads, each, each), dtype)
        self.rate = jnp.linspace(0.5, 4.0, cfg.recurrent, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        groups = x.reshape(x.shape[0], *self.gate.shape[:2])
        gate, decay = (
            jax.nn.sigmoid(jnp.einsum("thd,hde->the", groups, w)).reshape(x.shape)
            for w in (self.gate, self.decay)
        )
        log_a = -8.0 * decay * jax.nn.softplus(-self.rate)
        a = jnp.exp(log_a)
        b = jnp.sqrt(-jnp.expm1(2 * log_a)) * (gate * x)

        def join(
            before: tuple[jax.Array, jax.Array], after: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            return before[0] * after[0], after[0] * before[1] + after[1]

        return jax.lax.associative_scan(join, (a, b))[1]


class Block(eqx.Module):
    """Recurrent mixing over time, then a gated MLP, on `[T, H]`."""

    norm1: jax.Array
    branch: jax.Array
    gate: jax.Array
    conv: jax.Array
    recurrence: Recurrence
    out: jax.Array
    norm2: jax.Array
    up: jax.Array
    up_gate: jax.Array
    down: jax.Array

    def __init__(self, cfg: Config, dtype: Any, key: jax.Array) -> None:
        keys = jax.random.split(key, 8)
        h, r, f = cfg.width, cfg.recurrent, cfg.ffn
        self.norm1, self.norm2 = jnp.ones(h, dtype), jnp.ones(h, dtype)
        self.branch = normal(keys[0], (h, r), dtype)
        self.gate = normal(keys[1], (h, r), dtype)
        self.conv = normal(keys[2], (4, r), dtype)
        self.recurrence = Recurrence(cfg, dtype, keys[3])
        self.out = normal(keys[4], (r, h), dtype)
        self.up = normal(keys[5], (h, f), dtype)
        self.up_gate = normal(keys[6], (h, f), dtype)
        self.down = normal(keys[7], (f, h), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = rms_norm(x, self.norm1)
        gate = jax.nn.gelu(y @ self.gate)
        y = self.recurrence(causal_conv(y @ self.branch, self.conv))
        x = x + (y * gate) @ self.out
        y = rms_norm(x, self.norm2)
        return x + (jax.nn.gelu(y @ self.up_gate) * (y @ self.up)) @ self.down


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Each row over its root mean square."""
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6) * scale


def causal_conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """Each channel of `[T, R]` with its own filter over the last rows."""
    width = w.shape[0]
    padded = jnp.pad(x, ((width - 1, 0), (0, 0)))
    parts = (padded[i : i + x.shape[0]] * w[i] for i in range(width))
    return sum(parts, jnp.zeros_like(x))


class Hawk(eqx.Module):
    """Tokens `[T]` to logits `[T, V]`; blocks are stacked along a first dimension."""

    embed: jax.Array
    blocks: Block
    norm: jax.Array

    def __init__(self, cfg: Config, dtype: Any, key: jax.Array) -> None:
        k1, k2 = jax.random.split(key)
        self.embed = 0.02 * jax.random.normal(k1, (cfg.vocab, cfg.width), dtype)
        keys = jax.random.split(k2, cfg.layers)
        self.blocks = eqx.filter_vmap(lambda k: Block(cfg, dtype, k))(keys)
        self.norm = jnp.ones(cfg.width, dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(x), None

        x = self.embed[tokens] * self.embed.shape[1] ** 0.5
        x, _ = jax.lax.scan(layer, x, self.blocks)
        return rms_norm(x, self.norm) @ self.embed.T


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
    tx = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def init(rng: jax.Array) -> State:
        model = Hawk(cfg, prec.param, rng)
        return model, tx.init(model)

    def loss_fn(model: Hawk, batch: Batch) -> jax.Array:
        cast = jax.tree.map(lambda p: p.astype(prec.compute), model)
        logits = jax.vmap(cast)(batch["inputs"]).astype(prec.param)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        return jnp.mean(losses)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        model, opt_state = state
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, opt_state = tx.update(grads, opt_state, model)
        return (eqx.apply_updates(model, updates), opt_state), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = zipf_tokens(rng, (cfg.batch, cfg.seq + 1), cfg.vocab)
        return {"inputs": text[:, :-1], "targets": text[:, 1:]}

    tokens = ints(cfg.batch, cfg.seq)
    shapes = {"inputs": tokens, "targets": tokens}
    return make_model("recurrence", train_step, init, shapes, make_batch)
