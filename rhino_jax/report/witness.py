"""What the real compiler made of a plan beside what was predicted, in words."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rhino_jax.report.text import WIDTH, bytes_text, seconds_text
from rhino_jax.verify.audit import Finding
from rhino_jax.verify.witness import Witness

NAMED = 6
"""Buffers named on each side."""


def witness_text(found: Witness) -> str:
    """The whole report, at most :data:`~rhino_jax.report.text.WIDTH` columns wide."""
    parts = [_heading(found)]
    if found.facts.ok:
        parts += [_traffic(found), *_unplanned(found)]
    parts += [_memory(found)]
    if found.facts.ok:
        parts += [_standing(found), _arithmetic(found)]
    return "\n\n".join(part for part in parts if part)


def verdict(found: Witness) -> str:
    """One line: what came of it.

    The compiled program is the plan, in the device's memory; or what is not so.
    """
    facts = found.facts
    if facts.outcome == "timeout":
        return "the compiler ran out of time: nothing is verified"
    if facts.outcome == "crashed":
        return "the compiler's process ended: nothing is verified"
    if facts.outcome == "refused":
        lack = "for lack of memory" if facts.out_of_memory else "the program"
        return f"the compiler refused {lack}: nothing is verified"
    assert found.audit is not None
    wrong = []
    if found.extra:
        wrong.append(f"{len(found.extra)} collectives that nobody planned")
    if found.missing:
        wrong.append(f"{len(found.missing)} planned collectives are not there")
    if not found.fits:
        wrong.append("it does not fit the device's memory")
    if not wrong:
        return "the compiled program is the plan, and fits"
    return "the compiled program is NOT the plan: " + "; ".join(wrong)


def _heading(found: Witness) -> str:
    facts = found.facts
    kept = ", kept from before" if facts.from_cache else ""
    head = (
        f"{facts.target} · mesh ({found.mesh}) · {facts.compiler} "
        f"{facts.compiler_version}, {facts.compile_seconds:.0f} s{kept}"
    )
    lines = [head, verdict(found)]
    if not facts.ok:
        lines += [f"  {line}" for line in facts.message.splitlines()]
    return "\n".join(lines)


def _traffic(found: Witness) -> str:
    rows = [
        (
            row.axes or "-",
            row.kind,
            bytes_text(row.planned_bytes),
            bytes_text(row.compiled_bytes),
            _ratio(row.compiled_bytes, row.planned_bytes),
        )
        for row in found.kinds
    ]
    rows += [
        (
            row.axes or "-",
            "all, types as compiled",
            bytes_text(row.planned_bytes),
            bytes_text(row.compiled_bytes),
            f"{row.ratio:.3f}",
        )
        for row in found.rows
    ]
    if not rows:
        return "no collectives, planned or compiled"
    head = ("axes", "sent by a device in a step", "planned", "compiled", "ratio")
    notes = [f"note: {note}" for note in (found.audit.notes if found.audit else ())]
    return "\n".join([_table(head, rows), *notes])


def _ratio(compiled: int, planned: int) -> str:
    return f"{compiled / planned:.3f}" if planned else "not planned"


def _unplanned(found: Witness) -> Iterator[str]:
    for title, findings in (
        ("compiled, and nobody planned it:", found.extra),
        ("planned, and not compiled:", found.missing),
    ):
        if findings:
            yield "\n".join([title, *(f"  {_finding(one)}" for one in findings)])


def _finding(one: Finding) -> str:
    where = one.source or "no source line"
    return (
        f"{one.kind} over {one.axes or '-'}, {bytes_text(one.total_bytes)} in "
        f"{one.count} runs: {where}"
    )


def _memory(found: Witness) -> str:
    ours, theirs = found.prediction.memory, found.facts.memory
    expected, peak = found.prediction.compiled, found.compiled_peak_bytes
    rows: list[tuple[str, int | str, int | str, str]] = [
        _beside("peak", expected.peak_bytes, peak)
    ]
    if theirs is not None:
        own = theirs.output_bytes - theirs.alias_bytes
        rows += [
            ("arguments", ours.input_bytes, theirs.argument_bytes, ""),
            ("results of their own", ours.output_bytes, own, ""),
            ("temporaries", ours.temp_bytes, theirs.temp_bytes, ""),
            ("results in arguments' memory", "", theirs.alias_bytes, ""),
            _beside(
                "set aside, gaps between buffers included",
                expected.needed_bytes,
                found.needed_bytes,
            ),
            ("the program itself", "", theirs.generated_code_bytes, ""),
        ]
    words = [
        tuple(bytes_text(x) if isinstance(x, int) else x for x in row) for row in rows
    ]
    device, limit = found.prediction.device_bytes, found.limit_bytes
    margin = 1 - limit / device
    room = f"the device's {bytes_text(device)}"
    if margin > 0.001:
        room = f"{bytes_text(limit)} (a margin of {margin:.0%} left free of {room})"
    said = {True: "fits", False: "does not fit", None: "not told"}
    head = ("memory of a device", "predicted", "compiled", "predicted/compiled")
    lines = [
        _table(head, words),
        f"predicted that it {said[found.predicted_fits]} {room}; "
        f"by the compiler it {said[found.fits]}",
    ]
    if expected.recomputed:
        lines.append(
            f"{bytes_text(ours.peak_bytes)} as the plan is written: so near the "
            "device's memory the compiler is expected to recompute by itself"
        )
    if found.recomputed:
        lines.append(
            f"the compiler recomputes {found.recomputed} instructions by itself to "
            "save memory: without that it would take more"
        )
    return "\n".join(lines)


def _beside(what: str, ours: int, theirs: int) -> tuple[str, int, int | str, str]:
    ratio = f"{ours / theirs:.3f}" if theirs else ""
    return what, ours, theirs or "not told", ratio


def _standing(found: Witness) -> str:
    ours, theirs = found.prediction.memory, found.busiest
    assert theirs is not None
    lines = [f"at the predicted peak ({ours.where or 'arguments alone'}):"]
    lines += [
        f"  {bytes_text(size):>10}  {name}" for name, size in ours.at_peak[:NAMED]
    ]
    lines.append(f"at the compiled peak (during {theirs.during}):")
    for one in theirs.standing[:NAMED]:
        place = one.source.rpartition("/")[2]
        what = " · ".join(filter(None, (one.op.rpartition("/")[2], place)))
        shape = _clipped(one.shape, 48)
        lines.append(f"  {bytes_text(one.num_bytes):>10}  {shape}  {what or one.name}")
    return "\n".join(lines)


def _arithmetic(found: Witness) -> str:
    one, counted = found.prediction, found.facts.flops_once
    lines = [f"arithmetic of products: {one.flops:.3g} floating-point operations"]
    if counted:
        lines[0] += (
            f"; the compiler counts {counted:.3g} (everything, loop bodies once): "
            f"{one.flops / counted:.3f}"
        )
    lines.append(
        f"step: predicted {seconds_text(one.step_seconds)} "
        f"({seconds_text(one.compute_seconds)} compute, "
        f"{seconds_text(one.comm_seconds)} communication)"
    )
    time = found.compiler_time
    seconds = time.seconds(found.device) if time else None
    if time and time.cycles:
        at = f", {seconds_text(seconds)}" if seconds else ""
        lines.append(f"the compiler's estimate: {time.cycles:,} cycles of kernels{at}")
    elif time and seconds:
        lines.append(
            f"the compiler's estimate: {seconds_text(seconds)} of kernels, "
            f"{seconds_text(time.collective_seconds)} of collectives (speed of light)"
        )
    else:
        lines.append("the compiler gives no estimate of its own")
    if time and not time.loops_known:
        lines[-1] += "; a loop of unknown length counted once"
    return "\n".join(lines)


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        if (
            head[index] in ("planned", "compiled", "ratio", "predicted")
            or "/" in (head[index])
        ):
            column.justify = "right"
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, emoji=False).print(table)
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(filter(None, lines))
