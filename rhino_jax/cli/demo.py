"""``rhino demo``: plan a GPT, train it on real text, compare with the plain step."""

from __future__ import annotations

import time
from typing import Any

import click
import jax
import numpy as np
from jax.sharding import AxisType

import rhino_jax as rhino
from rhino_jax.cli.gpt import SIZES, Job, make_job, stdlib_text

COMPARED_STEPS = 3
SIMULATED_DEVICES = 8


@click.command()
@click.option("--steps", default=40, show_default=True, help="Training steps.")
@click.option(
    "--size", default="tiny", show_default=True, type=click.Choice(list(SIZES))
)
@click.option("--recipe", default="", help="A known plan; default: the fewest bytes.")
@click.option("--plan-only", is_flag=True, help="Print the plan, train nothing.")
@click.option(
    "--cluster", default="", help="Plan for this hardware (h100:2x8); trains nothing."
)
def demo(steps: int, size: str, recipe: str, plan_only: bool, cluster: str) -> None:
    """Train a byte-level GPT on the standard library's sources, on every device.

    With one device only, on 8 simulated CPU devices.
    """
    job = make_job(SIZES[size])
    if cluster:
        shapes = jax.eval_shape(job.init, jax.random.key(0))
        click.echo(
            rhino.plan(
                job.train_step,
                shapes,
                job.batch_shapes(),
                cluster=cluster,
                recipe=recipe,
            )
        )
        return
    devices = _devices()
    with jax.default_device(devices[0]):
        _run(job, devices, steps, recipe, plan_only)


def _devices() -> list[Any]:
    """All local devices; where there is one only, simulated CPU devices."""
    jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)
    found = jax.devices()
    return found if len(found) > 1 else jax.devices("cpu")


def _run(
    job: Job, devices: list[Any], steps: int, recipe: str, plan_only: bool
) -> None:
    count = len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    train_step = rhino.auto_parallel(mesh=mesh, recipe=recipe)(job.train_step)
    rng = jax.random.key(0)
    began = time.perf_counter()
    planned = train_step.planned(jax.eval_shape(job.init, rng), job.batch_shapes())
    click.echo(planned)
    click.echo(f"planned in {time.perf_counter() - began:.1f} s")
    if plan_only:
        return
    text = stdlib_text()
    click.echo(
        f"training on {len(text):,} bytes of Python, "
        f"{count} {devices[0].device_kind} devices"
    )
    first = _plain_losses(job, text, min(steps, COMPARED_STEPS))
    state = train_step.init(job.init, rng, job.batch_shapes())
    losses: list[float] = []
    batches = job.batches(text)
    began = 0.0
    for step in range(steps):
        state, metrics = train_step(state, next(batches))
        if step < len(first) or step == steps - 1 or step % 10 == 9:
            losses.append(float(metrics["loss"]))
            beside = f"   undecorated {first[step]:.6f}" if step < len(first) else ""
            click.echo(f"step {step + 1:4d}   loss {losses[-1]:.6f}{beside}")
        if step == 0:
            began = time.perf_counter()
    seconds = time.perf_counter() - began
    tokens = job.size.batch * job.size.sequence * (steps - 1)
    click.echo(f"{tokens / seconds:,.0f} tokens per second")
    fell = losses[-1] < losses[0]
    click.echo(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if steps > COMPARED_STEPS and not fell:
        raise click.ClickException("the loss did not fall")


def _plain_losses(job: Job, text: np.ndarray, steps: int) -> list[float]:
    """The losses of the undecorated step, on one device."""
    state = jax.jit(job.init)(jax.random.key(0))
    plain, losses = jax.jit(job.train_step, donate_argnums=0), []
    batches = job.batches(text)
    for _ in range(steps):
        state, metrics = plain(state, next(batches))
        losses.append(float(metrics["loss"]))
    return losses
