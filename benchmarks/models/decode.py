"""One step of decoding in plain JAX: Llama 2 with a cache of keys and values.

Every row is at a place of its own, as where requests come and go: its keys and values
are written there, and it sees what came before. `large` is Llama 2 70B, whose queries
share 8 heads of keys and values.
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

SIZES = {
    "tiny": Config(128, 64, 96, 8, 4, layers=2, seq=16, batch=16),
    "medium": Config(8192, 1024, 2816, 16, 8, layers=4, seq=512, batch=32),
    "large": Config(32000, 8192, 28672, 64, 8, layers=80, seq=4096, batch=128),
}


def write(cache: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
    """`new` `[B, 1, KV, D]` into `cache` `[B, S, KV, D]`, each row at its place."""

    def one(row: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new, place, axis=0)

    return jax.vmap(one)(cache, new, places)


def forward(
    params: Params, cache: Params, tokens: jax.Array, places: jax.Array
) -> tuple[jax.Array, Params]:
    """Tokens and places `[B]` to logits `[B, V]` and the cache after."""
    length = cache["k"].shape[2]
    seen = jnp.arange(length)[None, None, :] <= places[:, None, None]

    def layer(x: jax.Array, both: tuple[Params, Params]) -> tuple[jax.Array, Params]:
        weights, held = both

        def project(name: str, x: jax.Array) -> jax.Array:
            return jnp.einsum("bsh,hnd->bsnd", x, weights[name])

        y = rms_norm(x, weights["norm1"])
        q, k, v = queries_keys_values(project, y, places[:, None])
        held = {"k": write(held["k"], k, places), "v": write(held["v"], v, places)}
        y = attend(q, held["k"], held["v"], seen)
        x = x + jnp.einsum("bsnd,ndh->bsh", y, weights["o"])
        return x + mlp(weights, rms_norm(x, weights["norm2"])), held

    x = params["embed"][tokens][:, None]
    x, cache = jax.lax.scan(layer, x, (params["layers"], cache))
    return (rms_norm(x, params["norm"]) @ params["head"])[:, 0], cache


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. Nothing is trained.

    The step's "loss" is how unlikely the chosen tokens were.
    """
    del optimizer
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, layers=cfg.layers if depth is None else depth)

    def init(rng: jax.Array) -> State:
        shape = (cfg.layers, cfg.batch, cfg.seq, cfg.kv_heads, cfg.head)
        cache = {name: jnp.zeros(shape, prec.compute) for name in ("k", "v")}
        return {"params": init_params(rng, cfg, prec.compute), "cache": cache}

    def decode_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        logits, cache = forward(
            state["params"], state["cache"], batch["tokens"], batch["places"]
        )
        log_probs = jax.nn.log_softmax(logits.astype(prec.param))
        tokens = jnp.argmax(log_probs, axis=-1)
        chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)
        metrics: dict[str, Any] = {"loss": -jnp.mean(chosen), "tokens": tokens}
        return {**state, "cache": cache}, metrics

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            "tokens": zipf_tokens(rng, (cfg.batch,), cfg.vocab),
            "places": rng.integers(0, cfg.seq, cfg.batch, dtype=np.int32),
        }

    rows = ints(cfg.batch)
    shapes = {"tokens": rows, "places": rows}
    return make_model("decode", decode_step, init, shapes, make_batch)
