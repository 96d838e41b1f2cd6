"""What does less memory cost? One model, planned for ever tighter limits.

The unrolled GPT for ``h100:1x8``, with limits between what it needs when nothing is
recomputed and when every layer is. Each plan is compiled by the real compiler, which
says whether it fits. ``python -m benchmarks.tight_memory --help``.
"""

from __future__ import annotations

import sys
from typing import Any

import click
import jax
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models import build

MIB = 2**20
PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of the memory between everything recomputed (0) and nothing (1)."""


def with_rows(shapes: Any, rows: int) -> Any:
    """A batch of other size."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype), shapes
    )


@click.command()
@click.option("--model", "name", default="gpt_unrolled", show_default=True)
@click.option("--cluster", default="h100:1x8", show_default=True)
@click.option("--depth", default=6, show_default=True)
@click.option("--rows", default=256, show_default=True, help="Size of the batch.")
def main(name: str, cluster: str, depth: int, rows: int) -> None:
    """Print the table; exit 1 where a plan does not fit, or is slower for nothing."""
    model = build(name, size="medium", depth=depth)
    batch = with_rows(model.batch_shapes, rows)

    def planned(**options: Any) -> Any:
        return rhino.plan(
            *(model.train_step, model.state_shapes, batch),
            **{"cluster": cluster, "cache_dir": "", **options},
        )

    none, every = planned(remat="none"), planned(remat="boundary")
    least, most = every.predicted.peak_bytes, none.predicted.peak_bytes
    table = Table(box=None)
    for heading in (
        *("limit MiB", "remat", "predicted ms", "predicted MiB", "compiled MiB"),
    ):
        table.add_column(heading, justify="right")
    good, before = True, 0.0
    for part in PARTS:
        limit = least + int(part * (most - least))
        click.echo(f"limit {limit / MIB:.0f} MiB", err=True)
        found = planned(memory_limit_bytes=limit)
        facts = found.compile_only()
        peak = facts.memory.peak_bytes if facts.ok else 0
        seconds = found.predicted.step_seconds
        fits = facts.ok and peak <= limit * 1.05
        good &= fits and seconds >= before
        before = seconds
        how = ", ".join(f"{policy} of {which}" for which, policy in found.plan.remat)
        table.add_row(
            f"{limit / MIB:.0f}",
            how or "none",
            f"{seconds * 1e3:.2f}",
            f"{found.predicted.peak_bytes / MIB:.0f}",
            f"{peak / MIB:.0f}" + ("" if fits else " (too much)"),
        )
    Console(width=120).print(table)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
