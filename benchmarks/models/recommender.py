"""DLRM-like click prediction in plain JAX: large embedding tables, adagrad.

Dense features go through a bottom MLP; their vector and one row per table interact by
dot products; a top MLP gives the logit (Naumov et al., arXiv 1906.00091).
"""

from dataclasses import dataclass, replace
from itertools import pairwise
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
    pick,
    precision,
    zipf_tokens,
)

Layers = list[dict[str, jax.Array]]


@dataclass(frozen=True)
class Config:
    """Sizes: rows of each table, width of a row, hidden widths of the two MLPs."""

    rows: tuple[int, ...]
    width: int
    dense: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    batch: int


SIZES = {
    "tiny": Config((64, 128, 192, 512), 32, 16, (64, 64), (64, 64), batch=16),
    "medium": Config(
        (131072, 65536, 32768, 16384),
        width=128, dense=13, bottom=(512, 256), top=(1024, 1024, 512, 256), batch=4096,
    ),
    "large": Config(
        (10_000_000, 8_000_000, 4_000_000, 4_000_000, 2_000_000, 2_000_000, 1_000_000),
        width=128, dense=13, bottom=(512, 256), top=(1024, 1024, 512, 256),
        batch=65536,
    ),
}  # fmt: skip


def init_mlp(rng: jax.Array, sizes: tuple[int, ...], dtype: Any) -> Layers:
    """Weights and biases between consecutive `sizes`."""
    keys = jax.random.split(rng, len(sizes) - 1)
    return [
        {
            "w": jax.random.normal(key, (fan_in, fan_out), dtype) * fan_in**-0.5,
            "b": jnp.zeros(fan_out, dtype),
        }
        for key, (fan_in, fan_out) in zip(keys, pairwise(sizes), strict=True)
    ]


def mlp(layers: Layers, x: jax.Array) -> jax.Array:
    """Dense layers with silu between them."""
    for layer in layers[:-1]:
        x = jax.nn.silu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def init_params(rng: jax.Array, cfg: Config, dtype: Any) -> dict[str, Any]:
    """Tables and both MLPs."""
    bottom_key, top_key, *keys = jax.random.split(rng, len(cfg.rows) + 2)
    vectors = len(cfg.rows) + 1
    interactions = cfg.width + vectors * (vectors - 1) // 2
    tables = [
        jax.random.normal(key, (rows, cfg.width), dtype) * cfg.width**-0.5
        for key, rows in zip(keys, cfg.rows, strict=True)
    ]
    return {
        "tables": tables,
        "bottom": init_mlp(bottom_key, (cfg.dense, *cfg.bottom, cfg.width), dtype),
        "top": init_mlp(top_key, (interactions, *cfg.top, 1), dtype),
    }


def forward(params: dict[str, Any], batch: Batch, prec: Precision) -> jax.Array:
    """The logit of a click for each example, `[B]`."""
    rows = [table[batch["ids"][:, i]] for i, table in enumerate(params["tables"])]
    cast = jax.tree.map(
        lambda p: p.astype(prec.compute),
        {"rows": rows, "bottom": params["bottom"], "top": params["top"]},
    )
    dense = mlp(cast["bottom"], batch["dense"].astype(prec.compute))
    vectors = jnp.stack([dense, *cast["rows"]], axis=1)
    products = jnp.einsum("bid,bjd->bij", vectors, vectors)
    below, left = np.tril_indices(vectors.shape[1], k=-1)
    features = jnp.concatenate([dense, products[:, below, left]], axis=1)
    logits = mlp(cast["top"], features)[:, 0]
    return logits.astype(prec.param)


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`.

    `depth` is the number of hidden layers of each MLP, at most those of `size`.
    """
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, bottom=cfg.bottom[:depth], top=cfg.top[:depth])
    tx = optimizer or optax.adagrad(0.02)

    def init(rng: jax.Array) -> State:
        params = init_params(rng, cfg, prec.param)
        return params, tx.init(params)

    def loss_fn(params: dict[str, Any], batch: Batch) -> jax.Array:
        logits = forward(params, batch, prec)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch["clicks"])
        return jnp.mean(losses)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        dense = rng.standard_normal((cfg.batch, cfg.dense)).astype(prec.param)
        ids = [zipf_tokens(rng, (cfg.batch,), rows) for rows in cfg.rows]
        clicks = dense[:, 0] + 0.5 * rng.standard_normal(cfg.batch) > 0.5
        return {
            "dense": dense,
            "ids": np.stack(ids, axis=1),
            "clicks": clicks.astype(prec.param),
        }

    shapes = {
        "dense": jax.ShapeDtypeStruct((cfg.batch, cfg.dense), prec.param),
        "ids": ints(cfg.batch, len(cfg.rows)),
        "clicks": jax.ShapeDtypeStruct((cfg.batch,), prec.param),
    }
    return make_model("recommender", train_step, init, shapes, make_batch)
