"""Predictions against what the real compilers make: ``--memory`` and wire bytes.

Every case (:mod:`benchmarks.memory`) is planned, predicted, and compiled for hardware
that is not here. Compiled facts are kept by :mod:`rhino_jax.verify`, rows in ``--out``:
a run goes on where the last one stopped, and predicts anew where the prices have
changed since. Run ``python -m benchmarks.prediction --help``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import assigned, kept
from benchmarks.memory import BATCHES, CLUSTERS, KINDS, Case, cases, predicted
from rhino_jax.api.cache import sources
from rhino_jax.errors import RhinoError
from rhino_jax.verify.witness import Witness, audited

GIB = 2**30
MARGIN = 0.08
"""Of a device's memory, what plans leave free (``rhino_jax.api.planning.MARGIN``)."""
NEAR = tuple(percent / 100 for percent in range(85, 111))
"""How full devices are for which the verdict is asked: every hundredth."""
FILLED = (0.2, 0.8)
"""What fills less of its device is not asked about a full one: there small things rule.
"""
WIRE_TOLERANCE, TINY_BYTES = 0.05, 4096
NOTHING = ("false",)
"""In the compiler's place: what is not kept is not compiled."""


@dataclass(frozen=True)
class Row:
    """One case. Bytes on one device.

    ``compiled_bytes`` is the compiler's peak, ``needed_bytes`` what the device must
    have (or what it said when it refused): a GPU's gaps between buffers included. TPU
    programs are compiled as far as that takes (:mod:`benchmarks.assigned`). Beside them
    stand ``predicted_bytes`` and ``aside_bytes``, both of the program as the compiler
    is expected to leave it (:mod:`rhino_jax.cost.compiled`): a GPU's recomputes by
    itself above a limit that is known. ``written_bytes`` is predicted without that.
    """

    name: str
    outcome: str
    mesh: str = ""
    written_bytes: int = 0
    predicted_bytes: int = 0
    aside_bytes: int = 0
    compiled_bytes: int = 0
    needed_bytes: int = 0
    device_bytes: int = 0
    ours: tuple[tuple[str, int], ...] = ()
    theirs: tuple[tuple[str, int], ...] = ()
    wire: tuple[tuple[str, int, int, float], ...] = ()
    """Axes, planned and compiled bytes, their ratio with types as compiled."""
    extra: tuple[str, ...] = ()
    recomputed: int = 0
    """Instructions that the compiler repeats by itself to save memory."""

    @property
    def ratio(self) -> float:
        return self.predicted_bytes / self.compiled_bytes

    @property
    def error(self) -> float:
        return abs(self.ratio - 1)

    @property
    def aside_ratio(self) -> float:
        return self.aside_bytes / self.needed_bytes

    @property
    def fill(self) -> float:
        return self.needed_bytes / self.device_bytes

    @property
    def told(self) -> bool:
        """Whether it is predicted to fit its device."""
        return self.aside_bytes <= self.device_bytes

    @property
    def as_given(self) -> bool:
        """Compiled, and nothing recomputed by the compiler's own choice."""
        return self.outcome == "ok" and not self.recomputed

    @property
    def judged_wire(self) -> tuple[tuple[str, int, int, float], ...]:
        """Axes that carry more than scalars, which compilers merge as they like."""
        return tuple(row for row in self.wire if max(row[1], row[2]) >= TINY_BYTES)


def run(case: Case, kept_only: bool, timeout_seconds: float) -> Row | None:
    """Plan, predict and compile one case; None where nothing is kept of it."""
    try:
        found = predicted(case)
        how: dict[str, Any] = {"timeout_seconds": timeout_seconds}
        if not case.cluster.startswith("h100"):
            how.update(command=assigned.COMMAND, cache_dir=assigned.KEPT)
        if kept_only:
            how.update(command=NOTHING)
        facts = found.planned.compile_only(**how)
    except RhinoError as error:
        return Row(case.name, f"no plan: {str(error).splitlines()[0]}")
    if kept_only and facts.outcome == "crashed":
        return None
    plan = found.planned.plan
    one = Witness(
        facts,
        found.prediction,
        audited(facts, found.planned.planned_collectives(), plan.mesh.shape),
        found.prediction.device_bytes,
        str(plan.mesh),
    )
    refused = facts.out_of_memory
    if not facts.ok and not refused:
        return Row(case.name, f"{facts.outcome}: {facts.message.splitlines()[-1]}")
    needed = one.needed_bytes
    return Row(
        case.name,
        "refused for memory" if refused else "ok",
        str(plan.mesh),
        found.prediction.peak_bytes,
        found.prediction.compiled.peak_bytes,
        found.prediction.compiled.needed_bytes,
        one.compiled_peak_bytes if facts.ok else needed,
        needed,
        found.prediction.device_bytes,
        found.prediction.memory.at_peak[:4],
        tuple((f"{x.shape} {x.op}", x.num_bytes) for x in one.busiest.standing[:4])
        if one.busiest
        else (),
        tuple((x.axes, x.planned_bytes, x.compiled_bytes, x.ratio) for x in one.rows),
        tuple(f"{x.kind} over {x.axes}: {x.source}" for x in one.extra),
        one.recomputed,
    )


def summary(rows: Iterable[Row]) -> Iterator[str]:
    """What all rows say together, a line each."""
    good = [row for row in rows if row.compiled_bytes]
    for what, some in (
        ("all", good),
        ("at 20-80 % fill", [r for r in good if FILLED[0] <= r.fill <= FILLED[1]]),
        ("as it was given to the compiler", [r for r in good if r.as_given]),
        *((f"on {name}", [r for r in good if name in r.name]) for name in CLUSTERS),
    ):
        if some:
            yield f"{what}: {len(some)} cases, {_errors(some)}; {_verdicts(some)}"
    if good:
        errors = sorted(abs(row.aside_ratio - 1) for row in good)
        yield (
            f"what is set aside, gaps included: median error "
            f"{statistics.median(errors):.1%}, nine in ten within "
            f"{errors[-(-9 * len(errors) // 10) - 1]:.1%}; without gaps "
            f"{statistics.median(r.written_bytes / r.needed_bytes for r in good):.3f} "
            "of it, as it is written"
        )
        yield (
            "verdict: predicted and compiled, what is set aside, on devices "
            f"{NEAR[0]:.0%} to {NEAR[-1]:.0%} full ({len(NEAR)} a case), of cases that "
            f"fill {FILLED[0]:.0%} of theirs at least; with a margin of {MARGIN:.0%} "
            'it is never to say "fits" where it does not. Of all cases it did for:'
        )
        for row in good:
            if wrong := sum(safe and not true for _, safe, true in near(row)):
                yield (
                    f"  {row.name}: {wrong}, predicted {row.aside_ratio:.3f} of it "
                    f"({row.fill:.0%} of the device)"
                )
        brim = [row for row in good if NEAR[0] <= row.fill <= NEAR[-1]]
        told = sum(row.told == (row.fill <= 1) for row in brim)
        yield f"on their own devices, where they fill so much: {told} of {len(brim)}"
    wire = [axis for row in good for axis in row.judged_wire]
    if wire:
        close = sum(abs(ratio - 1) <= WIRE_TOLERANCE for *_, ratio in wire)
        yield (
            f"wire bytes: {close} of {len(wire)} groups of axes within "
            f"{WIRE_TOLERANCE:.0%} ({close / len(wire):.1%})"
        )
    for row in good:
        for axes, planned, compiled, ratio in row.judged_wire:
            if abs(ratio - 1) > WIRE_TOLERANCE:
                yield (
                    f"  {row.name}: {axes} {planned:,} planned, {compiled:,} compiled "
                    f"({ratio:.3f}){'; ' + row.extra[0] if row.extra else ''}"
                )


def _errors(rows: list[Row]) -> str:
    errors = sorted(row.error for row in rows)
    return (
        f"median error {statistics.median(errors):.1%}, nine in ten within "
        f"{errors[-(-9 * len(errors) // 10) - 1]:.1%}, largest {errors[-1]:.1%}"
    )


def _verdicts(rows: list[Row]) -> str:
    some = [row for row in rows if row.fill >= FILLED[0]]
    verdicts = [verdict for row in some for verdict in near(row)]
    if not verdicts:
        return "no verdict"
    right = sum(told == true for told, _, true in verdicts)
    wrong = sum(safe and not true for _, safe, true in verdicts)
    return (
        f"verdicts {right} of {len(verdicts)} right ({right / len(verdicts):.1%}; "
        f"{len(some)} cases), {wrong} unsafe"
    )


def near(row: Row) -> Iterator[tuple[bool, bool, bool]]:
    """On nearly full devices: told that it fits, with a margin too, and so it is.

    The program stays as it was compiled, for the device of its row; what changes is
    how full the one is that it is put on.
    """
    for fill in NEAR:
        device_bytes, told = row.needed_bytes / fill, row.aside_bytes
        yield told <= device_bytes, told <= (1 - MARGIN) * device_bytes, fill <= 1


def worst(rows: Iterable[Row], count: int) -> Iterator[str]:
    """The rows furthest off, and what stands at both peaks."""
    good = [row for row in rows if row.compiled_bytes]
    for row in sorted(good, key=lambda row: -row.error)[:count]:
        yield f"{row.name}: {row.ratio:.3f}"
        for side, named in (("ours", row.ours), ("theirs", row.theirs)):
            what = "; ".join(f"{size / GIB:.2f} GiB {name}" for name, size in named)
            yield f"    {side}: {what}"


HEAD = (
    *("case", "mesh", "predicted GiB", "compiled", "ratio"),
    *("set aside: predicted", "compiled", "ratio", "fill", ""),
)


def words(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    if not row.compiled_bytes:
        return (row.name, row.mesh, *("",) * 7, row.outcome[:60])
    recomputes = f"{row.recomputed} recomputed" if row.recomputed else ""
    return (
        row.name,
        row.mesh,
        f"{row.predicted_bytes / GIB:.2f}",
        f"{row.compiled_bytes / GIB:.2f}",
        f"{row.ratio:.3f}",
        f"{row.aside_bytes / GIB:.2f}",
        f"{row.needed_bytes / GIB:.2f}",
        f"{row.aside_ratio:.3f}",
        f"{row.fill:.0%}",
        row.outcome if row.outcome != "ok" else recomputes,
    )


def kept_rows(out: Path, version: str) -> dict[str, Row]:
    """The rows in ``out`` that today's prices made."""
    return {
        entry["row"]["name"]: Row(**entry["row"])
        for entry in kept.rows(out)
        if entry["version"] == version
    }


@click.command()
@click.option("--memory", is_flag=True, help="Peak memory and wire bytes.")
@click.option("--models", default=",".join(BATCHES), show_default=True)
@click.option("--clusters", default=",".join(CLUSTERS), show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--full-depth", is_flag=True, help="Models as deep as they are.")
@click.option("--kept-only", is_flag=True, help="Compile nothing that is not kept.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds a compile.")
@click.option("--worst", "worst_count", default=5, show_default=True)
@click.option(
    "--out",
    default="prediction.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Rows; those already there are not made again.",
)
def main(
    memory: bool,
    models: str,
    clusters: str,
    kinds: str,
    full_depth: bool,
    kept_only: bool,
    timeout: float,
    worst_count: int,
    out: Path,
) -> None:
    """Predict and compile every case, one after the other, and print the table."""
    if not memory:
        raise click.UsageError("say what to compare: --memory")
    console = Console(width=150)
    table = Table(*HEAD)
    version = sources()
    done = kept_rows(out, version)
    wanted = tuple(tuple(x.split(",")) for x in (models, clusters, kinds))
    rows: list[Row] = []
    for case in cases(*wanted, full_depth=full_depth):
        row = done.get(case.name)
        if row is None:
            row = run(case, kept_only, timeout)
            if row is None:
                continue
            entry: dict[str, Any] = {"version": version, "row": asdict(row)}
            kept.keep(out, entry)
            console.print(*words(row))
        rows.append(row)
        table.add_row(*words(row))
    console.print(table)
    for line in (*summary(rows), "furthest off:", *worst(rows, worst_count)):
        console.print(line, highlight=False)


if __name__ == "__main__":
    main()
