"""Is a step on several processes the undecorated step? Models × plans × processes.

Eight simulated CPU devices, as 1 process of 8, 2 of 4 and 4 of 2 (``rhino launch``). In
float64: the state is created in place, every process brings its rows of the batch, and
after 3 steps of the model's own optimizer the losses and every leaf of the state are
held against the undecorated step's (the tolerances of ``benchmarks.equality``). Results
are kept in a file; what is there already is not run again. ``python -m
benchmarks.processes --help``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

import rhino_jax as rhino
from benchmarks.equality import (
    BY_BYTES,
    SEARCH,
    STATE_TOLERANCE,
    decorated,
    worst_leaf,
)
from benchmarks.kept import by_key, keep, rows
from benchmarks.models import build
from benchmarks.models.zoo import Model

SHAPES = ((1, 8), (2, 4), (4, 2))
"""Processes and devices of each."""
PLANS = {
    "gpt_unrolled": (SEARCH, BY_BYTES, "zero3", "zero3 x megatron"),
    "moe": (SEARCH, BY_BYTES, "zero1", "expert"),
}
MESH = "2x4"
STEPS = 3


def undecorated(model: Model, batch: Any) -> tuple[list[float], Any]:
    """The losses and the last state of the plain step on one device."""
    state = jax.jit(model.init)(jax.random.key(0))
    step, losses = jax.jit(model.train_step), []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


def on_all(model: Model, plan: str, batch: Any) -> tuple[list[float], Any]:
    """The same from this process, with the others."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    step = decorated(model, plan, MESH, shapes, batch)
    count, rank = jax.process_count(), jax.process_index()
    rows = jax.tree.map(
        lambda x: np.split(x, count)[rank] if np.ndim(x) else x, dict(batch)
    )
    state = step.init(model.init, jax.random.key(0), rhino.global_shapes(rows))
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, step.shard_batch(rows))
        losses.append(float(metrics["loss"]))
    return losses, step.fetch(state)


def inner(name: str, plans: list[str], out: Path) -> None:
    """What every process runs; the first one compares and writes."""
    rhino.initialize()
    with jax.enable_x64(True):
        model = build(name, dtype="float64")
        batch = model.make_batch(0)
        expected: Any = None
        for plan in plans:
            began = time.perf_counter()
            losses, state = on_all(model, plan, batch)
            seconds = time.perf_counter() - began
            if jax.process_index():
                continue
            expected = expected or undecorated(model, batch)
            wrong = [abs(a / b - 1) for a, b in zip(losses, expected[0], strict=True)]
            leaf, path = worst_leaf(expected[1], state)
            equal = max(*wrong, leaf) <= STATE_TOLERANCE
            row = {
                "plan": plan,
                "outcome": "equal" if equal else f"differs at {path}",
                "worst_loss": max(wrong),
                "worst_leaf": leaf,
                "seconds": round(seconds, 1),
            }
            keep(out, row)


def run(name: str, plans: list[str], processes: int, devices: int) -> list[Any]:
    """Rows of one launch; a failed launch's last line is its outcome."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "rhino_jax.cli", "launch"),
                *("-n", str(processes), "--devices", str(devices), __file__),
                *("--inner", str(out), "--models", name, "--plans", ",".join(plans)),
            ],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        found = rows(out)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1]
            found += [{"plan": plan, "outcome": said} for plan in plans[len(found) :]]
        return found


@click.command()
@click.option("--models", default=",".join(PLANS), show_default=True)
@click.option("--plans", default="", help="Default: all of a model's.")
@click.option(
    "--out",
    default="processes.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
@click.option("--inner", "within", type=click.Path(path_type=Path), hidden=True)
def main(models: str, plans: str, out: Path, within: Path | None) -> None:
    """Run what is missing and say what is not equal."""
    if within:
        inner(models, plans.split(","), within)
        return
    done = by_key(out)
    for name in models.split(","):
        for processes, devices in SHAPES:
            wanted = plans.split(",") if plans else list(PLANS[name])
            keys = {plan: f"{name}|{processes}x{devices}|{plan}" for plan in wanted}
            missing = [plan for plan in wanted if keys[plan] not in done]
            for row in run(name, missing, processes, devices) if missing else []:
                key = keys[row["plan"]]
                done[key] = {"key": key, **row}
                keep(out, done[key])
            for key in keys.values():
                click.echo(f"{key}: {done[key]['outcome']}")
    equal = sum(row["outcome"] == "equal" for row in done.values())
    click.echo(f"{equal} of {len(done)} equal")


if __name__ == "__main__":
    main()
