"""GPT in flax linen: layers scanned and rematerialized, tied embedding, clip + adamw.

Queries, keys and values have projections of their own, straight to heads.
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


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch."""

    vocab: int
    hidden: int
    heads: int
    layers: int
    seq: int
    batch: int


SIZES = {
    "tiny": Config(vocab=128, hidden=64, heads=8, layers=2, seq=16, batch=16),
    "small": Config(vocab=512, hidden=256, heads=8, layers=2, seq=128, batch=16),
    "medium": Config(vocab=8192, hidden=1024, heads=16, layers=4, seq=256, batch=32),
    "large": Config(vocab=51200, hidden=2048, heads=32, layers=24, seq=1024, batch=64),
    "7B": Config(vocab=51200, hidden=4096, heads=32, layers=32, seq=2048, batch=64),
    "70B": Config(vocab=51200, hidden=8192, heads=64, layers=80, seq=2048, batch=64),
    "175B": Config(vocab=51200, hidden=12288, heads=96, layers=96, seq=2048, batch=64),
    # The same with a batch for a thousand devices and more: 4 million tokens.
    "175B-pod": Config(
        vocab=51200, hidden=12288, heads=96, layers=96, seq=2048, batch=2048
    ),
}


class Block(nn.Module):
    """Pre-norm block in the `(carry, out)` form that `nn.scan` asks for."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        to_heads = (cfg.heads, cfg.hidden // cfg.heads)

        y = nn.LayerNorm(**kw)(x)
        q = nn.DenseGeneral(to_heads, name="query", **kw)(y)
        k = nn.DenseGeneral(to_heads, name="key", **kw)(y)
        v = nn.DenseGeneral(to_heads, name="value", **kw)(y)
        y = nn.dot_product_attention(q, k, v, mask=mask, dtype=self.prec.compute)
        x = x + nn.DenseGeneral(cfg.hidden, axis=(-2, -1), name="out", **kw)(y)

        y = nn.LayerNorm(**kw)(x)
        y = nn.gelu(nn.Dense(4 * cfg.hidden, name="up", **kw)(y))
        return x + nn.Dense(cfg.hidden, name="down", **kw)(y), None


class GPT(nn.Module):
    """Decoder-only language model: tokens `[B, S]` to logits `[B, S, V]`."""

    cfg: Config
    prec: Precision
    remat: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        embed = nn.Embed(cfg.vocab, cfg.hidden, name="embed", **kw)
        positions = self.param(
            "positions",
            nn.initializers.normal(0.02),
            (cfg.seq, cfg.hidden),
            self.prec.param,
        )
        x = embed(tokens) + positions.astype(self.prec.compute)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.layers,
        )
        mask = nn.make_causal_mask(tokens, dtype=bool)
        x, _ = layers(cfg, self.prec, name="layers")(x, mask)
        return embed.attend(nn.LayerNorm(**kw)(x))


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
    remat: bool = True,
) -> Model:
    """Build the model; see `benchmarks.models.build`.

    `remat=False` saves what the backward pass reads.
    """
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, layers=cfg.layers if depth is None else depth)
    model = GPT(cfg, prec, remat)
    tx = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def init(rng: jax.Array) -> State:
        params = model.init(rng, jnp.zeros((1, cfg.seq), jnp.int32))["params"]
        return {"params": params, "opt_state": tx.init(params)}

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch["inputs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(prec.param), batch["targets"]
        )
        return jnp.mean(losses)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = state["params"]
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return {"params": params, "opt_state": opt_state}, metrics

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = zipf_tokens(rng, (cfg.batch, cfg.seq + 1), cfg.vocab)
        return {"inputs": text[:, :-1], "targets": text[:, 1:]}

    tokens = ints(cfg.batch, cfg.seq)
    return make_model(
        "gpt_scanned",
        train_step,
        init,
        {"inputs": tokens, "targets": tokens},
        make_batch,
    )
