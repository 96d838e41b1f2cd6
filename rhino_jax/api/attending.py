"""The step as it is written and the step with its attention recognized, compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rhino_jax.api.planned import Planned, subject_of
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import InfeasibleError, MeshError, PinError
from rhino_jax.options import RECOGNIZED, WRITTEN, Options
from rhino_jax.search.recognize import Bytes, Recognized, exponentials, recognize
from rhino_jax.trace import Traced

MUCH = 0.5
"""Share of a step's seconds, or of a device's memory, from which scores matter."""
PASSES, KEPT = 10, 2
"""How often a step as written reads or writes its scores, or arrays of their size; and
how many of them it keeps until the backward pass."""


MASKING = ("bool", "int", "float32")
"""Dtypes of arrays that masks are made of."""


@dataclass(frozen=True)
class Attended:
    """A step with its attention recognized, and what is to be said of it."""

    traced: Traced
    name: str = ""
    notes: tuple[str, ...] = ()


def attended(traced: Traced, attention: str) -> Attended:
    """``traced`` as the option ``attention`` says."""
    if attention != RECOGNIZED:
        return Attended(traced)
    return _attended(traced, recognize(traced.program, constants_of(traced)))


def constants_of(traced: Traced) -> dict[int, Any]:
    """Constants of the trace that masks may be made of, by value of the Program."""
    consts = traced.program.inputs[traced.num_inputs :]
    return {
        v: array
        for v, array in zip(consts, traced.constants, strict=True)
        if traced.program.values[v].dtype.startswith(MASKING)
    }


def _attended(traced: Traced, found: Recognized) -> Attended:
    many = f"{found.count} of {found.softmaxes}"
    if not found.count:
        return Attended(traced, "", (f"attention recognized: {many}",))
    note = f"attention recognized: {many} softmaxes are run block by block, no scores"
    return Attended(replace(traced, program=found.program), RECOGNIZED, (note,))


def with_attention(
    traced: Traced,
    options: Options,
    cluster: Cluster,
    limit_bytes: int,
    plan_of: Callable[[Traced], Planned],
) -> Planned:
    """The plan of ``plan_of``: as the step is written, or with attention recognized.

    Where options leave it open, the second is planned too where scores take much of the
    step's time, or of memory that is short; the faster one is taken. The first is not
    planned where one array of scores, divided among all devices, would not fit.

    Raises:
        InfeasibleError, MeshError, PinError: as ``plan_of`` of the step as written.
    """
    if options.attention == RECOGNIZED:
        return _said(plan_of, attended(traced, RECOGNIZED))
    if options.attention == WRITTEN or options.lowering == "auto":
        return plan_of(traced)
    share = 1 / (cluster.num_devices * subject_of(traced).batch_size)
    most = exponentials(traced.program)
    found: Recognized | None = None
    if most.largest * share > limit_bytes:
        found = recognize(traced.program, constants_of(traced))
        least = found.scores.largest * share
        if least > limit_bytes:
            why = f"as written, one array of scores takes {least / 2**30:.1f} GiB"
            return _said(plan_of, _attended(traced, found), why)
    written: Planned | None = None
    failed: InfeasibleError | None = None
    try:
        written = plan_of(traced)
    except InfeasibleError as error:
        failed = error
    if written is not None and not _matter(most, written, cluster, limit_bytes):
        return written
    found = found or recognize(traced.program, constants_of(traced))
    if written is not None and not _matter(found.scores, written, cluster, limit_bytes):
        return written
    blockwise: Planned | None = None
    if found.count:
        # What is pinned may be gone with the scores.
        with contextlib.suppress(InfeasibleError, MeshError, PinError):
            blockwise = _said(plan_of, _attended(traced, found))
    if written is None and blockwise is None:
        assert failed is not None
        raise failed
    if written is None:
        assert blockwise is not None
        return _noted(blockwise, "as written the step fits no device")
    return written if blockwise is None else _faster(written, blockwise)


def _said(
    plan_of: Callable[[Traced], Planned], found: Attended, more: str = ""
) -> Planned:
    """The plan of a step with attention recognized, which says so."""
    planned = plan_of(found.traced)
    said = [f"{note}; {more}" if more else note for note in found.notes]
    plan = planned.plan
    plan = replace(plan, notes=(*plan.notes, *said), attention=found.name)
    return replace(planned, plan=plan)


def _matter(
    scores: Bytes, written: Planned, cluster: Cluster, limit_bytes: int
) -> bool:
    """Whether scores take much of the step's seconds, or of memory that is short."""
    plan, predicted = written.plan, written.plan.predicted
    assert predicted is not None
    each = scores.total / cluster.num_devices
    seconds = PASSES * each / cluster.device.memory_bytes_per_second
    short = plan.remat or plan.microbatches > 1 or predicted.byte_seconds
    kept = KEPT * each > MUCH * limit_bytes
    return seconds > MUCH * predicted.step_seconds or bool(short and kept)


def _faster(written: Planned, blockwise: Planned) -> Planned:
    """The faster of two, which says what the other would take."""
    best, other, what = blockwise, written, "as written"
    if _seconds(written) < _seconds(blockwise):
        best, other, what = written, blockwise, "with attention recognized"
    return _noted(best, f"{what} a step would take {_seconds(other) * 1e3:.2f} ms")


def _seconds(planned: Planned) -> float:
    assert planned.predicted is not None
    return planned.predicted.step_seconds


def _noted(planned: Planned, note: str) -> Planned:
    plan = planned.plan
    return replace(planned, plan=replace(plan, notes=(*plan.notes, note)))
