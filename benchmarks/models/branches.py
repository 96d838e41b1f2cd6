"""Small steps whose graphs branch: what a pipeline must cut beside plain layers.

``STEPS[name](dtype)`` gives ``(train_step, state, batch)``: a U-Net with skips, two
towers that meet in a loss (per example, or contrastive), a transformer with tied
embeddings whose gradients are clipped by their global norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Step = Callable[[Any, Any], Any]
Made = tuple[Step, Any, Any]


class _Draw:
    """Arrays drawn one after the other."""

    def __init__(self, dtype: str) -> None:
        self.rng, self.dtype = np.random.default_rng(0), dtype

    def __call__(self, *shape: int) -> np.ndarray:
        scale = 1 / np.sqrt(np.prod(shape[:-1]) if len(shape) > 1 else 1)
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def ints(self, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, high, shape, dtype=np.int32)


def _step(loss_of: Callable[[Any, Any], jax.Array], optimizer: Any) -> Step:
    def train_step(state: Any, batch: Any) -> Any:
        params, slots = state
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, slots = optimizer.update(grads, slots, params)
        return (optax.apply_updates(params, updates), slots), {"loss": loss}

    return train_step


def _made(
    loss_of: Callable[[Any, Any], jax.Array], params: Any, batch: Any, optimizer: Any
) -> Made:
    params = jax.tree.map(jnp.asarray, params)
    return _step(loss_of, optimizer), (params, optimizer.init(params)), batch


def unet(dtype: str = "float32") -> Made:
    """Three levels down and up again, every level's activation added on the way up."""
    draw, width = _Draw(dtype), (8, 16, 16)
    down = [draw(3, 3, a, b) for a, b in zip((4, *width), width, strict=False)]
    up = [draw(3, 3, a, b) for a, b in ((16, 16), (16, 8), (8, 8))]
    params = {"down": down, "up": up, "head": draw(8, 4)}
    batch = {"x": draw(16, 8, 8, 4), "y": draw(16, 8, 8, 4)}

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layout
        )

    def loss_of(params: Any, batch: Any) -> jax.Array:
        x, skips = batch["x"], []
        for w in params["down"]:
            x = jnp.tanh(conv(x, w))
            skips.append(x)
        for w in params["up"]:
            x = jnp.tanh(conv(x + skips.pop(), w))
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    return _made(loss_of, params, batch, optax.sgd(0.3, momentum=0.9))


def _tower(layers: list[Any], x: jax.Array) -> jax.Array:
    for layer in layers:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def _towers(draw: _Draw) -> tuple[Any, Any]:
    params = {
        side: [{"up": draw(16, 32), "down": draw(32, 16)} for _ in range(3)]
        for side in ("left", "right")
    }
    return params, {side: draw(16, 16) for side in params}


def towers(dtype: str = "float32") -> Made:
    """Two towers, and for every pair the distance of what they give."""
    draw = _Draw(dtype)
    params, batch = _towers(draw)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        left = _tower(params["left"], batch["left"])
        right = _tower(params["right"], batch["right"])
        return jnp.mean(jnp.log1p(jnp.sum((left - right) ** 2, axis=-1)))

    return _made(loss_of, params, batch, optax.sgd(0.1, momentum=0.9))


def clip(dtype: str = "float32") -> Made:
    """Two towers and a contrastive loss: every example meets all others."""
    draw = _Draw(dtype)
    params, batch = _towers(draw)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        left = _tower(params["left"], batch["left"])
        right = _tower(params["right"], batch["right"])
        logits = left @ right.T / 4
        labels = jnp.arange(logits.shape[0])
        rows = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        columns = optax.softmax_cross_entropy_with_integer_labels(logits.T, labels)
        return jnp.mean(rows + columns)

    return _made(loss_of, params, batch, optax.sgd(0.1, momentum=0.9))


def tied(dtype: str = "float32") -> Made:
    """Layers between an embedding and its transpose; the global norm is clipped."""
    draw, vocabulary, width = _Draw(dtype), 32, 16
    params = {
        "embed": draw(vocabulary, width),
        "layers": [
            {"up": draw(width, 32), "bias": draw(32), "down": draw(32, width)}
            for _ in range(4)
        ],
    }
    tokens = {name: draw.ints(vocabulary, 16, 8) for name in ("inputs", "targets")}
    mask = (draw.rng.random((16, 8)) < 0.7).astype(dtype)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        x = params["embed"][batch["inputs"]]
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer["up"] + layer["bias"]) @ layer["down"]
        logits = x @ params["embed"].T
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        return jnp.sum(losses * batch["mask"]) / jnp.sum(batch["mask"])

    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))
    return _made(loss_of, params, {**tokens, "mask": mask}, optimizer)


STEPS: Mapping[str, Callable[[str], Made]] = {
    "unet": unet,
    "towers": towers,
    "clip": clip,
    "tied": tied,
}
