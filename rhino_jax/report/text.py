"""A plan as text: mesh, layouts folded by repeated layer, every collective."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rhino_jax.ir.layout import contiguous
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import itemsize, short_dtype
from rhino_jax.ir.spans import EVERY
from rhino_jax.plan import Leaf, Plan, Predicted
from rhino_jax.search.explain import Explanation
from rhino_jax.sent import Collective

WIDTH = 100
STAGES = ("", "segments", "worker", "inputs", "sent each microbatch", "sent once")
UNITS = ("KiB", "MiB", "GiB", "TiB")


def plan_text(
    plan: Plan,
    activations: Iterable[Leaf] = (),
    stages: Sequence[Sequence[str]] = (),
) -> str:
    """The whole plan, at most :data:`WIDTH` columns wide.

    ``activations`` are interior values worth showing, by source line or name;
    ``stages`` rows of :mod:`rhino_jax.report.stages`.
    """
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out,
        width=WIDTH,
        color_system=None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    count = max(plan.num_devices, 1)
    where = plan.cluster or ("1 device" if count == 1 else f"{count} devices")
    mesh = f"mesh ({plan.mesh})" if plan.mesh.axes else "no mesh"
    if plan.stages:
        mesh = f"{plan.stages} · each on {mesh if plan.mesh.axes else 'one device'}"
    console.print(f"plan of {plan.program_name} · {where} · {mesh}")
    how = [plan.recipe and f"recipe {plan.recipe}", f"lowering {plan.lowering}"]
    how += [f"{cut}" for cut in plan.assignment.staged[:1]]
    if plan.microbatches > 1:
        how.append(f"{plan.microbatches} microbatches")
    if plan.attention:
        how.append(f"attention {plan.attention}")
    how += [
        f"remat {policy}" + ("" if segments == EVERY else f" of segments {segments}")
        for segments, policy in plan.remat
    ]
    console.print(" · ".join(part for part in how if part))
    if plan.predicted:
        console.print(predicted_text(plan.predicted))
    if plan.stages:
        console.print()
        named = stages or [
            (f"stage {k}", x) for k, x in enumerate(plan.stages.segments)
        ]
        console.print(_table(STAGES[: len(named[0])], named, numbers=0))
    for heading, leaves in (
        ("inputs", plan.inputs),
        ("activations", tuple(activations)),
        ("outputs", _other(plan)),
    ):
        if leaves:
            headings = (heading, "array", "PartitionSpec", "per device")
            console.print()
            console.print(_table(headings, _leaf_rows(plan, leaves), numbers=1))
    console.print()
    sent = ("collective", "axis", "array", "line", "times", "sent")
    if plan.collectives:
        console.print(_table(sent, _collective_rows(plan), numbers=2))
    else:
        console.print("no collectives")
    for note in plan.notes:
        console.print(f"note: {note}")
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def predicted_text(one: Predicted) -> str:
    """Seconds and memory of a step, in a line."""
    return (
        f"predicted {seconds_text(one.step_seconds)} a step "
        f"({seconds_text(one.compute_seconds)} compute, "
        f"{seconds_text(one.comm_seconds)} communication) · "
        f"{bytes_text(one.peak_bytes)} of {bytes_text(one.limit_bytes)} a device"
    )


def seconds_text(seconds: float) -> str:
    """A time as people read it.

    >>> seconds_text(0.0123), seconds_text(2.5), seconds_text(4e-6)
    ('12.3 ms', '2.5 s', '4.0 us')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def explanation_text(found: Explanation, mesh: Mesh) -> str:
    """The alternatives of one input as a table, the planned one marked."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False)
    shape = ",".join(map(str, found.shape))
    console.print(f"{found.path}: {short_dtype(found.dtype)}[{shape}]", markup=False)
    best = min(one.seconds for one in found.alternatives)
    rows = []
    for one in found.alternatives:
        leaf = Leaf(found.path, found.shape, found.dtype, one.layout)
        more = one.seconds - best
        rows.append(
            (
                "planned" if one.chosen else "",
                spec_text(leaf, mesh),
                bytes_text(one.input_bytes),
                seconds_text(one.seconds),
                f"+ {seconds_text(more)}" if more > 0 else "",
            )
        )
    headings = ("", "PartitionSpec", "per device", "best plan", "dearer by")
    console.print(_table(headings, rows, numbers=3))
    if found.forced:
        console.print(found.forced)
    console.print(f"read by {', '.join(found.readers[:4])}", markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: int
) -> object:
    """A table without lines; the last ``numbers`` columns stand to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, heading in enumerate(headings):
        right = column >= len(headings) - numbers
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def bytes_text(size: float) -> str:
    """A size as people read it.

    >>> bytes_text(900), bytes_text(57344), bytes_text(3 * 2**30)
    ('900 B', '56.0 KiB', '3.0 GiB')
    """
    if size < 1024:
        return f"{size:.0f} B"
    power = min(int(math.log(size, 1024)), len(UNITS))
    return f"{size / 1024**power:.1f} {UNITS[power - 1]}"


def _other(plan: Plan) -> tuple[Leaf, ...]:
    """Outputs that are not the state again, in the same layout."""
    state = {(leaf.path.partition("/")[2], leaf.layout) for leaf in plan.inputs}
    return tuple(
        leaf
        for leaf in plan.outputs
        if (leaf.path.partition("/")[2], leaf.layout) not in state
    )


def _leaf_rows(plan: Plan, leaves: Sequence[Leaf]) -> Iterable[tuple[str, ...]]:
    """One row for leaves alike but for a layer's number, which is folded."""
    folded: dict[tuple[str, str, str], list[Leaf]] = {}
    for leaf in leaves:
        key = (_NUMBER.sub("*", leaf.path), _array(leaf), spec_text(leaf, plan.mesh))
        folded.setdefault(key, []).append(leaf)
    for (_, array, spec), group in folded.items():
        name = folded_path([leaf.path for leaf in group])
        count = f"{len(group)} × " if len(group) > 1 else ""
        held = sum(_local_bytes(plan, leaf) for leaf in group)
        yield f"{count}{name}", array, spec, bytes_text(held)
    held = sum(_local_bytes(plan, leaf) for leaf in leaves)
    yield "in all", "", "", bytes_text(held)


_NUMBER = re.compile(r"\d+")


def folded_path(paths: Sequence[str]) -> str:
    """Paths alike but for numbers as one, with a star for a number that differs.

    >>> folded_path(["0/layers/3/w", "0/layers/4/w"])
    '0/layers/*/w'
    """
    columns = zip(*(_NUMBER.findall(path) for path in paths), strict=True)
    marks = iter([c[0] if len(set(c)) == 1 else "*" for c in columns])
    return _NUMBER.sub(lambda _: next(marks), paths[0])


def _array(value: Leaf | Collective) -> str:
    shape = ",".join(map(str, value.shape))
    return f"{short_dtype(value.dtype)}[{shape}]"


def _local_bytes(plan: Plan, leaf: Leaf) -> float:
    size = itemsize(leaf.dtype)
    for n in leaf.layout.local_shape(leaf.shape, plan.mesh):
        size *= n
    return size


def spec_text(leaf: Leaf, mesh: Mesh) -> str:
    """The layout as a PartitionSpec is written, and what it can not say.

    Partial values name the axes they are partial over; strided splits are marked with
    the stride of their blocks.
    """
    entries = []
    for size, dim in zip(leaf.shape, leaf.layout.dims, strict=True):
        blocks = contiguous(size, [s.axis for s in dim], mesh)
        names = [
            split.axis if split == block else f"{split.axis}/{split.stride}"
            for split, block in zip(dim, blocks, strict=True)
        ]
        inner = ", ".join(map(repr, names))
        entries.append(inner if len(names) == 1 else f"({inner})" if names else "None")
    while entries and entries[-1] == "None":
        entries.pop()
    partial = "".join(f" + {op} over {axis}" for axis, op in leaf.layout.partial)
    return f"P({', '.join(entries)}){partial}"


@dataclass(frozen=True)
class _Row:
    kind: str
    axes: str
    array: str
    where: str


def _collective_rows(plan: Plan) -> Iterable[tuple[str, ...]]:
    """Collectives alike in kind, axes, array and source line share a row.

    Those that send most come first.
    """
    rows: dict[_Row, list[Collective]] = {}
    for c in plan.collectives:
        row = _Row(c.kind, "×".join(c.axes), _array(c), c.where)
        rows.setdefault(row, []).append(c)
    order = sorted(rows.items(), key=lambda r: -sum(c.total_bytes for c in r[1]))
    for row, group in order:
        times = sum(c.count for c in group)
        sent = bytes_text(sum(c.total_bytes for c in group))
        yield row.kind, row.axes, row.array, row.where, str(times), sent
    times = sum(c.count for c in plan.collectives)
    yield "in all", "", "", "", str(times), bytes_text(plan.wire_bytes)
