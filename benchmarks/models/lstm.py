"""LSTM language model in haiku: a scan over time, adagrad, truncated backpropagation.

The recurrent state goes from step to step. `large` is BIG LSTM of Jozefowicz et al.,
arXiv 1602.02410 (8192 units projected to 1024), with the whole softmax.
"""

from dataclasses import dataclass, replace
from typing import Any

import haiku as hk
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
    """Sizes of the model and of the global batch; `width` is that between layers."""

    vocab: int
    width: int
    hidden: int
    layers: int
    seq: int
    batch: int


SIZES = {
    "tiny": Config(128, 32, 64, layers=2, seq=8, batch=16),
    "medium": Config(8192, 512, 2048, layers=2, seq=20, batch=128),
    "large": Config(793_472, 1024, 8192, layers=2, seq=20, batch=1024),
}


class ProjectedLSTM(hk.RNNCore):
    """An LSTM whose hidden state is projected from `hidden` to `width`."""

    def __init__(self, hidden: int, width: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.hidden, self.width = hidden, width

    def __call__(
        self, inputs: jax.Array, state: hk.LSTMState
    ) -> tuple[jax.Array, hk.LSTMState]:
        joined = jnp.concatenate([inputs, state.hidden], axis=-1)
        i, g, f, o = jnp.split(hk.Linear(4 * self.hidden)(joined), 4, axis=-1)
        kept = jax.nn.sigmoid(f + 1) * state.cell
        cell = kept + jax.nn.sigmoid(i) * jnp.tanh(g)
        out = jax.nn.sigmoid(o) * jnp.tanh(cell)
        out = hk.Linear(self.width, with_bias=False)(out)
        return out, hk.LSTMState(hidden=out, cell=cell)

    def initial_state(self, batch_size: int | None) -> hk.LSTMState:
        assert batch_size is not None
        return hk.LSTMState(
            hidden=jnp.zeros((batch_size, self.width)),
            cell=jnp.zeros((batch_size, self.hidden)),
        )


def make_core(cfg: Config) -> hk.RNNCore:
    """All layers, one reading the other."""
    return hk.DeepRNN([ProjectedLSTM(cfg.hidden, cfg.width) for _ in range(cfg.layers)])


def forward(tokens: jax.Array, state: Any, cfg: Config) -> tuple[jax.Array, Any]:
    """Tokens `[B, T]` and the state to logits `[T, B, V]` and the state after."""
    table = hk.get_parameter(
        "embed",
        (cfg.vocab, cfg.width),
        state[0].cell.dtype,
        hk.initializers.RandomNormal(0.1),
    )
    x = table[tokens.T]
    x, state = hk.dynamic_unroll(make_core(cfg), x, state)
    return hk.Linear(cfg.vocab)(x), state


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
    net = hk.without_apply_rng(hk.transform(lambda x, s: forward(x, s, cfg)))
    tx = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adagrad(0.2))

    def first_state(batch: int, dtype: Any) -> Any:
        cell = jnp.zeros((batch, cfg.hidden), dtype)
        hidden = jnp.zeros((batch, cfg.width), dtype)
        return tuple(hk.LSTMState(hidden=hidden, cell=cell) for _ in range(cfg.layers))

    def init(rng: jax.Array) -> State:
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = net.init(rng, tokens, first_state(1, prec.param))
        return {
            "params": params,
            "opt_state": tx.init(params),
            "recurrent": first_state(cfg.batch, prec.param),
        }

    def loss_fn(params: Any, recurrent: Any, batch: Batch) -> tuple[jax.Array, Any]:
        cast = jax.tree.map(lambda p: p.astype(prec.compute), (params, recurrent))
        logits, after = net.apply(cast[0], batch["inputs"], cast[1])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(prec.param), batch["targets"].T
        )
        return jnp.mean(losses), jax.tree.map(lambda s: s.astype(prec.param), after)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = state["params"]
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, recurrent), grads = grad_fn(params, state["recurrent"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        new = {"params": params, "opt_state": opt_state, "recurrent": recurrent}
        return new, {"loss": loss, "perplexity": jnp.exp(loss)}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = zipf_tokens(rng, (cfg.batch, cfg.seq + 1), cfg.vocab)
        return {"inputs": text[:, :-1], "targets": text[:, 1:]}

    tokens = ints(cfg.batch, cfg.seq)
    shapes = {"inputs": tokens, "targets": tokens}
    return make_model("lstm", train_step, init, shapes, make_batch)
