"""T5-style encoder-decoder in flax linen, trained with adam.

RMS norm without bias, gated gelu, no scaling of the scores, one table of relative
position biases per stack shared by its layers (Raffel et al., arXiv 1910.10683).
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

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
    zipf_tokens,
)

PAD = 0


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch; `layers` is that of each stack."""

    vocab: int
    hidden: int
    ffn: int
    heads: int
    layers: int
    source: int
    target: int
    batch: int
    buckets: int = 32
    max_distance: int = 128


SIZES = {
    "tiny": Config(128, 64, 128, 8, layers=2, source=16, target=8, batch=16),
    "medium": Config(8192, 1024, 2048, 16, layers=4, source=256, target=128, batch=32),
    "large": Config(32128, 1024, 2816, 16, layers=24, source=512, target=128, batch=64),
}


def relative_buckets(
    queries: int, keys: int, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """The bucket `[queries, keys]` of each distance: exact up close, then by log.

    Computed with numpy, as it depends on shapes only.

    >>> relative_buckets(1, 4, bidirectional=True, buckets=8, max_distance=16)
    array([[0, 5, 6, 6]], dtype=int32)
    """
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = buckets * (distance > 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    log_steps = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    far = exact + (log_steps * (buckets - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(far, buckets - 1))
    return np.asarray(offset + bucket, np.int32)


class PositionBias(nn.Module):
    """A bias `[1, heads, queries, keys]` to add to the scores of every layer."""

    cfg: Config
    prec: Precision
    bidirectional: bool

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        buckets = relative_buckets(
            length,
            length,
            bidirectional=self.bidirectional,
            buckets=self.cfg.buckets,
            max_distance=self.cfg.max_distance,
        )
        table = self.param(
            "table",
            nn.initializers.normal(0.1),
            (self.cfg.buckets, self.cfg.heads),
            self.prec.param,
        )
        bias = jnp.take(table.astype(self.prec.compute), buckets, axis=0)
        return jnp.transpose(bias, (2, 0, 1))[None]


class Attention(nn.Module):
    """Multi-head attention of `x` to `memory`, unscaled, with an additive bias."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array, bias: jax.Array) -> jax.Array:
        cfg = self.cfg
        kw = {
            "dtype": self.prec.compute,
            "param_dtype": self.prec.param,
            "use_bias": False,
        }
        to_heads = (cfg.heads, cfg.hidden // cfg.heads)
        # The scale left out of the scores goes into the initial queries, as in T5.
        small = nn.initializers.normal((cfg.hidden * to_heads[1]) ** -0.5)
        q = nn.DenseGeneral(to_heads, kernel_init=small, name="q", **kw)(x)
        k = nn.DenseGeneral(to_heads, name="k", **kw)(memory)
        v = nn.DenseGeneral(to_heads, name="v", **kw)(memory)
        weights = nn.softmax(jnp.einsum("bqnd,bknd->bnqk", q, k) + bias, axis=-1)
        y = jnp.einsum("bnqk,bknd->bqnd", weights, v)
        return nn.DenseGeneral(cfg.hidden, axis=(-2, -1), name="o", **kw)(y)


class Layer(nn.Module):
    """Self-attention, cross-attention, gated feed-forward.

    `memory` is what the cross-attention reads, with its bias; an encoder has none.
    """

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        memory: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        y = nn.RMSNorm(**kw)(x)
        x = x + Attention(self.cfg, self.prec, name="self_attention")(y, y, bias)
        if memory is not None:
            y = nn.RMSNorm(**kw)(x)
            cross = Attention(self.cfg, self.prec, name="cross_attention")
            x = x + cross(y, *memory)
        y = nn.RMSNorm(**kw)(x)
        gate = nn.gelu(nn.Dense(self.cfg.ffn, use_bias=False, name="gate", **kw)(y))
        y = gate * nn.Dense(self.cfg.ffn, use_bias=False, name="up", **kw)(y)
        return x + nn.Dense(self.cfg.hidden, use_bias=False, name="down", **kw)(y)


class T5(nn.Module):
    """Source `[B, S]` and shifted target `[B, T]` to logits `[B, T, V]`."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        cfg, prec = self.cfg, self.prec
        kw = {"dtype": prec.compute, "param_dtype": prec.param}
        embed = nn.Embed(cfg.vocab, cfg.hidden, name="embed", **kw)

        padding = self._hide(source == PAD)[:, None, None, :]
        bias = PositionBias(cfg, prec, True, name="encoder_bias")(source.shape[1])
        x = embed(source)
        for i in range(cfg.layers):
            x = Layer(cfg, prec, name=f"encoder_{i}")(x, bias + padding)
        memory = nn.RMSNorm(name="encoder_norm", **kw)(x)

        length = target.shape[1]
        causal = self._hide(~np.tri(length, dtype=bool))
        bias = PositionBias(cfg, prec, False, name="decoder_bias")(length)
        x = embed(target)
        for i in range(cfg.layers):
            layer = Layer(cfg, prec, name=f"decoder_{i}")
            x = layer(x, bias + causal, (memory, padding))
        x = nn.RMSNorm(name="decoder_norm", **kw)(x)
        return nn.Dense(cfg.vocab, use_bias=False, name="head", **kw)(x)

    def _hide(self, mask: Any) -> jax.Array:
        return jnp.where(mask, -1e9, 0.0).astype(self.prec.compute)


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. `depth` is of each stack."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, layers=cfg.layers if depth is None else depth)
    model = T5(cfg, prec)
    tx = optimizer or optax.adam(1e-3)

    def init(rng: jax.Array) -> State:
        source = jnp.ones((1, cfg.source), jnp.int32)
        target = jnp.ones((1, cfg.target), jnp.int32)
        params = model.init(rng, source, target)["params"]
        return {"params": params, "opt_state": tx.init(params)}

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        # The decoder reads its own targets one step late.
        shifted = jnp.pad(batch["target"][:, :-1], ((0, 0), (1, 0)))
        logits: Any = model.apply({"params": params}, batch["source"], shifted)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(prec.param), batch["target"]
        )
        real = (batch["target"] != PAD).astype(prec.param)
        return jnp.sum(losses * real) / jnp.sum(real)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        def padded(length: int) -> np.ndarray:
            ids = 1 + zipf_tokens(rng, (cfg.batch, length), cfg.vocab - 1)
            lengths = rng.integers(length // 2, length + 1, (cfg.batch, 1))
            return np.where(np.arange(length) < lengths, ids, PAD).astype(np.int32)

        return {"source": padded(cfg.source), "target": padded(cfg.target)}

    shapes = {
        "source": ints(cfg.batch, cfg.source),
        "target": ints(cfg.batch, cfg.target),
    }
    return make_model("t5", train_step, init, shapes, make_batch)
