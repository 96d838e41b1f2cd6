"""Is the compiled program the plan? Planned against compiled wire bytes per mesh axis.

Compiles for hardware that is not here, with its real compiler. For every model of the
zoo, recipe and cluster: bytes per mesh axis, collectives nobody planned, and the same
for ``lowering="auto"``. Run ``python -m benchmarks.fidelity --help``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.kept import by_key, keep
from benchmarks.models import FIRST, build
from rhino_jax.errors import OptionsError
from rhino_jax.search.recipes import RECIPES
from rhino_jax.verify.audit import Audit, audit

MESHES = {"h100:2x8": {"data": 2, "tensor": 8}, "v5e:4x4": {"data": 4, "tensor": 4}}
TOLERANCE = 0.05
TINY_BYTES = 4096


def cell(
    name: str, recipe: str, cluster: str, lowering: str, size: str, depth: int
) -> dict[str, Any]:
    """One line of the table, or why there is none."""
    model = build(name, size=size, depth=depth)
    began = time.perf_counter()
    try:
        planned = rhino.plan(
            model.train_step,
            model.state_shapes,
            model.batch_shapes,
            cluster=cluster,
            mesh=MESHES.get(cluster),
            recipe=recipe,
            lowering=lowering,
        )
    except OptionsError as error:
        if "needs" in str(error):
            return {"outcome": "does not apply"}
        raise
    return {"plan_seconds": time.perf_counter() - began, **compiled(planned)}


def compiled(planned: rhino.Planned) -> dict[str, Any]:
    """What a compiler makes of a plan: bytes by axis beside the planned ones, and
    collectives that only one of both has; or why there is nothing."""
    began = time.perf_counter()
    facts = planned.compile_only()
    compile_seconds = time.perf_counter() - began
    if not facts.ok:
        return {"outcome": f"{facts.outcome}: {facts.message[:300]}"}
    found: Audit = audit(planned.planned_collectives(), facts, planned.plan.mesh.shape)
    return {
        "outcome": "ok",
        "axes": {
            row.axes: [row.planned_bytes, row.compiled_bytes, row.ratio]
            for row in found.rows
        },
        "extra": [str(one) for one in found.extra],
        "missing": [str(one) for one in found.missing],
        "faithful": found.ok,
        "compiled_bytes": facts.memory.peak_bytes if facts.memory else 0,
        "compile_seconds": compile_seconds,
    }


def faithful(row: dict[str, Any]) -> bool:
    """Every axis within 5 %, and no collective that nobody planned.

    Axes that carry less than :data:`TINY_BYTES` (a few scalars) are not judged:
    compilers merge and split those as they like.
    """
    if row["outcome"] != "ok":
        return False
    close = all(
        abs(ratio - 1) <= TOLERANCE
        for planned, compiled, ratio in row["axes"].values()
        if max(planned, compiled) >= TINY_BYTES
    )
    return close and not row["extra"]


@click.command()
@click.option("--models", default=",".join(FIRST), show_default=True)
@click.option("--recipes", default=",".join(RECIPES), show_default=True)
@click.option("--clusters", default=",".join(MESHES), show_default=True)
@click.option("--lowerings", default="manual,auto", show_default=True)
@click.option("--size", default="medium", show_default=True)
@click.option("--depth", default=2, show_default=True)
@click.option(
    "--out",
    default="fidelity.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Results; cells already there are not run again.",
)
def main(
    models: str,
    recipes: str,
    clusters: str,
    lowerings: str,
    size: str,
    depth: int,
    out: Path,
) -> None:
    """Compile every cell and print the table."""
    console = Console(width=150)
    done = by_key(out)
    table = Table("model", "recipe", "cluster", "lowering", "axes planned/compiled", "")
    bad = 0
    for cluster in clusters.split(","):
        for name in models.split(","):
            for recipe in recipes.split(","):
                for lowering in lowerings.split(","):
                    key = f"{name}|{recipe}|{cluster}|{lowering}|{size}|{depth}"
                    if key not in done:
                        row = cell(name, recipe, cluster, lowering, size, depth)
                        done[key] = {"key": key, **row}
                        keep(out, done[key])
                    row = done[key]
                    if row["outcome"] == "does not apply":
                        continue
                    text = "; ".join(
                        f"{axes} {a / 2**20:.1f}/{b / 2**20:.1f} MiB ({ratio:.3f})"
                        for axes, (a, b, ratio) in row.get("axes", {}).items()
                    )
                    verdict = "faithful" if faithful(row) else row["outcome"]
                    if row["outcome"] == "ok" and not faithful(row):
                        verdict = f"{len(row['extra'])} extra"
                    bad += lowering == "manual" and not faithful(row)
                    table.add_row(name, recipe, cluster, lowering, text, verdict)
                    console.print(name, recipe, cluster, lowering, text, verdict)
    console.print(table)
    console.print(f"{bad} manual cells are not faithful")


if __name__ == "__main__":
    main()
