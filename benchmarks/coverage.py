"""Does every model of the zoo get a plan at its published size, by rules of our own?

Plans each for a GPU cluster and a TPU torus from shapes alone (bfloat16 compute, level
1) and says how long that took, what was found, and how much of the step's products and
memory traffic is in ops without a rule and local form written for them, or in ops that
the plan leaves whole on every device. Exits 1 where an op of 1 % has neither, or a plan
does not fit. Results are kept in a file; cells already there are not planned again.
``python -m benchmarks.coverage --help``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.kept import by_key, keep
from benchmarks.models import NAMES, build
from benchmarks.primitives import how
from rhino_jax.api.planned import Planned
from rhino_jax.api.planning import plan_traced, traced_bare
from rhino_jax.cluster.hardware import Device
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.compute import Work, op_work
from rhino_jax.errors import InfeasibleError
from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.lower.local.registry import LOCALS
from rhino_jax.options import make_options
from rhino_jax.rules import rule_of

CLUSTERS = ("h100:4x8", "v5p:4x4x4")
IMPORTANT = 0.01
ALONE = Mesh.of(data=1)


@dataclass(frozen=True)
class Share:
    """What one kind of op is of a whole step: products, and bytes read and written.

    Bytes are those of every op on its own, fused with nothing.
    """

    kind: str
    how: str
    flops: float
    num_bytes: float

    @property
    def is_important(self) -> bool:
        return max(self.flops, self.num_bytes) >= IMPORTANT

    def __str__(self) -> str:
        shares = f"{self.flops:.1%} of FLOPs, {self.num_bytes:.1%} of bytes"
        return f"{self.kind} ({self.how}): {shares}"


@dataclass(frozen=True)
class Cell:
    """One model on one cluster, as planned."""

    seconds: float
    trace_seconds: float
    ops: int
    mesh: str
    microbatches: int
    remat: str
    step_seconds: float
    peak_bytes: int
    limit_bytes: int
    repeated_flops: float
    repeated_bytes: float
    without: tuple[Share, ...]
    whole: tuple[Share, ...]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit_bytes


def written(op: Op) -> str:
    """How an op is planned; "" where rule and local form are written for its kind."""
    found = how(op)
    if found != "by hand":
        return found
    return "" if op.kind in LOCALS else "no local form"


def walk(
    program: Program, assignment: Assignment, turns: int = 1
) -> Iterator[tuple[int, Program, Op, OpPlan]]:
    """Every op that holds no others, and how often it runs; a `while` turns once."""
    for op, plan in zip(program.ops, assignment.ops, strict=True):
        trips = turns * (op.param["length"] if op.kind == "scan" else 1)
        for inner, body in zip(op.programs, plan.inner, strict=True):
            yield from walk(inner, body, trips)
        if not op.programs:
            yield turns, program, op, plan


def shares(planned: Planned, device: Device) -> dict[str, Any]:
    """The shares of what is not written by hand and of what is whole on every device,
    and what all devices do together, over what one would do alone."""
    plan = planned.plan
    mesh = plan.assignment.over(plan.mesh)
    alone, together = Work(), Work()
    without: dict[tuple[str, str], Work] = {}
    whole: dict[tuple[str, str], Work] = {}
    loop = plan.assignment.loop
    for turns, program, op, chosen in walk(planned.traced.program, plan.assignment):
        rule = rule_of(program, op)
        one = op_work(program, op, rule, Choice(), ALONE, device)
        mine = op_work(program, op, rule, chosen.choice, mesh, device)
        alone = alone.plus(one, turns)
        times = loop.trips if loop and _over_time(chosen) else 1
        together = together.plus(mine, turns * plan.num_devices * times)
        if written(op):
            key = (op.kind, written(op))
            without[key] = without.get(key, Work()).plus(one, turns)
        if not chosen.choice.splits:
            key = (op.kind, "whole")
            whole[key] = whole.get(key, Work()).plus(one, turns)
    return {
        "repeated_flops": _over(together.flops, alone.flops),
        "repeated_bytes": _over(together.num_bytes, alone.num_bytes),
        "without": _shares(without, alone),
        "whole": tuple(s for s in _shares(whole, alone) if s.is_important),
    }


def _over_time(chosen: OpPlan) -> bool:
    axes: Counter[str] = Counter(
        split.axis for _, splits in chosen.choice.splits for split in splits
    )
    return axes["time"] > 0


def _over(part: float, all_: float) -> float:
    return part / all_ if all_ else 1.0


def _shares(found: Mapping[tuple[str, str], Work], all_: Work) -> tuple[Share, ...]:
    each = (
        Share(
            kind,
            why,
            work.flops / max(all_.flops, 1.0),
            work.num_bytes / max(all_.num_bytes, 1.0),
        )
        for (kind, why), work in found.items()
    )
    return tuple(sorted(each, key=lambda s: (-s.flops, -s.num_bytes, s.kind)))


def cell(name: str, cluster: str, size: str) -> Cell:
    """Plan one model for one cluster.

    Raises:
        InfeasibleError: no plan fits.
    """
    model = build(name, size, dtype="bfloat16")
    options = make_options(cluster=cluster, cache_dir="")
    args = (model.state_shapes, model.batch_shapes)
    began = time.process_time()
    traced = traced_bare(model.train_step, args, {}, options)
    traced_at = time.process_time()
    planned = plan_traced(traced, options)
    done = time.process_time()
    predicted = planned.predicted
    assert predicted is not None
    return Cell(
        seconds=done - traced_at,
        trace_seconds=traced_at - began,
        ops=len(traced.program.ops),
        mesh=str(planned.plan.mesh),
        microbatches=planned.plan.microbatches,
        remat=" ".join(part for pair in planned.plan.remat for part in pair),
        step_seconds=predicted.step_seconds,
        peak_bytes=predicted.peak_bytes,
        limit_bytes=predicted.limit_bytes,
        **shares(planned, parse_cluster(cluster).device),
    )


def of_row(row: Mapping[str, Any]) -> Cell:
    """The inverse of `asdict`."""
    lists = {k: tuple(Share(**s) for s in row[k]) for k in ("without", "whole")}
    return Cell(**{**row, **lists})


HEADINGS = (
    *("model", "cluster", "ops", "trace s", "plan s", "mesh", "micro", "remat"),
    *(
        "step ms",
        "GiB",
        "of",
        "FLOPs x",
        "bytes x",
        "not by hand",
        "whole, 1 % or more",
    ),
)


def line(name: str, cluster: str, found: Cell) -> tuple[str, ...]:
    """One row of the table."""
    gib = 2**30
    return (
        *(name, cluster, str(found.ops)),
        *(f"{found.trace_seconds:.1f}", f"{found.seconds:.1f}", found.mesh),
        *(str(found.microbatches), found.remat or "-"),
        f"{found.step_seconds * 1e3:.1f}",
        *(f"{found.peak_bytes / gib:.1f}", f"{found.limit_bytes / gib:.1f}"),
        *(f"{found.repeated_flops:.2f}", f"{found.repeated_bytes:.2f}"),
        "; ".join(map(str, found.without)) or "-",
        "; ".join(map(str, found.whole)) or "-",
    )


@click.command()
@click.option("--models", default=",".join(NAMES), show_default=True)
@click.option("--clusters", default=",".join(CLUSTERS), show_default=True)
@click.option("--size", default="large", show_default=True)
@click.option(
    "--out",
    default="coverage.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
def main(models: str, clusters: str, size: str, out: Path) -> None:
    """Plan what is missing, print the table, exit 1 where something is missing."""
    done = by_key(out)
    table = Table(box=None)
    for heading in HEADINGS:
        table.add_column(heading)
    wrong = []
    for name in models.split(","):
        for cluster in clusters.split(","):
            key = f"{name}|{cluster}|{size}"
            if key not in done:
                row: dict[str, Any] = {"key": key}
                try:
                    row["cell"] = asdict(cell(name, cluster, size))
                except InfeasibleError as error:
                    row["error"] = str(error)
                done[key] = row
                keep(out, row)
            if "error" in done[key]:
                wrong.append(f"{key}: {done[key]['error']}")
                click.echo(wrong[-1])
                continue
            found = of_row(done[key]["cell"])
            click.echo(" | ".join(line(name, cluster, found)))
            table.add_row(*line(name, cluster, found))
            wrong += [f"{key}: {s}" for s in found.without if s.is_important]
            wrong += [] if found.fits else [f"{key}: does not fit"]
    Console(width=260).print(table)
    for what in wrong:
        click.echo(f"missing: {what}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
