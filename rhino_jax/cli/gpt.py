"""The demo's model: a byte-level GPT as anyone would write it for one device.

Nothing here knows of Rhino: flax nnx, optax adamw, one plain ``train_step``.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Size:
    """How large the model is, and how many tokens it sees in a step."""

    layers: int
    width: int
    heads: int
    sequence: int
    batch: int


SIZES = {
    "tiny": Size(2, 128, 8, 64, 32),
    "small": Size(4, 256, 8, 128, 32),
    "125m": Size(12, 768, 16, 1024, 64),
    "1.3b": Size(24, 2048, 32, 1024, 256),
}


class Block(nnx.Module):
    """Attention and a feed-forward layer, each after a norm and added back."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.heads = size.heads
        self.norm1 = nnx.LayerNorm(size.width, rngs=rngs)
        self.qkv = nnx.Linear(size.width, 3 * size.width, rngs=rngs)
        self.out = nnx.Linear(size.width, size.width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(size.width, rngs=rngs)
        self.up = nnx.Linear(size.width, 4 * size.width, rngs=rngs)
        self.down = nnx.Linear(4 * size.width, size.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = (
            part.reshape(batch, length, self.heads, width // self.heads)
            for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(batch, length, width))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Gpt(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(VOCABULARY, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.sequence, size.width, rngs=rngs)
        self.blocks = nnx.List([Block(size, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Job:
    """A train step, how to make its first state, and its batches."""

    train_step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    init: Callable[[jax.Array], Any]
    size: Size

    def batch_shapes(self) -> jax.ShapeDtypeStruct:
        shape = (self.size.batch, self.size.sequence + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def batches(self, text: np.ndarray) -> Iterator[np.ndarray]:
        """int32 [batch, sequence + 1]: random windows of the text, for ever."""
        rng = np.random.default_rng(0)
        length = self.size.sequence + 1
        while True:
            starts = rng.integers(0, len(text) - length, self.size.batch)
            yield np.stack([text[s : s + length] for s in starts]).astype(np.int32)


def make_job(size: Size, learning_rate: float = 3e-3) -> Job:
    """The GPT of one size with adamw."""
    optimizer = optax.adamw(learning_rate)
    structure = nnx.split(nnx.eval_shape(lambda: Gpt(size, nnx.Rngs(0))))[0]

    def init(rng: jax.Array) -> Any:
        params = nnx.split(Gpt(size, nnx.Rngs(rng)))[1]
        return params, optimizer.init(params)

    def train_step(state: Any, tokens: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params, slots = state

        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(structure, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, slots = optimizer.update(grads, slots, params)
        return (optax.apply_updates(params, updates), slots), {"loss": loss}

    return Job(train_step, init, size)


def stdlib_text(limit_bytes: int = 4_000_000) -> np.ndarray:
    """uint8: the sources of Python's own standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts, total = [], 0
    for file in sorted(root.glob("*.py")):
        parts.append(np.frombuffer(file.read_bytes(), np.uint8))
        total += len(parts[-1])
        if total >= limit_bytes:
            break
    return np.concatenate(parts)
