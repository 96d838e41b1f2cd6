"""Is the found plan ever dearer than an expert's, and does it do what it says?

For every model of the zoo and every cluster: the searched plan against every recipe, on
one axis and on mixes of two, under the same prices and memory limit; then, compiled for
that cluster with its real compiler (no device needed), the bytes that it moves and the
memory that it takes. Results are kept in a file; cells already there are not run
again. ``python -m benchmarks.plan_quality --help``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.kept import by_key, keep
from benchmarks.models import FIRST, build
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import MARGIN, traced_bare
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster, linked
from rhino_jax.cost.model import Prediction, predict
from rhino_jax.ir.mesh import Mesh
from rhino_jax.options import make_options
from rhino_jax.rules import rule_of
from rhino_jax.search.choose import plan_recipe
from rhino_jax.search.recipes import RECIPES, applies
from rhino_jax.trace import Traced
from rhino_jax.verify.audit import audit

CLUSTERS = ("h100:1x8", "h100:4x8", "v5e:8x8")
MOST_MOVED = 1.05


def meshes(cluster: Cluster, tensor: bool) -> Iterator[Mesh]:
    """One data axis (the torus's own on a TPU), or data and tensor axes."""
    count = cluster.num_devices
    if tensor:
        for width in (2, 4, 8):
            yield Mesh.of(data=count // width, tensor=width)
    elif len(cluster.grid) > 1:
        names = (f"data{i}" for i in range(len(cluster.grid)))
        yield Mesh.of(**dict(zip(names, cluster.grid, strict=True)))
    else:
        yield Mesh.of(data=count)


def experts(traced: Traced, cluster: Cluster) -> Iterator[tuple[str, Prediction]]:
    """Every recipe that applies, on every mesh, priced as the search prices."""
    subject = subject_of(traced)
    for name, recipe in RECIPES.items():
        for mesh in meshes(cluster, recipe.tensor):
            on = linked(cluster, mesh)
            if applies(recipe, subject, on):
                _, assignment = plan_recipe(subject, on, name, {})
                yield (
                    f"{name} ({mesh})",
                    predict(
                        subject.program,
                        assignment,
                        on,
                        cluster,
                        rule_of,
                        traced.donated,
                    ),
                )


def cell(name: str, cluster_name: str, size: str, depth: int) -> dict[str, Any]:
    """One model on one cluster."""
    cluster = parse_cluster(cluster_name)
    model = build(name, size=size, depth=depth)
    args = (model.state_shapes, model.batch_shapes)
    began = time.perf_counter()
    planned = rhino.plan(
        model.train_step, *args, cluster=cluster_name, pipeline_stages=1, cache_dir=""
    )
    seconds = time.perf_counter() - began
    limit = int(cluster.device.memory_bytes * MARGIN)
    traced = traced_bare(model.train_step, args, {}, make_options())
    rivals = {
        what: one.step_seconds
        for what, one in experts(traced, cluster)
        if one.peak_bytes <= limit
    }
    assert planned.predicted is not None
    row: dict[str, Any] = {
        "seconds": seconds,
        "mesh": str(planned.plan.mesh),
        "found": planned.predicted.step_seconds,
        "best": min(rivals.items(), key=lambda item: item[1]),
        "rivals": len(rivals),
        "peak": planned.predicted.peak_bytes,
    }
    facts = planned.compile_only()
    if not facts.ok:
        return {**row, "compiled": facts.outcome, "message": facts.message[:300]}
    found = audit(planned.planned_collectives(), facts, planned.plan.mesh.shape)
    moved = sum(r.compiled_bytes for r in found.rows)
    asked = sum(r.planned_bytes for r in found.rows)
    memory = facts.memory.peak_bytes
    return {
        **row,
        "compiled": "ok",
        "moved": moved,
        "asked": asked,
        "memory": memory,
        "fits": memory <= cluster.device.memory_bytes,
        "extra": [str(one) for one in found.extra],
    }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a cell."""
    found = []
    if row.get("error"):
        return [row["error"]]
    if row["rivals"] < 2:
        found.append(f"only {row['rivals']} recipes fit: choose another size")
    if row["found"] > row["best"][1] * (1 + 1e-9):
        found.append(f"dearer than {row['best'][0]}")
    if row["compiled"] != "ok":
        return [*found, f"{row['compiled']}: {row.get('message', '')[:80]}"]
    if row["moved"] > MOST_MOVED * row["asked"] + 4096:
        found.append(f"moves {row['moved'] / max(row['asked'], 1):.2f} times")
    if not row["fits"]:
        found.append("does not fit")
    return found


@click.command()
@click.option("--models", default=",".join(FIRST), show_default=True)
@click.option("--clusters", default=",".join(CLUSTERS), show_default=True)
@click.option("--size", default="medium", show_default=True)
@click.option("--depth", default=2, show_default=True)
@click.option(
    "--out",
    default="plan_quality.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
def main(models: str, clusters: str, size: str, depth: int, out: Path) -> None:
    """Run what is missing, print the table, exit 1 where something is wrong."""
    done = by_key(out)
    table = Table(box=None)
    for heading in ("model", "cluster", "mesh", "found ms", "best expert", "ms"):
        table.add_column(heading)
    table.add_column("moved/asked MiB")
    table.add_column("peak/predicted MiB")
    table.add_column("wrong")
    wrong = 0
    for name in models.split(","):
        for cluster in clusters.split(","):
            key = f"{name}|{cluster}|{size}|{depth}"
            if key not in done:
                try:
                    done[key] = {"key": key, **cell(name, cluster, size, depth)}
                except rhino.RhinoError as error:
                    done[key] = {"key": key, "error": str(error)}
                keep(out, done[key])
            row = done[key]
            found = faults(row)
            wrong += bool(found)
            click.echo(f"{key}: {'; '.join(found) or 'good'}")
            if not row.get("error"):
                table.add_row(
                    name,
                    cluster,
                    row["mesh"],
                    f"{row['found'] * 1e3:.3f}",
                    row["best"][0],
                    f"{row['best'][1] * 1e3:.3f}",
                    f"{row.get('moved', 0) / 2**20:.1f}/"
                    f"{row.get('asked', 0) / 2**20:.1f}",
                    f"{row.get('memory', 0) / 2**20:.0f}/{row['peak'] / 2**20:.0f}",
                    "; ".join(found),
                )
    Console(width=160).print(table)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
