"""Is the pipelined step the undecorated step? Every pair of settings, by running.

On 16 simulated CPU devices, in float64: the losses of 2 steps and the state after them,
per leaf as in :mod:`benchmarks.equality`. Cases cover every pair of model, number of
stages, mesh of one worker, schedule, recipe and number of processes (``rhino launch``)
that can go together. Results are kept in a file; cases already there are not run again.
``python -m benchmarks.pipeline_matrix --help``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
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
from benchmarks.kept import by_key, keep
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
DEVICES = 16
PROCESSES = (1, 2, 4)


@dataclass(frozen=True)
class Case:
    """One setting of everything; ``mesh`` is that of one worker."""

    model: str
    stages: int
    mesh: str
    schedule: str
    recipe: str
    processes: int

    def __str__(self) -> str:
        return "|".join(map(str, astuple(self)))

    @property
    def workers(self) -> int:
        return self.stages // (2 if self.schedule in LOOPED else 1)

    @property
    def devices(self) -> int:
        return self.workers * math.prod(MESHES[self.mesh].values())

    @property
    def microbatches(self) -> int:
        return MICROBATCHES.get(self.model, 4)


def possible(case: Case) -> bool:
    """Whether a case asks for nothing that contradicts itself."""
    if case.devices % case.processes:
        return False
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
                (*ZOO, *STEPS),
                (2, 4),
                tuple(MESHES),
                tuple(SCHEDULES),
                RECIPES,
                PROCESSES,
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
    """As many devices of every process, workers along the leading axis."""
    axes = {"stage": case.workers, **MESHES[case.mesh]}
    by_process = np.array(jax.devices(), object).reshape(case.processes, -1)
    devices = by_process[:, : case.devices // case.processes]
    return jax.sharding.Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


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
        worst, path = worst_leaf(expected, piped.fetch(now))
        apart = max(abs(a - b) for a, b in zip(losses, found, strict=True))
        good = worst <= STATE_TOLERANCE and apart <= STATE_TOLERANCE
        return {
            "outcome": "equal" if good else f"differs at {path}",
            "worst": worst,
            "seconds": time.perf_counter() - began,
        }


def run_here(wanted: Iterable[Case], out: Path) -> None:
    """Run cases in this process, with the others where there are; the first writes."""
    for case in wanted:
        row: dict[str, Any] = {"key": str(case)}
        try:
            row |= run(case)
        except rhino.RhinoError as error:
            row["outcome"] = f"error: {error}"
        if jax.process_index() == 0:
            keep(out, row)
        jax.clear_caches()


def launched(processes: int, wanted: list[Case], out: Path) -> None:
    """Run cases on several processes; one over which they end is written down, and the
    rest is run without it."""
    with tempfile.TemporaryDirectory() as folder:
        left = wanted
        while left:
            names = Path(folder) / "cases.json"
            names.write_text(json.dumps([str(case) for case in left]))
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "rhino_jax.cli", "launch"),
                    *("-n", str(processes), "--devices", str(DEVICES // processes)),
                    *(__file__, "--inner", str(names), "--out", str(out)),
                ],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            there = by_key(out)
            left = [case for case in left if str(case) not in there]
            if done.returncode and left:
                said = done.stderr.strip().splitlines()[-1]
                row = {"key": str(left.pop(0)), "outcome": f"ended: {said}"}
                keep(out, row)


@click.command()
@click.option("--models", default=",".join((*ZOO, *STEPS)), show_default=True)
@click.option("--processes", default="1,2,4", show_default=True)
@click.option(
    "--out",
    default="pipeline_matrix.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
@click.option("--inner", type=click.Path(path_type=Path), hidden=True)
def main(models: str, processes: str, out: Path, inner: Path | None) -> None:
    """Run what is missing and say what is not equal."""
    every = sorted(cases(), key=lambda case: case.model)
    if inner is not None:
        rhino.initialize()
        names = json.loads(inner.read_text())
        run_here([case for case in every if str(case) in names], out)
        return
    chosen = [case for case in every if case.model in models.split(",")]
    for count in map(int, processes.split(",")):
        wanted = [case for case in chosen if case.processes == count]
        there = by_key(out)
        missing = [case for case in wanted if str(case) not in there]
        if count == 1:
            run_here(missing, out)
        else:
            launched(count, missing, out)
        there = by_key(out)
        for case in wanted:
            click.echo(f"{case}: {there[str(case)]['outcome']}")
    done = by_key(out).values()
    equal = sum(row["outcome"] == "equal" for row in done)
    click.echo(f"{equal} of {len(done)} cases equal")


if __name__ == "__main__":
    main()
