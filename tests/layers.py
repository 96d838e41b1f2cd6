"""Small steps with scanned layers, to be pipelined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCAB, HIDDEN, LAYERS, ROWS, TOKENS = 16, 8, 4, 16, 4
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
Step = tuple[Callable[..., Any], Any, Any]
Layer = Callable[[jax.Array, Any, Any], jax.Array]


def plain(x: jax.Array, w: Any, around: Any) -> jax.Array:
    """Attention with tied products, and a mask that depends on the batch."""
    y = jnp.tanh(x @ w["up"])
    scores = jnp.einsum("bth,bsh->bts", y, y) * around["mask"]
    return x + jnp.einsum("bts,bsh->bth", jnp.tanh(scores), y) @ w["down"]


def sharing(x: jax.Array, w: Any, around: Any) -> jax.Array:
    """Reads a parameter that all layers share, and what was made of the batch."""
    x = plain(x, w, around) + x @ around["shared"]
    return x + jnp.tanh(around["memory"]) * w["gate"]


def dropping(x: jax.Array, w: Any, around: Any) -> jax.Array:
    keep = jax.random.bernoulli(w["key"], 0.8, x.shape)
    return jnp.where(keep, plain(x, w, around), x)


def normed(x: jax.Array, w: Any, around: Any) -> jax.Array:
    """Statistics over the whole batch: no microbatch has them."""
    return plain(x - jnp.mean(x, axis=0), w, around)


def make(
    layer: Layer = plain,
    layers: int = LAYERS,
    dtype: str = "float64",
    hidden: int = HIDDEN,
) -> Step:
    """Embedding, scanned layers, tied head; clip and adamw. Step, state, batch."""

    def loss_of(params: Any, batch: Any) -> jax.Array:
        x = params["embed"][batch["x"]]
        mask = (batch["x"] > 3)[:, None, :].astype(x.dtype)
        shared = params.get("shared")
        around = {"mask": mask, "shared": shared, "memory": x}
        weights = dict(params["layers"])
        if layer is dropping:
            weights["key"] = jax.random.split(jax.random.key(1), layers)
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w, around), None), x, weights)
        logits = x @ params["embed"].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, slots = OPTIMIZER.update(grads, state["slots"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "slots": slots}, {"loss": loss}

    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCAB, hidden),
        "layers": {
            "up": (layers, hidden, 2 * hidden),
            "down": (layers, 2 * hidden, hidden),
        },
    }
    if layer is sharing:
        shapes["layers"]["gate"] = (layers, hidden)
        shapes["shared"] = (hidden, hidden)
    params = jax.tree.map(
        lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = {"params": params, "slots": OPTIMIZER.init(params)}
    text = rng.integers(0, VOCAB, (2, ROWS, TOKENS))
    return step, state, {"x": text[0], "y": text[1]}


def checkpointed(x: jax.Array, w: Any, around: Any) -> jax.Array:
    found: jax.Array = jax.checkpoint(plain)(x, w, around)
    return found
