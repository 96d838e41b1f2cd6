"""What every schedule waits for and keeps, and whether its clock is what papers say.

Prints, for pipelines of equal stages (a forward task takes 1, each half of a backward
task 1), the share of the makespan in which the worst worker waits, and the most that a
worker keeps, in shares of what all layers save for one microbatch. All schedules cut
the same layers: where a worker runs v stages, each is v times smaller.

With ``--sweep FILE``: simulates every schedule with 1 to 128 microbatches instead, and
compares makespan and in-flight counts with the closed forms, to the unit; what FILE has
already is not run again. ``--workers 1-64`` takes about half an hour.
``python -m benchmarks.schedules --help``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.kept import keep, rows
from rhino_jax.schedule import SCHEDULES, Schedule, make_schedule
from rhino_jax.schedule.closed_forms import in_flight, makespan_seconds
from rhino_jax.schedule.generate import LOOPED
from rhino_jax.schedule.memory import in_flight as counted
from rhino_jax.schedule.simulate import Timeline, simulate

MICROBATCHES = range(1, 129)
VERSIONS = [
    (name, v) for name in SCHEDULES for v in ((2, 4) if name in LOOPED else (1,))
]


def clock(schedule: Schedule) -> Timeline:
    """Equal stages, every half of a task 1."""
    ticks = {
        "forward": 1,
        "backward": 2,
        "backward_input": 1,
        "backward_weight": 1,
    }
    stages = schedule.num_stages
    return simulate(schedule, {kind: [t] * stages for kind, t in ticks.items()})


def as_told(name: str, p: int, m: int, v: int) -> bool:
    """Whether simulated makespan and in-flight counts are those of the closed forms."""
    schedule = make_schedule(name, p, m, v)
    halves = (1, 1) if name == "zero_bubble" else (2, 0)
    told = makespan_seconds(
        name, p, m, v, forward=1, backward=halves[0], weight=halves[1]
    )
    return clock(schedule).makespan_seconds == told and counted(schedule) == in_flight(
        name, p, m, v
    )


def sweep(
    workers: Iterable[int], done: set[tuple[str, int, int]]
) -> Iterator[dict[str, object]]:
    """One row per schedule and number of workers, all numbers of microbatches."""
    for p in workers:
        for name, v in VERSIONS:
            if v <= 2 and (name, v, p) not in done:
                began = time.perf_counter()
                wrong = [m for m in MICROBATCHES if not as_told(name, p, m, v)]
                gc.collect()
                seconds = round(time.perf_counter() - began, 1)
                yield {"key": [name, v, p], "wrong": wrong, "seconds": seconds}


def run_sweep(file: Path, workers: Iterable[int]) -> int:
    """Append what is missing to ``file``; how many pipelines are not as told."""
    found = rows(file)
    for row in sweep(workers, {tuple(row["key"]) for row in found}):
        found.append(row)
        keep(file, row)
    wrong = sum(len(row["wrong"]) for row in found)
    click.echo(
        f"{len(found) * len(MICROBATCHES)} pipelines simulated, {wrong} not as told"
    )
    return wrong


def numbers(text: str) -> list[int]:
    """The numbers in "1,3-5".

    >>> numbers("1,3-5")
    [1, 3, 4, 5]
    """
    bounds = [list(map(int, part.split("-"))) for part in text.split(",")]
    return [n for bound in bounds for n in range(bound[0], bound[-1] + 1)]


def table_of(microbatches: list[int], workers: list[int]) -> Table:
    """Bubble and memory of all schedules on a grid."""
    table = Table(title="bubble of the worst worker | kept by the fullest", box=None)
    table.add_column("schedule")
    grid = [(p, m) for p in workers for m in microbatches]
    for p, m in grid:
        table.add_column(f"p={p} m={m}", justify="right")
    for name, v in VERSIONS:
        cells = []
        for p, m in grid:
            schedule = make_schedule(name, p, m, v)
            bubble = max(clock(schedule).bubbles())
            kept = max(counted(schedule)) / (p * v)
            cells.append(f"{bubble:.1%} | {kept:.2f}")
        table.add_row(name if v == 1 else f"{name}, {v} a worker", *cells)
    return table


@click.command()
@click.option("--workers", default="4,8,16", show_default=True)
@click.option("--microbatches", default="8,32", show_default=True)
@click.option("--sweep", "file", type=click.Path(path_type=Path), default=None)
def main(workers: str, microbatches: str, file: Path | None) -> None:
    """Print the table, or sweep; exit 1 where a clock is not as told."""
    if file is not None:
        gc.disable()  # millions of small objects, none of them in a cycle
        raise SystemExit(1 if run_sweep(file, numbers(workers)) else 0)
    table = table_of(numbers(microbatches), numbers(workers))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
