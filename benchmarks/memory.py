"""Predicted against compiled: peak memory a device, and arithmetic where it is counted.

Compiles for hardware that is not here, with its real compiler (facts are kept on disk).
Predictions are made anew each time. Run ``python -m benchmarks.memory --help``.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models import NAMES, build
from rhino_jax.api.planned import subject_of
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.model import Prediction, predict
from rhino_jax.rules import rule_of
from rhino_jax.search.recipes import RECIPES, applies
from rhino_jax.verify.facts import CompiledFacts

MESHES = {"h100:2x8": {"data": 2, "tensor": 8}, "v5e:4x4": {"data": 4, "tensor": 4}}
MIB = 2**20
CLOSE = 0.25


@dataclass(frozen=True)
class Cell:
    """One model, recipe and cluster: what was predicted, what the compiler says."""

    name: str
    recipe: str
    cluster: str
    depth: int
    predicted: Prediction
    facts: CompiledFacts
    predict_seconds: float

    @property
    def compiled_bytes(self) -> int:
        """The compiler's peak; arguments and temporaries where it gives none."""
        assert self.facts.memory is not None
        return self.facts.memory.peak_bytes or self.facts.memory.live_bytes

    @property
    def ratio(self) -> float:
        return self.predicted.peak_bytes / self.compiled_bytes


def cell(name: str, recipe: str, cluster: str, size: str, depth: int) -> Cell | None:
    """One line of the table; None where the recipe has nothing to do."""
    model = build(name, size=size, depth=depth)
    planned = rhino.plan(
        model.train_step,
        model.state_shapes,
        model.batch_shapes,
        cluster=cluster,
        mesh=MESHES.get(cluster),
        recipe=recipe,
    )
    plan, traced = planned.plan, planned.traced
    if not applies(RECIPES[recipe], subject_of(traced), plan.mesh):
        return None
    began = time.perf_counter()
    predicted = predict(
        traced.program,
        plan.assignment,
        plan.mesh,
        parse_cluster(cluster),
        rule_of,
        tuple(traced.donated),
    )
    spent = time.perf_counter() - began
    facts = planned.compile_only()
    return Cell(name, recipe, cluster, depth, predicted, facts, spent)


def row(found: Cell) -> tuple[str, ...]:
    """One line of the table in words."""
    head = (found.name, found.recipe, found.cluster, str(found.depth))
    if not found.facts.ok or found.facts.memory is None:
        return (*head, f"{found.facts.outcome}: {found.facts.message[:80]}")
    top, memory = found.predicted.memory, found.facts.memory
    named = ", ".join(f"{what} {n / MIB:.0f}" for what, n in top.at_peak[:3])
    counted = found.facts.flops_once
    return (
        *head,
        f"{top.peak_bytes / MIB:.1f}",
        f"{found.compiled_bytes / MIB:.1f}",
        f"{found.ratio:.3f}",
        f"{top.temp_bytes / MIB:.0f} / {memory.temp_bytes / MIB:.0f}",
        f"{found.predicted.flops / counted:.3f}" if counted else "",
        f"{top.where} ({named})",
    )


HEAD = (
    *("model", "recipe", "cluster", "depth", "predicted, MiB", "compiled, MiB"),
    *("ratio", "temporaries", "flops", "at"),
)


@click.command()
@click.option("--models", default=",".join(NAMES), show_default=True)
@click.option("--recipes", default=",".join(RECIPES), show_default=True)
@click.option("--clusters", default="h100:2x8", show_default=True)
@click.option("--size", default="medium", show_default=True)
@click.option("--depths", default="2,4", show_default=True)
@click.option("--cells", default=0, help="Stop after this many; 0 is all.")
def main(
    models: str, recipes: str, clusters: str, size: str, depths: str, cells: int
) -> None:
    """Compile every cell, one after the other, and print the table.

    The compiler's count of arithmetic takes loop bodies once and all ops; ours takes
    loops in full and products alone: compare the unrolled models.
    """
    console = Console(width=170)
    table = Table(*HEAD)
    errors: list[float] = []
    grid = (
        (name, recipe, cluster, int(depth))
        for cluster in clusters.split(",")
        for depth in depths.split(",")
        for name in models.split(",")
        for recipe in recipes.split(",")
    )
    for name, recipe, cluster, depth in grid:
        if cells and table.row_count >= cells:
            break
        found = cell(name, recipe, cluster, size, depth)
        if found is None:
            continue
        table.add_row(*row(found))
        console.print(*row(found))
        if found.facts.ok and found.facts.memory:
            errors.append(abs(found.ratio - 1))
    console.print(table)
    if errors:
        close = sum(error <= CLOSE for error in errors)
        console.print(
            f"{len(errors)} cells: median error {statistics.median(errors):.1%}, "
            f"largest {max(errors):.1%}, {close} within {CLOSE:.0%}"
        )


if __name__ == "__main__":
    main()
