"""Steps to analyze: the zoo and small ones, traced once a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.models import build
from rhino_jax.ir.analysis.structure import Structure, analyze
from rhino_jax.ir.program import Program
from rhino_jax.rules.registry import HEAVY
from rhino_jax.trace import Traced, trace

DEPTHS: Mapping[str, int | None] = {
    "gpt_unrolled": 4,
    "gpt_scanned": 4,
    "vit": 4,
    "resnet": 4,
    "moe": 4,
    "t5": 4,
    "recommender": None,
}


@dataclass(frozen=True)
class Analyzed:
    """A traced step and its structure."""

    traced: Traced
    structure: Structure
    pairs: Mapping[int, int]

    @property
    def program(self) -> Program:
        return self.traced.program

    def named(self, position: int) -> str:
        return self.traced.input_paths[position]


def analyzed(fun: Callable[..., Any], *args: Any) -> Analyzed:
    """The structure of ``fun`` on arrays, shapes (``f32(2, 3)``) or trees of them."""
    traced = trace(fun, args)
    pairs = dict(traced.state_pairs)
    found = analyze(traced.program, pairs, traced.batch_inputs, HEAVY)
    return Analyzed(traced, found, pairs)


@lru_cache
def zoo(name: str, depth: int | None = None, dtype: str = "float32") -> Analyzed:
    """The tiny model ``name``, at its depth in ``DEPTHS`` unless told."""
    model = build(name, "tiny", depth=depth or DEPTHS[name], dtype=dtype)
    return analyzed(model.train_step, model.state_shapes, model.batch_shapes)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp_shapes(layers: int, width: int = 8) -> list[dict[str, Any]]:
    return [{"b": f32(width), "w": f32(width, width)} for _ in range(layers)]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """Residual layers, so that each ends where its input and output are one value."""
    for layer in params:
        x = x + jnp.tanh(x @ layer["w"] + layer["b"])
    return x


def mlp_loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.square(mlp(params, batch["x"]) - batch["y"]))


def batch_shapes(examples: int = 16, width: int = 8) -> dict[str, Any]:
    return {"x": f32(examples, width), "y": f32(examples, width)}


def sgd(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
