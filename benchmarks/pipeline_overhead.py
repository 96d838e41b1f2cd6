"""What does the controller cost? One process, 2 stages on 4 simulated devices each.

The share of a step's time that Python spends outside JAX (looking up slots, letting
go), and how long the call takes to return while the devices still work.
``python -m benchmarks.pipeline_overhead --help``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import click
import jax
import jax.numpy as jnp
import numpy as np

import rhino_jax as rhino
from rhino_jax.api.pipelined import PipelinePlanned
from rhino_jax.runtime.controller import Controller


@dataclass
class Clock:
    """Adds up the seconds spent in the calls that it wraps."""

    seconds: float = field(default=0.0)

    def timed(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """``fun``, its time added up."""

        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return fun(*args)
            finally:
                self.seconds += time.perf_counter() - began

        return run


def train_step(params: Any, batch: Any) -> Any:
    """Layers of products, their mean square, one step down."""

    def loss_of(params: Any) -> jax.Array:
        x = batch["x"]
        for w in params:
            x = x + jnp.tanh(x @ w)
        return jnp.mean((x - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


@click.command()
@click.option("--width", default=1024, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--rows", default=1024, show_default=True)
@click.option("--microbatches", default=8, show_default=True)
@click.option("--schedule", default="1f1b", show_default=True)
@click.option("--steps", default=5, show_default=True)
def main(
    width: int, layers: int, rows: int, microbatches: int, schedule: str, steps: int
) -> None:
    """Measure some steps after the first two."""
    rng = np.random.default_rng(0)
    shape = (width, width)
    params = [
        (rng.normal(size=shape) / width).astype(np.float32) for _ in range(layers)
    ]
    batch = {k: rng.normal(size=(rows, width)).astype(np.float32) for k in "xy"}
    step = rhino.auto_parallel(
        pipeline_stages=2,
        microbatches=microbatches,
        schedule=schedule,
        recipe="data_parallel",
        cache_dir="",
    )(train_step)
    planned = step.planned(params, batch)
    assert isinstance(planned, PipelinePlanned)
    state, laid = step.place(params), step.shard_batch(batch)
    clock = Clock()
    traced = planned.traced
    controller = Controller(
        planned.graph,
        planned.programs,
        traced.donated,
        transfer=clock.timed(jax.device_put),
    )
    timed = {name: clock.timed(run) for name, run in controller.programs.items()}
    controller.programs = timed
    rows_found = []
    for _ in range(steps + 2):
        leaves = jax.tree.leaves(((state, laid), {}))
        clock.seconds, began = 0.0, time.perf_counter()
        outs = controller((*leaves, *traced.constants))
        returned = time.perf_counter() - began
        state, loss = jax.tree.unflatten(traced.out_tree, outs)
        jax.block_until_ready((state, loss))
        whole = time.perf_counter() - began
        rows_found.append((whole, returned, returned - clock.seconds))
    whole, returned, ours = map(statistics.median, zip(*rows_found[2:], strict=True))
    click.echo(f"step {whole:.3f} s, {len(planned.graph.tasks)} tasks")
    click.echo(f"the call returns after {returned:.3f} s ({returned / whole:.1%})")
    click.echo(f"outside JAX {ours * 1e3:.2f} ms ({ours / whole:.2%})")


if __name__ == "__main__":
    main()
