"""Is a pipeline of equal stages, as one compiled program, the plan?

Compiles the scanned GPT for hardware that is not here, with its real compiler: 2, 4
and 8 stages, GPipe and circular, layers rematerialized or not. For every cell: wire
bytes planned and compiled per mesh axis, collectives that nobody planned, and predicted
beside compiled memory. ``python -m benchmarks.pipeline_spmd --help``.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import click

import rhino_jax as rhino
from benchmarks.fidelity import compiled, faithful
from benchmarks.kept import by_key, keep
from benchmarks.models.gpt_scanned import build

MESHES = {
    "h100:8x8": {2: {"data": 4, "tensor": 8}, 4: {"data": 2, "tensor": 8}, 8: {"y": 8}},
    "v5p:4x4x4": {
        2: {"data": 8, "tensor": 4},
        4: {"data": 4, "tensor": 4},
        8: {"data": 2, "tensor": 4},
    },
}
"""Of the devices of one stage, by their number."""
SCHEDULES = {"gpipe": 1, "circular": 2}
"""Rounds: groups of layers that a stage holds."""


@dataclass(frozen=True)
class Case:
    """One cell. ``workers`` are the stages that run side by side; ``microbatches`` 0
    leaves them to the search."""

    cluster: str
    workers: int
    schedule: str
    recipe: str
    remat: bool
    size: str
    depth: int
    microbatches: int

    def __str__(self) -> str:
        return "|".join(map(str, astuple(self)))


def cell(case: Case) -> dict[str, Any]:
    """One line of the table."""
    model = build(case.size, depth=case.depth, dtype="bfloat16", remat=case.remat)
    began = time.perf_counter()
    planned = rhino.plan(
        model.train_step,
        model.state_shapes,
        model.batch_shapes,
        cluster=case.cluster,
        mesh=MESHES[case.cluster][case.workers],
        pipeline_stages=case.workers * SCHEDULES[case.schedule],
        schedule=case.schedule,
        microbatches=case.microbatches or None,
        recipe="" if case.recipe == "search" else case.recipe,
        cache_dir="",
    )
    return {
        "plan_seconds": time.perf_counter() - began,
        "predicted_bytes": planned.prediction().peak_bytes,
        **compiled(planned),
    }


def text(row: dict[str, Any]) -> str:
    """A cell as one line."""
    if row["outcome"] != "ok":
        return str(row["outcome"])
    axes = "; ".join(
        f"{axis} {a / 2**20:.1f}/{b / 2**20:.1f} MiB"
        for axis, (a, b, _) in row["axes"].items()
    )
    verdict = "faithful" if faithful(row) else f"{len(row['extra'])} extra"
    ours, theirs = row["predicted_bytes"], row["compiled_bytes"]
    memory = f"{ours / 2**30:.2f}/{theirs / 2**30:.2f} GiB"
    return f"{axes}; memory {memory}: {verdict}"


@click.command()
@click.option("--clusters", default=",".join(MESHES), show_default=True)
@click.option("--workers", default="2,4,8", show_default=True)
@click.option("--schedules", default=",".join(SCHEDULES), show_default=True)
@click.option("--recipes", default="megatron,search", show_default=True)
@click.option("--remat", default="yes,no", show_default=True)
@click.option("--size", default="large", show_default=True)
@click.option("--depth", default=16, show_default=True)
@click.option("--microbatches", default=0, show_default=True)
@click.option(
    "--out",
    default="pipeline_spmd.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Results; cells already there are not run again.",
)
def main(
    clusters: str,
    workers: str,
    schedules: str,
    recipes: str,
    remat: str,
    size: str,
    depth: int,
    microbatches: int,
    out: Path,
) -> None:
    """Compile what is missing and say what is not the plan."""
    done = by_key(out)
    asked = (s.split(",") for s in (clusters, workers, schedules, recipes, remat))
    good = every = 0
    for cluster, count, schedule, recipe, kept in itertools.product(*asked):
        case = Case(
            cluster,
            int(count),
            schedule,
            recipe,
            kept == "yes",
            size,
            depth,
            microbatches,
        )
        if str(case) not in done:
            row = {"key": str(case)}
            try:
                row |= cell(case)
            except rhino.RhinoError as error:
                row["outcome"] = f"error: {error}"
            done[str(case)] = row
            keep(out, row)
        every += 1
        good += faithful(done[str(case)])
        click.echo(f"{case}: {text(done[str(case)])}")
    click.echo(f"{good} of {every} cells faithful")


if __name__ == "__main__":
    main()
