"""How long a search takes, and that it does not grow with depth.

Plans an unrolled GPT (hidden 2048: 1.3B parameters at 24 layers) for two hosts of eight
H100 from shapes alone, at both levels, and again with four times the layers. Tracing
and reading the program are timed apart. ``python -m benchmarks.search_time --help``.
"""

from __future__ import annotations

import time
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.models import build
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import MARGIN, traced_bare
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.options import make_options
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Wish
from rhino_jax.search.meshes import candidate_meshes

GOAL_SECONDS = {1: 5.0, 2: 20.0}
GOAL_GROWTH = 1.5
GOAL_READING_SECONDS = 100e-6


def measured(
    model: str, depth: int, cluster_name: str, levels: tuple[int, ...], tight: float
) -> dict[str, Any]:
    """Seconds to trace, and to search at each level; what was found.

    ``tight`` is the memory there is, as a share of what the fastest plan needs; 0 is
    the device's.
    """
    made = build(model, size="large", depth=depth)
    began = time.perf_counter()
    traced = traced_bare(
        made.train_step, (made.state_shapes, made.batch_shapes), {}, make_options()
    )
    row: dict[str, Any] = {
        "depth": depth,
        "ops": len(traced.program.ops),
        "trace_seconds": time.perf_counter() - began,
    }
    cluster = parse_cluster(cluster_name)
    limit = int(cluster.device.memory_bytes * MARGIN)
    subject = subject_of(traced)

    def wish_of(level: int, limit_bytes: int) -> Wish:
        meshes = candidate_meshes(cluster, level)
        return Wish(cluster, meshes, limit_bytes, level, donated=traced.donated)

    if tight:
        free = plan_search(subject, wish_of(1, 2**60)).best.prediction
        limit = int(free.peak_bytes * tight)
    for level in levels:
        wish = wish_of(level, limit)
        began = time.perf_counter()
        found = plan_search(subject, wish)
        row[f"level_{level}_seconds"] = time.perf_counter() - began
        programs = {
            c.subject.program.digest: c.subject.program for c in found.considered
        }
        row[f"level_{level}_reading"] = found.reading_seconds
        row[f"level_{level}_writing"] = found.writing_seconds
        row[f"level_{level}_read"] = sum(len(p.ops) for p in programs.values())
        row[f"level_{level}_plan"] = str(found.best)
        took = row[f"level_{level}_seconds"]
        del found  # what it takes to free it is not the next search's
        click.echo(f"{depth} layers, level {level}: {took:.1f} s", err=True)
    return row


@click.command()
@click.option("--model", default="gpt_unrolled", show_default=True)
@click.option("--cluster", default="h100:2x8", show_default=True)
@click.option("--depths", default="24,96", show_default=True)
@click.option("--levels", default="1,2", show_default=True)
@click.option(
    "--tight", default=0.0, help="Memory, as a share of the fastest plan's; 0: all."
)
def main(model: str, cluster: str, depths: str, levels: str, tight: float) -> None:
    """Print seconds by depth and level; exit 1 where a goal is missed."""
    wanted = tuple(int(level) for level in levels.split(","))
    rows = [measured(model, int(d), cluster, wanted, tight) for d in depths.split(",")]
    table = Table(title=f"{model} on {cluster}", box=None)
    for heading in (
        "layers",
        "ops",
        "trace s",
        "level",
        "read s",
        "us an op",
        "write s",
        "search s",
        "plan",
    ):
        table.add_column(heading)
    missed = []
    for level in wanted:
        alone = []
        for row in rows:
            read, wrote, ops, total = (
                row[f"level_{level}_{what}"]
                for what in ("reading", "writing", "read", "seconds")
            )
            alone.append(total - read - wrote)
            if read > GOAL_READING_SECONDS * ops:
                missed.append(f"reading: {read / ops * 1e6:.0f} us an op")
            table.add_row(
                str(row["depth"]),
                str(row["ops"]),
                f"{row['trace_seconds']:.1f}",
                str(level),
                f"{read:.2f}",
                f"{read / ops * 1e6:.0f}",
                f"{wrote:.2f}",
                f"{alone[-1]:.2f}",
                row[f"level_{level}_plan"],
            )
        if not tight and rows[0][f"level_{level}_seconds"] > GOAL_SECONDS[level]:
            missed.append(f"level {level}: over {GOAL_SECONDS[level]} s")
        if len(alone) > 1 and alone[-1] > GOAL_GROWTH * alone[0]:
            missed.append(f"level {level}: grows {alone[-1] / alone[0]:.2f} times")
    console = Console(width=140)
    console.print(table)
    for what in missed:
        console.print(f"missed: {what}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
