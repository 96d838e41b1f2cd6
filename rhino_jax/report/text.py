"""A plan as text: mesh, layouts folded by repeated layer, every collective."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rhino_jax.ir.program import itemsize, short_dtype
from rhino_jax.plan import Collective, Leaf, Plan

WIDTH = 100


def plan_text(plan: Plan) -> str:
    """The whole plan, at most :data:`WIDTH` columns wide."""
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False)
    title = f"plan of {plan.program_name}"
    where = plan.cluster or f"{max(plan.mesh.num_devices, 1)} devices"
    console.print(f"{title} · {where} · mesh ({plan.mesh or 'one device'})")
    how = [plan.recipe and f"recipe {plan.recipe}", f"lowering {plan.lowering}"]
    if plan.microbatches > 1:
        how.append(f"{plan.microbatches} microbatches")
    console.print(" · ".join(part for part in how if part))
    for heading, leaves in (("inputs", plan.inputs), ("outputs", _other(plan))):
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.add_column(heading, overflow="fold")
        table.add_column("array")
        table.add_column("PartitionSpec")
        table.add_column("MiB/device", justify="right")
        for row in _leaf_rows(plan, leaves):
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print()
    console.print(_collective_table(plan, Table))
    for note in plan.notes:
        console.print(f"note: {note}")
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _other(plan: Plan) -> tuple[Leaf, ...]:
    """Outputs that are not the state again, in the same layout."""
    state = {(leaf.path.partition("/")[2], leaf.layout) for leaf in plan.inputs}
    return tuple(
        leaf
        for leaf in plan.outputs
        if (leaf.path.partition("/")[2], leaf.layout) not in state
    )


def _leaf_rows(
    plan: Plan, leaves: Sequence[Leaf]
) -> Iterable[tuple[str, str, str, str]]:
    """One row for leaves alike but for a layer's number, which is folded."""
    folded: dict[tuple[str, str, str], list[Leaf]] = {}
    for leaf in leaves:
        array = f"{short_dtype(leaf.dtype)}{list(leaf.shape)}".replace(" ", "")
        key = (re.sub(r"\d+", "*", leaf.path), array, spec_text(leaf))
        folded.setdefault(key, []).append(leaf)
    for (pattern, array, spec), group in folded.items():
        name = group[0].path if len(group) == 1 else f"{len(group)} × {pattern}"
        held = sum(_local_bytes(plan, leaf) for leaf in group) / 2**20
        yield name, array, spec, f"{held:.3f}"


def _local_bytes(plan: Plan, leaf: Leaf) -> float:
    size = itemsize(leaf.dtype)
    for n in leaf.layout.local_shape(leaf.shape, plan.mesh):
        size *= n
    return size


def spec_text(leaf: Leaf) -> str:
    """The layout as a PartitionSpec is written."""
    entries = []
    for dim in leaf.layout.dims:
        names = [s.axis for s in dim]
        entries.append(
            "None"
            if not names
            else repr(names[0])
            if len(names) == 1
            else f"({', '.join(map(repr, names))})"
        )
    while entries and entries[-1] == "None":
        entries.pop()
    return f"P({', '.join(entries)})"


@dataclass(frozen=True)
class _Row:
    kind: str
    axes: str
    array: str
    where: str


def _collective_table(plan: Plan, table_type: type) -> object:
    """Collectives alike in kind, axes, array and source line share a row."""
    rows: dict[_Row, list[Collective]] = {}
    for c in plan.collectives:
        array = f"{short_dtype(c.dtype)}{list(c.shape)}".replace(" ", "")
        rows.setdefault(_Row(c.kind, "×".join(c.axes), array, c.where), []).append(c)
    table = table_type(box=None, pad_edge=False)
    for heading in ("collective", "axis", "array", "line"):
        table.add_column(heading, overflow="fold")
    for heading in ("times", "MiB sent"):
        table.add_column(heading, justify="right")
    order = sorted(rows.items(), key=lambda r: -sum(c.total_bytes for c in r[1]))
    for row, group in order:
        times = sum(c.count for c in group)
        sent = sum(c.total_bytes for c in group) / 2**20
        table.add_row(
            row.kind, row.axes, row.array, row.where, str(times), f"{sent:.3f}"
        )
    times = sum(c.count for c in plan.collectives)
    table.add_row("in all", "", "", "", str(times), f"{plan.wire_bytes / 2**20:.3f}")
    return table
