"""Does the search find the plans that experts and earlier systems published?

The rows of :mod:`benchmarks.expert.rows`: compute is free, a collective costs what its
bytes cost, no matrix product is done twice. A row passes if the found plan costs no
more; one that costs less is a finding, printed with both numbers. What all-reduces do
may be done by a reduce-scatter and an all-gather, at the same bytes.
``python -m benchmarks.rediscovery --help``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

from benchmarks.expert.rows import Row, rows
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.ir.mesh import Mesh
from rhino_jax.options import make_options
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta
from rhino_jax.sent import Collective, collectives

SCALARS_BYTES = 512
"""Wire bytes of all scalar collectives together that are not counted."""

MISS, PASS, FINDING = "miss", "as published", "cheaper"


@dataclass(frozen=True)
class Outcome:
    """``found`` and ``expected`` in the row's own cost, and what was written."""

    row: Row
    found: float
    expected: float
    written: tuple[Collective, ...]

    @property
    def verdict(self) -> str:
        if self.found > self.expected * 1.001 + SCALARS_BYTES:
            return MISS
        return FINDING if self.found < self.expected * 0.99 else PASS


def cost(written: Iterable[Collective], beta: Mapping[str, float]) -> float:
    """Seconds of bytes; a collective over several axes pays the dearest."""
    return sum(
        max(beta.get(axis, 1.0) for axis in c.axes) * c.total_bytes for c in written
    )


def judge(row: Row, written: Iterable[Collective]) -> Outcome:
    """What a plan's collectives cost beside what is published."""
    real = tuple(c for c in written if c.shape)
    return Outcome(row, cost(real, row.beta), row.expected_seconds, real)


def tried(row: Row) -> Outcome:
    """The row's program traced and searched."""
    step, state, batch = row.build()
    args = batch if isinstance(batch, tuple) else (batch,)
    traced = traced_bare(step, (state, *args), {}, make_options(donate=False))
    names, mesh = tuple(row.mesh), Mesh.of(**row.mesh)
    request = Request(
        mesh,
        AlphaBeta(dict.fromkeys(names, 1.0), {n: row.beta.get(n, 1.0) for n in names}),
        replicate_heavy=False,
        pins=row.pins,
    )
    found = search(subject_of(traced), request)
    return judge(row, collectives(traced.program, found.assignment, mesh))


def kinds(outcome: Outcome) -> str:
    """Counts and KiB by kind and axis."""
    count: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for c in outcome.written:
        key = c.kind, "×".join(c.axes)
        count[key] += c.count
        sent[key] += c.total_bytes
    return ", ".join(
        f"{n} {kind} {axes} ({sent[kind, axes] / 1024:.1f} KiB)"
        for (kind, axes), n in sorted(count.items())
    )


def published(row: Row) -> str:
    return ", ".join(
        f"{one.count} {one.kind} {one.axis} ({one.wire_bytes(row.mesh) / 1024:.1f} KiB)"
        for one in row.expected
    )


@click.command()
@click.option("--only", default="", help="Rows, separated by commas.")
def main(only: str) -> None:
    """Print every row, expected and found; exit 1 where one is missed."""
    table = Table(box=None)
    for heading in ("row", "program", "expected", "found", "verdict", "", ""):
        table.add_column(heading, overflow="fold")
    missed = 0
    wanted = only.split(",") if only else []
    for row in rows():
        if wanted and row.name not in wanted:
            continue
        outcome = tried(row)
        missed += outcome.verdict == MISS
        table.add_row(
            row.name,
            row.what,
            f"{outcome.expected:.0f}",
            f"{outcome.found:.0f}",
            outcome.verdict,
            published(row),
            kinds(outcome),
        )
        click.echo(f"{row.name}: {outcome.verdict}")
    Console(width=180).print(table)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
