"""GPT in plain JAX, as users write it: one fused QKV product, cut by `jnp.split`.

Any sizes, so that they need not divide by the number of devices. Besides the whole
train step there is one attention block alone, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    precision,
    zipf_tokens,
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch."""

    hidden: int
    heads: int
    layers: int = 1
    vocab: int = 0
    batch: int = 1
    seq: int = 16
    dtype: str = "bfloat16"

    @property
    def train_flops(self) -> float:
        """Of the matrix products of one step, backward twice forward: 6 for every
        token and weight, 12 hidden a token and position of the sequence."""
        weights = 12 * self.layers * self.hidden**2 + self.vocab * self.hidden
        attention = 12 * self.layers * self.seq * self.hidden
        return float(self.batch * self.seq * (6 * weights + attention))


def wide(dtype: Any) -> Any:
    """The type in which sums over ``dtype`` are taken: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def attention(weights: Any, x: jax.Array, heads: int) -> jax.Array:
    """Causal self-attention, [batch, seq, hidden] to the same."""
    batch, seq, hidden = x.shape
    q, k, v = jnp.split(x @ weights["qkv"].astype(x.dtype), 3, axis=-1)
    q, k, v = (t.reshape(batch, seq, heads, hidden // heads) for t in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(hidden // heads)
    mask = jnp.tril(jnp.ones((seq, seq), bool))
    scores = jnp.where(mask, scores.astype(wide(x.dtype)), -1e30)
    probs = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", probs, v).reshape(batch, seq, hidden)
    return mixed @ weights["out"].astype(x.dtype)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm over the last dimension."""
    exact = x.astype(wide(x.dtype))
    mean = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
    return (exact * jax.lax.rsqrt(mean + 1e-6) * scale).astype(x.dtype)


def logits(params: Any, tokens: jax.Array, cfg: Config, prec: Precision) -> jax.Array:
    """[batch, seq, vocab]."""
    x = (params["embed"][tokens] + params["positions"]).astype(prec.compute)
    for layer in params["layers"]:
        x = x + attention(layer, norm(x, layer["norm1"]), cfg.heads)
        h = norm(x, layer["norm2"]) @ layer["up"].astype(x.dtype)
        x = x + jax.nn.gelu(h) @ layer["down"].astype(x.dtype)
    return norm(x, params["norm"]) @ params["head"].astype(x.dtype)


def gpt(cfg: Config) -> Model:
    """The whole train step: cross entropy, adamw."""
    prec = precision(cfg.dtype)
    optimizer = optax.adamw(1e-3)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        def loss_of(params: Any) -> jax.Array:
            scores = logits(params, batch["tokens"], cfg, prec).astype(prec.param)
            logs = jax.nn.log_softmax(scores)
            picked = jnp.take_along_axis(logs, batch["labels"][..., None], axis=-1)
            return -jnp.mean(picked)

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, slots = optimizer.update(grads, state["slots"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "slots": slots}, {"loss": loss}

    def init(rng: jax.Array) -> State:
        params = _gpt_params(rng, cfg, prec)
        return {"params": params, "slots": optimizer.init(params)}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        shape = cfg.batch, cfg.seq
        names = "tokens", "labels"
        return {name: zipf_tokens(rng, shape, cfg.vocab) for name in names}

    tokens = ints(cfg.batch, cfg.seq)
    shapes = {"tokens": tokens, "labels": tokens}
    return make_model("plain_gpt", train_step, init, shapes, make_batch)


def block(cfg: Config) -> Model:
    """One attention block alone, forward and backward, and a step of SGD.

    What comes in from other layers, and what comes back, are batch inputs, what goes
    to them metrics; parameters have the type of the activations.
    """
    dtype = precision(cfg.dtype).compute

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        out, back = jax.vjp(lambda w, x: attention(w, x, cfg.heads), state, batch["x"])
        grads, into = back(batch["cotangent"])
        params = jax.tree.map(lambda p, g: p - dtype(0.1) * g, state, grads)
        loss = jnp.mean(jnp.square(out.astype(wide(dtype))))
        return params, {"loss": loss, "out": out, "into": into}

    def init(rng: jax.Array) -> State:
        return _attention_params(rng, cfg.hidden, dtype)

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        shape = cfg.batch, cfg.seq, cfg.hidden
        names = "x", "cotangent"
        return {name: rng.standard_normal(shape).astype(dtype) for name in names}

    x = jax.ShapeDtypeStruct((cfg.batch, cfg.seq, cfg.hidden), dtype)
    return make_model("block", train_step, init, {"x": x, "cotangent": x}, make_batch)


def _gpt_params(rng: jax.Array, cfg: Config, prec: Precision) -> Any:
    size = cfg.hidden
    embed, positions, head, *rest = jax.random.split(rng, 3 + cfg.layers)
    ones = jnp.ones(size, prec.param)
    layers = []
    for key in rest:
        up, down, inner = jax.random.split(key, 3)
        layers.append(
            {
                **_attention_params(inner, size, prec.param),
                "up": _matrix(up, size, 4 * size, prec.param),
                "down": _matrix(down, 4 * size, size, prec.param),
                "norm1": ones,
                "norm2": ones,
            }
        )
    return {
        "embed": _matrix(embed, cfg.vocab, size, prec.param),
        "positions": _matrix(positions, cfg.seq, size, prec.param),
        "layers": layers,
        "norm": ones,
        "head": _matrix(head, size, cfg.vocab, prec.param),
    }


def _attention_params(rng: jax.Array, size: int, dtype: Any) -> Any:
    qkv, out = jax.random.split(rng)
    return {
        "qkv": _matrix(qkv, size, 3 * size, dtype),
        "out": _matrix(out, size, size, dtype),
    }


def _matrix(rng: jax.Array, rows: int, columns: int, dtype: Any) -> jax.Array:
    return jax.random.normal(rng, (rows, columns), dtype) * 0.02
