"""A step whose state has all sorts of leaves; as a program, a run that goes on.

``python -m tests.api.resumed FOLDER``: restores and prints three losses, the same as a
pipeline, fails to save for want of space, and prints why.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import rhino_jax as rhino

X = np.linspace(-1, 1, 16 * 8, dtype=np.float32).reshape(16, 8)

EMPTY_LEAVES = jax.__version_info__ < (0, 11)
"""The CPU compiler of jaxlib 0.11.2 crashes on empty arrays."""


class Slots(NamedTuple):
    mean: Any
    none: tuple[()]


def init(rng: jax.Array) -> Any:
    up, down, seed = jax.random.split(rng, 3)
    w = {"up": jax.random.normal(up, (8, 32)), "down": jax.random.normal(down, (32, 8))}
    return {
        "w": w,
        "slots": Slots(jax.tree.map(jnp.zeros_like, w), ()),
        "count": jnp.int32(0),
        "seed": seed,
        "rate": jnp.asarray(0.1),
        "half": jnp.ones((8,), jnp.bfloat16),
        **({"empty": jnp.zeros((0, 3))} if EMPTY_LEAVES else {}),
    }


def train_step(state: Any, x: Any) -> Any:
    seed, drawn = jax.random.split(state["seed"])
    keep = jax.random.bernoulli(drawn, 0.9, x.shape)

    def loss_of(w: Any) -> Any:
        return jnp.mean((jnp.tanh(x * keep @ w["up"]) @ w["down"] - x) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state["w"])
    mean = jax.tree.map(lambda m, g: 0.9 * m + g, state["slots"].mean, grads)
    w = jax.tree.map(lambda p, m: p - state["rate"] * m, state["w"], mean)
    new = {"w": w, "slots": Slots(mean, ()), "seed": seed, "count": state["count"] + 1}
    return {**state, **new}, loss


def make(count: int = 8, recipe: str = "zero3", stages: int = 0) -> Any:
    """The step on the first devices, as a pipeline where there are stages."""
    devices = np.array(jax.devices()[:count], object)
    options: dict[str, Any] = {"recipe": recipe, "cache_dir": ""}
    if stages:
        mesh = Mesh(devices.reshape(stages, -1), ("stage", "data"))
        options |= {"pipeline_stages": stages, "microbatches": 1}
    else:
        mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    return rhino.auto_parallel(mesh=mesh, **options)(train_step)


def losses(step: Any, state: Any, count: int) -> tuple[list[float], Any]:
    found = []
    for _ in range(count):
        state, loss = step(state, X)
        found.append(float(loss))
    return found, state


def main(folder: str) -> None:
    shapes = jax.eval_shape(init, jax.random.key(0))
    step = make(16)
    found, state = losses(step, step.restore(folder, shapes, X), 3)
    piped = make(16, stages=2)
    found += losses(piped, piped.restore(folder, shapes, X), 3)[0]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        step.save(folder, state, 5)
    except rhino.RhinoError as error:
        print(json.dumps(found), "|", error)


if __name__ == "__main__":
    main(sys.argv[1])
