"""GShard-style mixture of experts in plain JAX: a language model trained with adam.

Every second block sends its tokens, in groups, to two of `experts` feed-forward
networks. Dispatch and combine are einsums with one-hot `[group, token, expert, slot]`
tensors (Lepikhin et al., arXiv 2006.16668, algorithm 1).
"""

from dataclasses import dataclass, replace
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

Params = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch; `group` counts tokens.

    An expert takes `2 * capacity_factor * group / experts` tokens of each group.
    """

    vocab: int
    hidden: int
    ffn: int
    heads: int
    layers: int
    experts: int
    group: int
    seq: int
    batch: int
    capacity_factor: float = 1.0
    aux_weight: float = 1e-2

    @property
    def capacity(self) -> int:
        """Slots of one expert in one group."""
        return int(2 * self.capacity_factor * self.group / self.experts)


SIZES = {
    "tiny": Config(128, 64, 128, 8, layers=2, experts=8, group=32, seq=16, batch=16),
    "small": Config(
        512, 256, 512, 8, layers=2, experts=8, group=128, seq=128, batch=16
    ),
    "medium": Config(
        8192, 1024, 2048, 16, layers=4, experts=16, group=256, seq=256, batch=64
    ),
    "large": Config(
        32000, 768, 6144, 16, layers=16, experts=16, group=2048, seq=1024, batch=64
    ),
}


def normal(rng: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> Any:
    """A weight drawn with variance `1 / fan_in`."""
    return jax.random.normal(rng, shape, dtype) * fan_in**-0.5


def init_block(rng: jax.Array, cfg: Config, is_moe: bool, dtype: Any) -> Params:
    """Parameters of one block."""
    h, n, d = cfg.hidden, cfg.heads, cfg.hidden // cfg.heads
    e, f = cfg.experts, cfg.ffn
    keys = jax.random.split(rng, 7)
    params: Params = {
        "norm1": jnp.ones(h, dtype),
        "norm2": jnp.ones(h, dtype),
        "query": normal(keys[0], (h, n, d), h, dtype),
        "key": normal(keys[1], (h, n, d), h, dtype),
        "value": normal(keys[2], (h, n, d), h, dtype),
        "out": normal(keys[3], (n, d, h), h, dtype),
    }
    if is_moe:
        params["gate"] = normal(keys[4], (h, e), h, dtype)
        params["up"] = normal(keys[5], (e, h, f), h, dtype)
        params["down"] = normal(keys[6], (e, f, h), f, dtype)
    else:
        params["up"] = normal(keys[5], (h, f), h, dtype)
        params["down"] = normal(keys[6], (f, h), f, dtype)
    return params


def init_params(rng: jax.Array, cfg: Config, dtype: Any) -> Params:
    """Parameters of the whole model; even blocks are mixtures."""
    keys = jax.random.split(rng, cfg.layers + 3)
    blocks = [
        init_block(keys[3 + i], cfg, i % 2 == 0, dtype) for i in range(cfg.layers)
    ]
    return {
        "embed": 0.02 * jax.random.normal(keys[0], (cfg.vocab, cfg.hidden), dtype),
        "positions": 0.02 * jax.random.normal(keys[1], (cfg.seq, cfg.hidden), dtype),
        "blocks": blocks,
        "norm": jnp.ones(cfg.hidden, dtype),
        "head": normal(keys[2], (cfg.hidden, cfg.vocab), cfg.hidden, dtype),
    }


def layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm over the last dimension, without bias."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale


def attention(p: Params, x: jax.Array) -> jax.Array:
    """Causal self-attention on `[B, S, H]`."""
    q = jnp.einsum("bsh,hnd->bnsd", x, p["query"])
    k = jnp.einsum("bsh,hnd->bnsd", x, p["key"])
    v = jnp.einsum("bsh,hnd->bnsd", x, p["value"])
    scores = jnp.einsum("bnqd,bnkd->bnqk", q, k) * q.shape[-1] ** -0.5
    position = jnp.arange(x.shape[1])
    future = position[None, :] > position[:, None]
    weights = jax.nn.softmax(jnp.where(future, -1e9, scores), axis=-1)
    return jnp.einsum("bnqk,bnkd,ndh->bqh", weights, v, p["out"])


def top2_gating(logits: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Combine weights `[G, S, E, C]` and the auxiliary loss, from `[G, S, E]`.

    A token beyond the capacity of its expert is dropped; second choices queue
    behind all first choices of their group.
    """
    experts = logits.shape[-1]
    probs = jax.nn.softmax(logits, axis=-1)
    first = jax.nn.one_hot(jnp.argmax(probs, axis=-1), experts, dtype=probs.dtype)
    rest = jnp.argmax(probs * (1 - first), axis=-1)
    second = jax.nn.one_hot(rest, experts, dtype=probs.dtype)
    aux = jnp.mean(first.mean(axis=1) * probs.mean(axis=1)) * experts**2

    place1 = jnp.cumsum(first, axis=1) - first
    place2 = jnp.cumsum(second, axis=1) - second + first.sum(axis=1, keepdims=True)
    first = first * (place1 < capacity)
    second = second * (place2 < capacity)
    gate1 = jnp.sum(probs * first, axis=-1)
    gate2 = jnp.sum(probs * second, axis=-1)
    total = jnp.maximum(gate1 + gate2, 1e-9)

    slot1 = jnp.sum(place1 * first, axis=-1).astype(jnp.int32)
    slot2 = jnp.sum(place2 * second, axis=-1).astype(jnp.int32)
    combine = sum(
        (gate / total)[..., None, None]
        * chosen[..., None]
        * jax.nn.one_hot(slot, capacity, dtype=probs.dtype)[..., None, :]
        for gate, chosen, slot in ((gate1, first, slot1), (gate2, second, slot2))
    )
    return jnp.asarray(combine), aux


def mixture(p: Params, x: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Feed-forward by experts: `[B, S, H]` to the same, and the auxiliary loss."""
    tokens = x.reshape(-1, cfg.group, cfg.hidden)
    gate = p["gate"].astype(jnp.promote_types(x.dtype, jnp.float32))
    logits = jnp.einsum("gsh,he->gse", tokens.astype(gate.dtype), gate)
    weights, aux = top2_gating(logits, cfg.capacity)
    combine = weights.astype(x.dtype)
    dispatch = (weights > 0).astype(x.dtype)
    y = jnp.einsum("gsec,gsh->egch", dispatch, tokens)
    y = jax.nn.gelu(jnp.einsum("egch,ehf->egcf", y, p["up"]))
    y = jnp.einsum("egcf,efh->egch", y, p["down"])
    return jnp.einsum("gsec,egch->gsh", combine, y).reshape(x.shape), aux


def forward(
    params: Params, tokens: jax.Array, cfg: Config, prec: Precision
) -> tuple[jax.Array, jax.Array]:
    """Logits `[B, S, V]` and the sum of the auxiliary losses."""
    params = jax.tree.map(lambda p: p.astype(prec.compute), params)
    x = params["embed"][tokens] + params["positions"]
    aux = jnp.zeros((), prec.param)
    for block in params["blocks"]:
        x = x + attention(block, layer_norm(x, block["norm1"]))
        y = layer_norm(x, block["norm2"])
        if "gate" in block:
            y, balance = mixture(block, y, cfg)
            aux = aux + balance
        else:
            y = jax.nn.gelu(y @ block["up"]) @ block["down"]
        x = x + y
    return layer_norm(x, params["norm"]) @ params["head"], aux


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
    tx = optimizer or optax.adam(1e-3)

    def init(rng: jax.Array) -> State:
        params = init_params(rng, cfg, prec.param)
        return params, tx.init(params)

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits, aux = forward(params, batch["inputs"], cfg, prec)
        log_probs = jax.nn.log_softmax(logits.astype(prec.param), axis=-1)
        targets = batch["targets"][..., None]
        loss = -jnp.take_along_axis(log_probs, targets, axis=-1).mean()
        return loss + cfg.aux_weight * aux, aux

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, opt_state = state
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, aux), grads = grad_fn(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), {"loss": loss, "aux_loss": aux}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = zipf_tokens(rng, (cfg.batch, cfg.seq + 1), cfg.vocab)
        return {"inputs": text[:, :-1], "targets": text[:, 1:]}

    tokens = ints(cfg.batch, cfg.seq)
    shapes = {"inputs": tokens, "targets": tokens}
    return make_model("moe", train_step, init, shapes, make_batch)
