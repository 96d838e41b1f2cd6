"""Predicted against measured on the card that is here: seconds and memory of a step.

Each case in a process of its own (the allocator's peak is that of a process): the
decorated step first, then the undecorated one under ``jax.jit``, the same state and
batch. The last cases do not fit on the card as they are written: there the decorated
step must run nevertheless. ``python -m benchmarks.on_gpu --help``; ``--size tiny`` runs
anywhere, on a CPU too (which tells no peak). ``benchmarks/kernels.py`` measures what
single kernels take.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

GIB = 2**30
WARM, STEPS = 3, 10


@dataclass(frozen=True)
class Case:
    """A model of the zoo; ``depth`` 0 is its own.

    ``limit_gib`` is told to the decorated step as its memory, whatever the card has.
    """

    model: str
    depth: int = 0
    dtype: str = "bfloat16"
    limit_gib: int = 0

    def __str__(self) -> str:
        depth = f" {self.depth} layers" if self.depth else ""
        limit = f", told {self.limit_gib} GiB" if self.limit_gib else ""
        return f"{self.model}{depth} {self.dtype}{limit}"


CASES = {
    "gpt": Case("gpt_scanned", 12),
    "resnet": Case("resnet"),
    "vit": Case("vit", 12),
    "moe": Case("moe", 4),
    "t5": Case("t5", 8),
    "recommender": Case("recommender", dtype="float32"),
    "unrolled": Case("gpt_unrolled", 6),
    # More than a card holds: layers are recomputed, or batches divided.
    "rescue": Case("gpt_unrolled", 12),
    # More than a card holds, and the step is told otherwise: it plans again.
    "tightened": Case("gpt_unrolled", 12, limit_gib=160),
}


def build(case: Case, size: str) -> Any:
    from benchmarks.models import build as build_model

    depth = {"depth": case.depth} if case.depth and size != "tiny" else {}
    return build_model(case.model, size=size, dtype=case.dtype, **depth)


@dataclass(frozen=True)
class Ran:
    """Steps that ran: seconds of one, the first losses, the process's peak.

    ``step_seconds`` are of steps one right after the other, as a training loop has
    them; ``waited_seconds`` of a step that is waited for.
    """

    first_seconds: float
    step_seconds: float
    waited_seconds: float
    losses: tuple[float, ...]
    peak_bytes: int


def ran(step: Callable[..., Any], model: Any, trace: Path | None) -> Ran:
    """``step`` over its own state: ``WARM`` times, and twice ``STEPS`` by the clock.

    Two more are traced into ``trace`` if it is given.
    """
    import jax

    from benchmarks.models.zoo import run_init

    _, state, batch = run_init(model)
    batch = jax.device_put(batch)
    seconds: list[float] = []
    losses: list[float] = []

    def one() -> None:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
        losses.append(float(jax.tree.leaves(metrics["loss"])[0]))

    for _ in range(WARM + STEPS):
        one()
    began = time.perf_counter()
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    each = (time.perf_counter() - began) / STEPS
    stats = jax.devices()[0].memory_stats() or {}
    if trace:
        with jax.profiler.trace(str(trace)):
            one()
            one()
    return Ran(
        seconds[0],
        each,
        statistics.median(seconds[WARM : WARM + STEPS]),
        tuple(losses[:3]),
        stats.get("peak_bytes_in_use", 0),
    )


def kernel_seconds(trace: Path, steps: int = 2) -> dict[str, float]:
    """Seconds a step of every instruction that ran on the device, by its HLO name."""
    import jax

    found: Counter[str] = Counter()
    for path in trace.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    name = f"{stats.get('hlo_op', '')} | {event.name}"
                    found[name] += event.duration_ns / 1e9 / steps
    return dict(found.most_common())


def inner(case: Case, size: str, folder: Path, plain: bool) -> dict[str, Any]:
    """One case in this process."""
    import jax

    import rhino_jax as rhino

    model = build(case, size)
    limit = {"memory_limit_bytes": case.limit_gib * GIB} if case.limit_gib else {}
    decorated = rhino.auto_parallel(model.train_step, cache_dir="", **limit)
    began = time.perf_counter()
    planned = decorated.planned(model.state_shapes, model.batch_shapes)
    row: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "plan_seconds": time.perf_counter() - began,
        "memory_stats": jax.devices()[0].memory_stats(),
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            ours = ran(decorated, model, folder / "trace")
            row["decorated"] = asdict(ours)
        except Exception as error:
            row["decorated_error"] = f"{type(error).__name__}: {error}"[:1500]
    row["told"] = [str(w.message) for w in told if "rhino" in str(w.filename).lower()]
    plan = decorated.plan
    assert plan is not None and plan.predicted is not None
    row["predicted"] = asdict(plan.predicted)
    row["first_predicted"] = asdict(planned.predicted) if planned.predicted else None
    row["remat"], row["microbatches"] = plan.remat, plan.microbatches
    row["kernels"] = kernel_seconds(folder / "trace")
    if case.limit_gib or not plain:
        row["jit_error"] = "not run"
        return row
    try:
        undecorated = jax.jit(model.train_step, donate_argnums=0)
        row["jit"] = asdict(ran(undecorated, model, None))
    except Exception as error:
        row["jit_error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def child(
    name: str, size: str, folder: Path, seconds: float, plain: bool
) -> dict[str, Any]:
    """One case in a process of its own, its compiled program kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"--xla_dump_to={folder / 'hlo'} --xla_dump_hlo_module_re=.*train_step.*"
    added = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
    }
    code = [sys.executable, "-m", "benchmarks.on_gpu", "--inner", name, "--size", size]
    code += [] if plain else ["--no-plain"]
    try:
        done = subprocess.run(
            [*code, "--out", str(folder)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **added},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    (folder / "stderr").write_text(done.stderr[-20000:])
    if done.returncode:
        return {"error": done.stderr.strip()[-1500:]}
    row: dict[str, Any] = json.loads((folder / "row.json").read_text())
    return row


HEAD = (
    *("case", "predicted ms", "measured ms", "ratio", "jax.jit ms"),
    *("predicted GiB", "measured GiB", "ratio", "remat, microbatches", "losses differ"),
)


def line(case: Case, row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    if "error" in row or "decorated_error" in row:
        return (str(case), (row.get("error") or row["decorated_error"])[-200:])
    ours, predicted = row["decorated"], row["predicted"]
    theirs = row.get("jit")
    peak = ours["peak_bytes"]
    pairs = zip(ours["losses"], theirs["losses"], strict=True) if theirs else ()
    differ = max((abs(a - b) / abs(b) for a, b in pairs), default=None)
    return (
        str(case),
        f"{predicted['step_seconds'] * 1e3:.2f}",
        f"{ours['step_seconds'] * 1e3:.2f}",
        f"{predicted['step_seconds'] / ours['step_seconds']:.3f}",
        f"{theirs['step_seconds'] * 1e3:.2f}" if theirs else row["jit_error"][:40],
        f"{predicted['peak_bytes'] / GIB:.2f}",
        f"{peak / GIB:.2f}",
        f"{predicted['peak_bytes'] / peak:.3f}" if peak else "",
        f"{row['remat'] or 'none'}, {row['microbatches']}",
        "" if differ is None else f"{differ:.1e}",
    )


@click.command()
@click.option("--cases", default=",".join(CASES), show_default=True)
@click.option("--size", default="large", show_default=True)
@click.option("--seconds", default=150.0, show_default=True, help="For one case.")
@click.option("--plain/--no-plain", default=True, help="Run the undecorated step too.")
@click.option("--out", type=click.Path(path_type=Path), default="on_gpu")
@click.option("--inner", "one", default="", hidden=True, help="One case, here.")
def main(
    cases: str, size: str, seconds: float, plain: bool, out: Path, one: str
) -> None:
    """Run the cases, and print predicted beside measured."""
    if one:
        (out / "row.json").write_text(json.dumps(inner(CASES[one], size, out, plain)))
        return
    console = Console(width=180)
    table = Table(*HEAD)
    for name in cases.split(","):
        case = CASES[name]
        if size == "tiny":
            case = replace(case, depth=0)
        row = child(name, size, out / name, seconds, plain)
        (out / name / "row.json").write_text(json.dumps(row))
        table.add_row(*line(case, row))
        console.print(*line(case, row), sep=" | ")
    console.print(table)


if __name__ == "__main__":
    main()
