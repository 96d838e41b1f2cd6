"""Do models of 7, 70 and 175 billion parameters get plans that fit?

Scanned, rematerialized GPTs (flax linen, bfloat16 compute, float32 state, clip and
adamw) for the smallest sensible clusters, and the largest for 1,024 GPUs and 2,048 TPU
chips; nothing configured. Each plan is compiled for its cluster by the real compiler,
which says what memory it takes.
``python -m benchmarks.large_models --help``.
"""

from __future__ import annotations

import time

import click
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models import build
from rhino_jax.cluster.parse import parse_cluster

CASES = (
    *(("7B", "h100:1x8"), ("70B", "h100:4x8"), ("175B", "h100:8x8")),
    *(("175B-pod", "h100:128x8"), ("175B-pod", "v5p:8x16x16")),
)
GIB = 2**30


def planned_and_compiled(size: str, cluster: str) -> tuple[list[str], bool]:
    """One row of the table, and whether it fits."""
    model = build("gpt_scanned", size=size, dtype="bfloat16")
    began = time.perf_counter()
    planned = rhino.plan(
        model.train_step,
        model.state_shapes,
        model.batch_shapes,
        cluster=cluster,
        pipeline_stages=1,
        cache_dir="",
    )
    seconds = time.perf_counter() - began
    plan, predicted = planned.plan, planned.predicted
    assert predicted is not None
    facts = planned.compile_only()
    capacity = parse_cluster(cluster).device.memory_bytes
    peak = facts.memory.peak_bytes if facts.ok else 0
    fits = facts.ok and peak <= capacity
    row = [
        size,
        cluster,
        str(plan.mesh),
        str(plan.microbatches),
        f"{seconds:.1f}",
        f"{predicted.step_seconds:.2f}",
        f"{predicted.peak_bytes / GIB:.1f}",
        f"{peak / GIB:.1f}" if facts.ok else facts.outcome,
        f"{capacity / GIB:.1f}",
        "yes" if fits else "no",
    ]
    return row, fits


@click.command()
@click.option("--only", default="", help="A size or cluster, such as 7B.")
def main(only: str) -> None:
    """Print the table; exit 1 where a plan does not fit."""
    table = Table(box=None)
    for heading in (
        *("model", "cluster", "mesh", "microbatches", "plan s", "step s"),
        *("predicted GiB", "compiled GiB", "device GiB", "fits"),
    ):
        table.add_column(heading)
    good = True
    for size, cluster in CASES:
        if only in ("", size, cluster):
            row, fits = planned_and_compiled(size, cluster)
            table.add_row(*row)
            click.echo(" ".join(row))
            good &= fits
    Console(width=140).print(table)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
