"""BERT in flax linen: masked words and next sentences, dropout, adamw with warm-up.

Words are predicted at the masked positions alone, gathered by their indices, by the
transposed embedding (Devlin et al., arXiv 1810.04805). Biases and norms do not decay.
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
    zipf_tokens,
)

PAD = 0


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch; `masked` words a row are asked."""

    vocab: int
    hidden: int
    heads: int
    layers: int
    seq: int
    masked: int
    batch: int
    dropout: float = 0.1


SIZES = {
    "tiny": Config(128, 64, 8, layers=2, seq=16, masked=4, batch=16),
    "medium": Config(8192, 1024, 16, layers=4, seq=256, masked=40, batch=32),
    "large": Config(30522, 1024, 16, layers=24, seq=512, masked=80, batch=256),
}


class Layer(nn.Module):
    """Post-norm encoder layer with dropout of weights, and of what is added."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        drop = nn.Dropout(cfg.dropout, deterministic=False)
        attention = nn.MultiHeadDotProductAttention(
            cfg.heads, dropout_rate=cfg.dropout, deterministic=False, **kw
        )
        x = nn.LayerNorm(epsilon=1e-12, **kw)(x + drop(attention(x, mask=mask)))
        y = nn.Dense(4 * cfg.hidden, name="up", **kw)(x)
        y = nn.Dense(cfg.hidden, name="down", **kw)(nn.gelu(y, approximate=False))
        return nn.LayerNorm(epsilon=1e-12, **kw)(x + drop(y))


class Bert(nn.Module):
    """Logits `[B, masked, V]` of words and `[B, 2]` of whether sentences follow."""

    cfg: Config
    prec: Precision

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg
        kw = {"dtype": self.prec.compute, "param_dtype": self.prec.param}
        words = nn.Embed(cfg.vocab, cfg.hidden, name="words", **kw)
        places = nn.Embed(cfg.seq, cfg.hidden, name="places", **kw)
        kinds = nn.Embed(2, cfg.hidden, name="kinds", **kw)
        x = words(batch["tokens"]) + places(jnp.arange(cfg.seq)) + kinds(batch["kinds"])
        x = nn.LayerNorm(epsilon=1e-12, **kw)(x)
        x = nn.Dropout(cfg.dropout, deterministic=False)(x)
        there = batch["tokens"] != PAD
        mask = nn.make_attention_mask(there, there, dtype=bool)
        for _ in range(cfg.layers):
            x = Layer(cfg, self.prec)(x, mask)

        y = jnp.take_along_axis(x, batch["positions"][..., None], axis=1)
        y = nn.gelu(nn.Dense(cfg.hidden, **kw)(y), approximate=False)
        y = words.attend(nn.LayerNorm(epsilon=1e-12, **kw)(y))
        bias = self.param("bias", nn.initializers.zeros, (cfg.vocab,), self.prec.param)
        pooled = nn.tanh(nn.Dense(cfg.hidden, name="pooler", **kw)(x[:, 0]))
        follows = nn.Dense(2, name="follows", **kw)(pooled)
        return y + bias.astype(y.dtype), follows


def decays(params: Any) -> Any:
    """Which parameters decay: the matrices."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


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
    model = Bert(cfg, prec)
    rate = optax.warmup_cosine_decay_schedule(1e-4, 1e-3, 100, 10_000)
    tx = optimizer or optax.adamw(rate, weight_decay=0.01, mask=decays)
    text, asked = ints(cfg.batch, cfg.seq), ints(cfg.batch, cfg.masked)
    shapes = {
        "tokens": text,
        "kinds": text,
        "positions": asked,
        "targets": asked,
        "follows": ints(cfg.batch),
    }

    def init(rng: jax.Array) -> State:
        row = {k: jnp.zeros((1, *s.shape[1:]), s.dtype) for k, s in shapes.items()}
        params = model.init({"params": rng, "dropout": rng}, row)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        dropout = jax.random.fold_in(jax.random.key(0), state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
            words, follows = state.apply_fn(
                {"params": params}, batch, rngs={"dropout": dropout}
            )
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            losses = cross_entropy(words.astype(prec.param), batch["targets"])
            asked = (batch["targets"] != PAD).astype(prec.param)
            of_words = jnp.sum(losses * asked) / jnp.sum(asked)
            losses = cross_entropy(follows.astype(prec.param), batch["follows"])
            of_sentences = jnp.mean(losses)
            parts = {"words": of_words, "sentences": of_sentences}
            return of_words + of_sentences, parts

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, parts), grads = grad_fn(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss, **parts}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        tokens = zipf_tokens(rng, (cfg.batch, cfg.seq), cfg.vocab - 1) + 1
        length = rng.integers(cfg.seq // 2, cfg.seq + 1, (cfg.batch, 1))
        place = np.arange(cfg.seq)
        tokens = np.where(place < length, tokens, PAD).astype(np.int32)
        masked = cfg.masked
        order = rng.permuted(np.tile(place, (cfg.batch, 1)), axis=1)[:, :masked]
        positions = np.sort(order, axis=1).astype(np.int32)
        targets = np.take_along_axis(tokens, positions, axis=1)
        np.put_along_axis(tokens, positions, np.where(targets == PAD, PAD, 1), axis=1)
        return {
            "tokens": tokens,
            "kinds": (place >= length // 2).astype(np.int32),
            "positions": positions,
            "targets": targets,
            "follows": rng.integers(0, 2, cfg.batch, dtype=np.int32),
        }

    return make_model("bert", train_step, init, shapes, make_batch)
