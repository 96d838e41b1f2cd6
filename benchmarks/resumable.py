"""A training script as a user would write it, that goes on where it was stopped.

``rhino launch -n 4 benchmarks/resumable.py FOLDER [STAGES]``: adam on a small network,
cut in pipeline stages where a number is given; a checkpoint every few steps, the loss
of every step appended to ``FOLDER/losses.jsonl``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rhino_jax as rhino

STEPS, EVERY = 16, 4
PAUSE_SECONDS = 0.05
"""Of every step, so that there is something to interrupt."""
ROWS, WIDTH, HIDDEN = 32, 16, 64

optimizer = optax.adam(1e-2)


def init(rng: jax.Array) -> Any:
    up, down = jax.random.split(rng)
    params = {
        "up": jax.random.normal(up, (WIDTH, HIDDEN)) / WIDTH**0.5,
        "down": jax.random.normal(down, (HIDDEN, WIDTH)) / HIDDEN**0.5,
    }
    return params, optimizer.init(params)


def train_step(state: Any, batch: Any) -> Any:
    params, slots = state

    def loss_of(params: Any) -> jax.Array:
        out = jnp.tanh(batch @ params["up"]) @ params["down"]
        return jnp.mean((out - jnp.sin(3 * batch)) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, slots = optimizer.update(grads, slots, params)
    return (optax.apply_updates(params, updates), slots), loss


def batch_of(step: int) -> np.ndarray:
    """float32 [ROWS, WIDTH]: the same for the same step."""
    rng = np.random.default_rng(step)
    return rng.normal(size=(ROWS, WIDTH)).astype(np.float32)


def options(stages: int) -> dict[str, Any]:
    """What is asked for: with stages, four microbatches."""
    if not stages:
        return {"recipe": "zero3", "cache_dir": ""}
    return {"pipeline_stages": stages, "microbatches": 4, "cache_dir": ""}


def main(folder: Path, stages: int = 0) -> None:
    rhino.initialize()
    count, rank = jax.process_count(), jax.process_index()
    step_fun = rhino.auto_parallel(**options(stages))(train_step)
    shapes = jax.eval_shape(init, jax.random.key(0))
    saved = rhino.saved_steps(folder / "checkpoints")
    if saved:
        for step in saved:  # each must be whole; the last is where it goes on
            state = step_fun.restore(
                folder / "checkpoints", shapes, batch_of(0), step=step
            )
    else:
        state = step_fun.init(init, jax.random.key(0), batch_of(0))
    for step in range(saved[-1] if saved else 0, STEPS):
        rows = np.split(batch_of(step), count)[rank]
        state, loss = step_fun(state, step_fun.shard_batch(rows))
        if rank == 0:
            row = {"step": step, "loss": float(loss)}
            with (folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        time.sleep(PAUSE_SECONDS)
        if (step + 1) % EVERY == 0:
            step_fun.save(folder / "checkpoints", state, step + 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
