"""How far cuts into stages are from the best on the clock, and how long they take.

For random chains that are short enough to try all cuts: the makespan of the cuts with
the least estimate, and of those that are found from there, over the least of all.
Backward tasks take twice their forward tasks, as in most models, or anything. Then the
seconds that 96 layers in 16 stages with 64 microbatches take, equal and not.
``python -m benchmarks.stage_cuts --help``.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator

import click
from rich.console import Console
from rich.table import Table

from rhino_jax.schedule import SCHEDULES
from rhino_jax.schedule.generate import LOOPED
from rhino_jax.search.stage_costs import Chain, Starts
from rhino_jax.search.stages import SegmentCost, StageProblem, cut_stages, supported


def chain_of(
    draw: random.Random, size: int, usual: bool
) -> tuple[tuple[SegmentCost, ...], tuple[int, ...]]:
    """Segments, and what crosses between them; ``usual``: backward is twice forward."""
    segments = []
    for _ in range(size):
        forward = draw.randint(1, 9)
        back = 2 * forward if usual else draw.randint(1, 18)
        weight = forward if usual else draw.randint(0, back)
        segments.append(SegmentCost(forward, back, weight))
    return tuple(segments), tuple(draw.randint(0, 6) for _ in range(size - 1))


def small_problem(seed: int, name: str, usual: bool) -> StageProblem:
    """6 to 11 segments in 2 to 4 stages; sending costs up to half a segment."""
    draw = random.Random(f"{name} {seed} {usual}")
    segments, cut_bytes = chain_of(draw, draw.randint(6, 11), usual)
    v = 2 if name in LOOPED else 1
    workers, microbatches = draw.randint(2, 4 // v), draw.choice([2, 4, 8, 16])
    return StageProblem(segments, cut_bytes, workers, microbatches, name, v, 0.2, 0.3)


def all_cuts(problem: StageProblem) -> Iterator[Starts]:
    stages = problem.num_workers * problem.stages_per_worker
    for rest in itertools.combinations(range(1, len(problem.segments)), stages - 1):
        yield 0, *rest


def gaps(problem: StageProblem) -> tuple[float, float]:
    """How much longer than the least of all cuts: by estimate alone, and as found."""
    chain = Chain(problem)
    least = min(chain.makespans(list(all_cuts(problem))))
    first = min(
        supported(chain, problem.memory_limit_bytes),
        key=lambda starts: (chain.estimate(starts), starts),
    )
    by_estimate, found = chain.makespans([first, cut_stages(problem).starts])
    return by_estimate / least - 1, found / least - 1


def seconds_of(name: str, equal: bool) -> float:
    """What the search takes for 96 layers."""
    draw = random.Random(0)
    segments, cut_bytes = chain_of(draw, 96, True)
    if equal:
        segments, cut_bytes = segments[:1] * 96, cut_bytes[:1] * 95
    v = 2 if name in LOOPED else 1
    problem = StageProblem(segments, cut_bytes, 16 // v, 64, name, v, 0.1, 0.1)
    began = time.perf_counter()
    cut_stages(problem)
    return time.perf_counter() - began


@click.command()
@click.option("--chains", default=60, show_default=True, help="Of each kind.")
def main(chains: int) -> None:
    """Print how much longer steps are than they must be, mean and worst."""
    table = Table(box=None)
    headings = ("schedule", "backward", "by estimate", "found", "best found")
    for heading in (*headings, "96 equal s", "96 unequal s"):
        table.add_column(heading)
    for name in SCHEDULES:
        for usual in (True, False):
            rows = [gaps(small_problem(s, name, usual)) for s in range(chains)]
            cells = []
            for column in zip(*rows, strict=True):
                mean, worst = statistics.mean(column), max(column)
                cells.append(f"+{mean:.2%}, at most {worst:.1%}")
            best = sum(found < 1e-9 for _, found in rows)
            took = [
                f"{seconds_of(name, e):.2f}" if usual else "" for e in (True, False)
            ]
            kind = "twice forward" if usual else "any"
            table.add_row(name, kind, *cells, f"{best} of {chains}", *took)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
