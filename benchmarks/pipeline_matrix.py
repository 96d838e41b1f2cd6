"""Is the pipelined step the undecorated step? Every pair of settings, by running.

On 16 simulated CPU devices, in float64: the losses of 2 steps and the state after them,
per leaf as in :mod:`benchmarks.equality`. Cases cover every pair of model, number of
stages, mesh of one worker, schedule and recipe that can go together. Results are kept
in a file; cases already there are not run again.
``python -m benchmarks.pipeline_matrix --help``.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0",
)

import click
import jax
import numpy as np

import rhino_jax as rhino
from benchmarks.equality import STATE_TOLERANCE, worst_leaf
from benchmarks.models import materialize
from benchmarks.models.branches import STEPS
from rhino_jax.api.staging import IN_ONE_PROGRAM
from rhino_jax.options import make_options
from rhino_jax.schedule.generate import LOOPED, SCHEDULES

ZOO = ("gpt_unrolled", "gpt_scanned", "t5", "moe", "resnet")
SCANNED = {"gpt_scanned": 4}
"""Models whose layers are in one scan, and how many: stages of one program."""
MICROBATCHES = {"resnet": 1, "clip": 1, "moe": 2}
"""Where not 4: models that mix examples, or regroup their tokens."""
MESHES = {"1": {}, "2": {"data": 2}, "2x2": {"data": 2, "tensor": 2}}
RECIPES = ("search", "data_parallel", "zero3", "megatron")


@dataclass(frozen=True)
class Case:
    """One setting of everything; ``mesh`` is that of one worker."""

    model: str
    stages: int
    mesh: str
    schedule: str
    recipe: str

    def __str__(self) -> str:
        return "|".join(map(str, astuple(self)))

    @property
    def workers(self) -> int:
        return self.stages // (2 if self.schedule in LOOPED else 1)

    @property
    def microbatches(self) -> int:
        return MICROBATCHES.get(self.model, 4)


def possible(case: Case) -> bool:
    """Whether a case asks for nothing that contradicts itself."""
    if case.model in SCANNED and case.schedule not in IN_ONE_PROGRAM:
        return False
    if case.recipe == "megatron":
        # Products to split across, and an axis for it.
        return case.mesh == "2x2" and case.model in (
            "gpt_unrolled",
            "gpt_scanned",
            "t5",
        )
    return case.recipe == "search" or case.mesh != "1"


@cache
def cases() -> tuple[Case, ...]:
    """A set that holds every pair of settings that any possible case holds; of scanned
    layers, every searched one.

    Greedy: the case that covers most pairs not covered yet, the first of equals.
    """
    every = [
        case
        for case in itertools.starmap(
            Case,
            itertools.product(
                (*ZOO, *STEPS), (2, 4), tuple(MESHES), tuple(SCHEDULES), RECIPES
            ),
        )
        if possible(case)
    ]
    pairs_of = {case: frozenset(_pairs(case)) for case in every}
    left = set().union(*pairs_of.values())
    found = []
    while left:
        best = max(every, key=lambda case: len(pairs_of[case] & left))
        found.append(best)
        left -= pairs_of[best]
    scanned = (c for c in every if c.model in SCANNED and c.recipe == "search")
    return tuple(dict.fromkeys((*found, *scanned)))


def _pairs(case: Case) -> Iterator[Any]:
    settings = enumerate(astuple(case))
    return itertools.combinations(settings, 2)


@cache
def reference(name: str, steps: int = 2) -> tuple[Any, Any, Any, list[float], Any]:
    """Undecorated: step, state, batch, the losses, the last state."""
    if name in STEPS:
        step, state, batch = STEPS[name]("float64")
    else:
        depth = SCANNED.get(name)
        step, state, batch = materialize(name, dtype="float64", depth=depth)
    state = jax.device_get(state)
    jitted, losses, now = jax.jit(step), [], state
    for _ in range(steps):
        now, metrics = jitted(now, batch)
        losses.append(float(metrics["loss"]))
    return step, state, batch, losses, jax.device_get(now)


def mesh_of(case: Case) -> jax.sharding.Mesh:
    """The first devices, workers along the leading axis."""
    axes = {"stage": case.workers, **MESHES[case.mesh]}
    shape = tuple(axes.values())
    devices = np.array(jax.devices()[: int(np.prod(shape))], object)
    return jax.sharding.Mesh(devices.reshape(shape), tuple(axes))


def run(case: Case) -> dict[str, Any]:
    """Run one case; ``outcome`` is "equal" or says what differs."""
    with jax.enable_x64(True):
        step, state, batch, losses, expected = reference(case.model)
        options = make_options(
            pipeline_stages=case.stages,
            microbatches=case.microbatches,
            schedule=case.schedule,
            recipe="" if case.recipe == "search" else case.recipe,
            mesh=mesh_of(case),
            cache_dir="",
        )
        began = time.perf_counter()
        piped = rhino.ParallelFunction(step, options)
        now = piped.place(state, batch)
        found = []
        for _ in losses:
            now, metrics = piped(now, batch)
            found.append(float(metrics["loss"]))
        worst, path = worst_leaf(expected, now)
        apart = max(abs(a - b) for a, b in zip(losses, found, strict=True))
        good = worst <= STATE_TOLERANCE and apart <= STATE_TOLERANCE
        return {
            "outcome": "equal" if good else f"differs at {path}",
            "worst": worst,
            "seconds": time.perf_counter() - began,
        }


@click.command()
@click.option("--models", default=",".join((*ZOO, *STEPS)), show_default=True)
@click.option(
    "--out",
    default="pipeline_matrix.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
def main(models: str, out: Path) -> None:
    """Run what is missing and say what is not equal."""
    done: dict[str, dict[str, Any]] = {}
    if out.exists():
        rows = map(json.loads, out.read_text().splitlines())
        done = {row["key"]: row for row in rows}
    for case in sorted(cases(), key=lambda case: case.model):
        if case.model not in models.split(","):
            continue
        if str(case) not in done:
            row: dict[str, Any] = {"key": str(case)}
            try:
                row |= run(case)
            except rhino.RhinoError as error:
                row["outcome"] = f"error: {error}"
            done[str(case)] = row
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            jax.clear_caches()
        click.echo(f"{case}: {done[str(case)]['outcome']}")
    equal = sum(row["outcome"] == "equal" for row in done.values())
    click.echo(f"{equal} of {len(done)} cases equal")


if __name__ == "__main__":
    main()
