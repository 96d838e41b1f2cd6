"""GPT in flax nnx: layers unrolled, one fused QKV projection, untied head, adamw.

The step is functional: `nnx.split` once outside, `nnx.merge` inside, state returned.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

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
    "medium": Config(vocab=8192, hidden=1024, heads=16, layers=4, seq=256, batch=32),
    "large": Config(vocab=51200, hidden=2048, heads=32, layers=24, seq=1024, batch=32),
}


class Attention(nnx.Module):
    """Causal self-attention with a fused `[H, 3H]` projection."""

    def __init__(self, cfg: Config, prec: Precision, rngs: nnx.Rngs) -> None:
        self.heads = cfg.heads
        kw = {"dtype": prec.compute, "param_dtype": prec.param, "rngs": rngs}
        self.qkv = nnx.Linear(cfg.hidden, 3 * cfg.hidden, **kw)
        self.out = nnx.Linear(cfg.hidden, cfg.hidden, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, s, h = x.shape
        q, k, v = (
            part.reshape(b, s, self.heads, h // self.heads)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k) / (h // self.heads) ** 0.5
        causal = jnp.tril(jnp.ones((s, s), dtype=bool))
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        return self.out(jnp.einsum("bnqk,bknd->bqnd", weights, v).reshape(b, s, h))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: Config, prec: Precision, rngs: nnx.Rngs) -> None:
        kw = {"dtype": prec.compute, "param_dtype": prec.param, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(cfg.hidden, **kw)
        self.attention = Attention(cfg, prec, rngs)
        self.norm2 = nnx.LayerNorm(cfg.hidden, **kw)
        self.fc1 = nnx.Linear(cfg.hidden, 4 * cfg.hidden, **kw)
        self.fc2 = nnx.Linear(4 * cfg.hidden, cfg.hidden, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class GPT(nnx.Module):
    """Decoder-only language model: tokens `[B, S]` to logits `[B, S, V]`."""

    def __init__(self, cfg: Config, prec: Precision, rngs: nnx.Rngs) -> None:
        kw = {"dtype": prec.compute, "param_dtype": prec.param, "rngs": rngs}
        self.tokens = nnx.Embed(cfg.vocab, cfg.hidden, **kw)
        self.positions = nnx.Embed(cfg.seq, cfg.hidden, **kw)
        self.blocks = nnx.List([Block(cfg, prec, rngs) for _ in range(cfg.layers)])
        self.norm = nnx.LayerNorm(cfg.hidden, **kw)
        self.head = nnx.Linear(cfg.hidden, cfg.vocab, use_bias=False, **kw)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


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
    tx = optimizer or optax.adamw(1e-3, weight_decay=0.1)

    def create(rng: jax.Array) -> tuple[GPT, nnx.Optimizer[GPT]]:
        model = GPT(cfg, prec, nnx.Rngs(rng))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    abstract = _abstract(cfg, prec, tx)
    graphdef = nnx.graphdef(abstract)

    def init(rng: jax.Array) -> State:
        return nnx.state(create(rng))

    def loss_fn(model: GPT, batch: Batch) -> jax.Array:
        logits = model(batch["inputs"]).astype(prec.param)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        return jnp.mean(losses)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        model, opt = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        opt.update(model, grads)
        return nnx.state((model, opt)), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = zipf_tokens(rng, (cfg.batch, cfg.seq + 1), cfg.vocab)
        return {"inputs": text[:, :-1], "targets": text[:, 1:]}

    tokens = ints(cfg.batch, cfg.seq)
    return make_model(
        "gpt_unrolled",
        train_step,
        init,
        {"inputs": tokens, "targets": tokens},
        make_batch,
        nnx.state(abstract),
    )


def _abstract(
    cfg: Config, prec: Precision, tx: optax.GradientTransformation
) -> tuple[GPT, nnx.Optimizer[GPT]]:
    """The model and its optimizer as shapes, block by block.

    Flax looks up ``hasattr(tracer, "sharding")`` for every variable, and JAX walks the
    whole trace to say no: in one trace 96 layers take eight minutes, so ten seconds.
    """

    def block() -> Block:
        return Block(cfg, prec, nnx.Rngs(0))

    model = nnx.eval_shape(lambda: GPT(replace(cfg, layers=0), prec, nnx.Rngs(0)))
    model.blocks = nnx.List([nnx.eval_shape(block) for _ in range(cfg.layers)])
    return model, nnx.eval_shape(
        lambda held: nnx.Optimizer(held, tx, wrt=nnx.Param), model
    )
