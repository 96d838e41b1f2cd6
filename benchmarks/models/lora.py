"""LoRA fine-tuning in plain JAX: Llama 2 frozen, small adapters trained by adamw.

The weights stay as they are, in the dtype of compute; queries and values get products
of two thin matrices added (Hu et al., arXiv 2106.09685).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.models.llama import (
    Config,
    Params,
    attend,
    init_params,
    mlp,
    queries_keys_values,
    rms_norm,
)
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

ADAPTED = ("q", "v")
SCALE = 2.0

SIZES = {
    "tiny": Config(128, 64, 96, 8, 4, layers=2, seq=16, batch=16, rank=4),
    "medium": Config(8192, 1024, 2816, 16, 8, layers=4, seq=256, batch=16),
    "large": Config(32000, 4096, 11008, 32, 32, layers=32, seq=2048, batch=64),
}


def init_adapters(rng: jax.Array, cfg: Config, dtype: Any) -> Params:
    """Thin matrices for every adapted weight; the second of each begins at zero."""
    keys = jax.random.split(rng, len(ADAPTED))
    first = (cfg.layers, cfg.hidden, cfg.rank)
    return {
        name: {
            "a": jax.random.normal(key, first, dtype) * cfg.hidden**-0.5,
            "b": jnp.zeros((cfg.layers, cfg.rank, *cfg.shapes[name][1:]), dtype),
        }
        for name, key in zip(ADAPTED, keys, strict=True)
    }


def forward(params: Params, adapters: Params, tokens: jax.Array) -> jax.Array:
    """Tokens `[B, S]` to logits `[B, S, V]`."""
    positions = jnp.arange(tokens.shape[1])[None]
    causal = positions[:, :, None] >= positions[:, None, :]

    @jax.checkpoint
    def layer(x: jax.Array, both: tuple[Params, Params]) -> tuple[jax.Array, None]:
        weights, thin = both

        def project(name: str, x: jax.Array) -> jax.Array:
            y = jnp.einsum("bsh,hnd->bsnd", x, weights[name])
            if name in thin:
                small = x @ thin[name]["a"]
                y = y + SCALE * jnp.einsum("bsr,rnd->bsnd", small, thin[name]["b"])
            return y

        q, k, v = queries_keys_values(project, rms_norm(x, weights["norm1"]), positions)
        x = x + jnp.einsum("bsnd,ndh->bsh", attend(q, k, v, causal), weights["o"])
        return x + mlp(weights, rms_norm(x, weights["norm2"])), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], (params["layers"], adapters))
    return rms_norm(x, params["norm"]) @ params["head"]


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
    tx = optimizer or optax.adamw(1e-2)

    def init(rng: jax.Array) -> State:
        k1, k2 = jax.random.split(rng)
        adapters = init_adapters(k2, cfg, prec.param)
        return {
            "params": init_params(k1, cfg, prec.compute),
            "adapters": adapters,
            "opt_state": tx.init(adapters),
        }

    def loss_fn(adapters: Params, params: Params, batch: Batch) -> jax.Array:
        cast = jax.tree.map(lambda p: p.astype(prec.compute), adapters)
        logits = forward(params, cast, batch["inputs"]).astype(prec.param)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        return jnp.mean(losses)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        adapters = state["adapters"]
        loss, grads = jax.value_and_grad(loss_fn)(adapters, state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], adapters)
        adapters = optax.apply_updates(adapters, updates)
        return {**state, "adapters": adapters, "opt_state": opt_state}, {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = zipf_tokens(rng, (cfg.batch, cfg.seq + 1), cfg.vocab)
        return {"inputs": text[:, :-1], "targets": text[:, 1:]}

    tokens = ints(cfg.batch, cfg.seq)
    shapes = {"inputs": tokens, "targets": tokens}
    return make_model("lora", train_step, init, shapes, make_batch)
