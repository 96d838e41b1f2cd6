"""Attention as users write it, and what only looks like it.

Each way takes queries [b, t, h, d] and keys and values [b, u, k, d], and gives as many
as queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Attend = Callable[[Any, Any, Any], Any]
DEPTH, WIDTH = 8, 12


def causal(scores: Any) -> Any:
    return jnp.tril(jnp.ones(scores.shape[-2:], bool))


def by_hand(
    q: Any,
    k: Any,
    v: Any,
    mask: Callable[[Any], Any] | None = causal,
    hidden: float = -1e9,
    softmax: Callable[..., Any] = jax.nn.softmax,
) -> Any:
    scores = jnp.einsum("bthd,buhd->bhtu", q, k) / jnp.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask(scores), scores, hidden)
    return jnp.einsum("bhtu,buhe->bthe", softmax(scores), v)


def own_softmax(x: Any) -> Any:
    e = jnp.exp(x - lax.stop_gradient(jnp.max(x, -1, keepdims=True)))
    return e / jnp.sum(e, -1, keepdims=True)


def unshifted(x: Any) -> Any:
    e = jnp.exp(x)
    return e * (1 / jnp.sum(e, -1, keepdims=True))


def added_mask(q: Any, k: Any, v: Any) -> Any:
    """Heads first, the scale on the queries, a mask that is added."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    mask = jnp.where(causal(scores), 0.0, -jnp.inf).astype(scores.dtype)
    return (jax.nn.softmax(scores + mask) @ v).transpose(0, 2, 1, 3)


def merged(q: Any, k: Any, v: Any) -> Any:
    """Examples and heads are one dimension."""
    b, t, h, d = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * h, -1, d) for x in (q, k, v))
    scores = jnp.einsum("ntd,nud->ntu", q, k)
    out = jnp.einsum("ntu,nue->nte", jax.nn.softmax(scores), v)
    return out.reshape(b, h, t, d).transpose(0, 2, 1, 3)


def grouped(q: Any, k: Any, v: Any) -> Any:
    """Several query heads of one head of keys."""
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], -1, d)
    scores = jnp.einsum("btkgd,bukd->bkgtu", q, k)
    scores = jnp.where(causal(scores), scores, -jnp.inf)
    out = jnp.einsum("bkgtu,buke->btkge", jax.nn.softmax(scores), v)
    return out.reshape(b, t, h, d)


def window(scores: Any) -> Any:
    rows, columns = (jnp.arange(n)[:, None] for n in scores.shape[-2:])
    back = rows - columns.T
    return (back >= 0) & (back < 5)


def linen(q: Any, k: Any, v: Any) -> Any:
    mask = nn.make_causal_mask(jnp.ones(q.shape[:2]))
    return nn.dot_product_attention(q, k, v, mask=mask)


def by_jax(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, implementation="xla", **options)


WRITTEN: Mapping[str, Attend] = {
    "by hand": by_hand,
    "all seen": partial(by_hand, mask=None),
    "window": partial(by_hand, mask=window),
    "minus infinity": partial(by_hand, hidden=-jnp.inf),
    "own softmax": partial(by_hand, softmax=own_softmax),
    "unshifted": partial(by_hand, softmax=unshifted),
    "mask added": added_mask,
    "heads merged": merged,
    "linen": linen,
    "jax": partial(by_jax, is_causal=True),
    "jax, window": partial(by_jax, is_causal=True, local_window_size=(4, 0)),
}
"""All of these are attention."""
IN_GROUPS: Mapping[str, Attend] = {
    "grouped": grouped,
    "jax, grouped": partial(by_jax, is_causal=True),
}


# ---- what only looks like it -------------------------------------------------------


def over_queries(x: Any) -> Any:
    return jax.nn.softmax(x, axis=-2)


def over_heads(x: Any) -> Any:
    return jax.nn.softmax(x, axis=1)


def dropped(x: Any) -> Any:
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape)
    return jnp.where(keep, jax.nn.softmax(x) / 0.9, 0)


def stopped_sum(x: Any) -> Any:
    e = jnp.exp(x - lax.stop_gradient(jnp.max(x, -1, keepdims=True)))
    return e / lax.stop_gradient(jnp.sum(e, -1, keepdims=True))


def moving_maximum(x: Any) -> Any:
    """The right gradient, by way of more ops than attention has."""
    e = jnp.exp(x - jnp.max(x, -1, keepdims=True))
    return e / jnp.sum(e, -1, keepdims=True)


def sharpened(x: Any) -> Any:
    p = jax.nn.softmax(x)
    return p * p


def with_sink(x: Any) -> Any:
    e = jnp.exp(x - lax.stop_gradient(jnp.max(x, -1, keepdims=True)))
    return e / (1 + jnp.sum(e, -1, keepdims=True))


def anticausal(scores: Any) -> Any:
    return ~causal(scores) | jnp.eye(scores.shape[-1], dtype=bool)


def strictly(scores: Any) -> Any:
    """The first query sees no key."""
    return jnp.tril(jnp.ones(scores.shape[-2:], bool), -1)


def one_more(scores: Any) -> Any:
    return jnp.tril(jnp.ones(scores.shape[-2:], bool), 1)


def in_chunks(scores: Any) -> Any:
    rows, columns = (jnp.arange(n) // 4 for n in scores.shape[-2:])
    return rows[:, None] >= columns[None, :]


def of_scores(scores: Any) -> Any:
    return causal(scores) & (scores < 2)


def with_bias(q: Any, k: Any, v: Any) -> Any:
    """What is added depends on the keys' values."""
    scores = jnp.einsum("bthd,buhd->bhtu", q, k) + jnp.sum(k, (2, 3))[:, None, None]
    return jnp.einsum("bhtu,buhe->bthe", jax.nn.softmax(scores), v)


def stopped_scores(q: Any, k: Any, v: Any) -> Any:
    """No gradient reaches queries and keys: probabilities have to be kept."""
    scores = lax.stop_gradient(jnp.einsum("bthd,buhd->bhtu", q, k))
    return jnp.einsum("bhtu,buhe->bthe", jax.nn.softmax(scores), v)


def stopped_keys(q: Any, k: Any, v: Any) -> Any:
    return by_hand(q, lax.stop_gradient(k), v)


def capped(q: Any, k: Any, v: Any) -> Any:
    scores = 5 * jnp.tanh(jnp.einsum("bthd,buhd->bhtu", q, k) / 5)
    return jnp.einsum("bhtu,buhe->bthe", jax.nn.softmax(scores), v)


def read_twice(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bthd,buhd->bhtu", q, k)
    out = jnp.einsum("bhtu,buhe->bthe", jax.nn.softmax(scores), v)
    return out + jnp.mean(scores)


def entropy(q: Any, k: Any, v: Any) -> Any:
    p = jax.nn.softmax(jnp.einsum("bthd,buhd->bhtu", q, k))
    return jnp.einsum("bhtu,buhe->bthe", p, v) + jnp.sum(p * p)


NEAR_MISSES: Mapping[str, Attend] = {
    "over queries": partial(by_hand, softmax=over_queries),
    "over heads": partial(by_hand, softmax=over_heads),
    "dropout": partial(by_hand, softmax=dropped),
    "stopped sum": partial(by_hand, softmax=stopped_sum),
    "moving maximum": partial(by_hand, softmax=moving_maximum),
    "sharpened": partial(by_hand, softmax=sharpened),
    "with a sink": partial(by_hand, softmax=with_sink),
    "later keys": partial(by_hand, mask=anticausal),
    "earlier keys": partial(by_hand, mask=strictly),
    "one more key": partial(by_hand, mask=one_more),
    "in chunks": partial(by_hand, mask=in_chunks),
    "mask of scores": partial(by_hand, mask=of_scores),
    "hidden a little": partial(by_hand, hidden=-5.0),
    "bias": with_bias,
    "stopped scores": stopped_scores,
    "stopped keys": stopped_keys,
    "capped": capped,
    "scores read twice": read_twice,
    "entropy": entropy,
}


# ---- steps -------------------------------------------------------------------------


def projected(x: Any, p: Any) -> tuple[Any, ...]:
    return tuple(jnp.einsum("btw,whd->bthd", x, p[name]) for name in "qkv")


def layer(attend: Attend, x: Any, p: Any) -> Any:
    return x + jnp.einsum("bthd,hdw->btw", attend(*projected(x, p)), p["o"])


def train_step(attend: Attend, params: Any, x: Any) -> Any:
    """One layer."""

    def loss_of(params: Any) -> Any:
        return jnp.mean(jnp.sin(layer(attend, x, params)))

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), loss


def scanned_step(attend: Attend, remat: bool, params: Any, x: Any) -> Any:
    """Layers in one scan."""

    def turn(x: Any, p: Any) -> tuple[Any, None]:
        return layer(attend, x, p), None

    def loss_of(params: Any) -> Any:
        body = jax.checkpoint(turn) if remat else turn
        return jnp.mean(jnp.sin(lax.scan(body, x, params)[0]))

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), loss


def params_of(heads: int = 4, kv_heads: int = 4, layers: int = 0, **how: Any) -> Any:
    """Arrays drawn at random; of ``layers`` layers, stacked."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    shapes = {
        "q": (WIDTH, heads, DEPTH),
        "k": (WIDTH, kv_heads, DEPTH),
        "v": (WIDTH, kv_heads, DEPTH),
        "o": (heads, DEPTH, WIDTH),
    }
    stack = (layers,) if layers else ()
    return {
        name: jax.random.normal(next(keys), stack + shape, **how) / 3
        for name, shape in shapes.items()
    }


def inputs_of(batch: int = 2, length: int = 16, **how: Any) -> Any:
    return jax.random.normal(jax.random.key(1), (batch, length, WIDTH), **how)
