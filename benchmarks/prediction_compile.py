"""Predicted seconds against the compilers' own, with no device.

With the compile-only profiles that come with Rhino: kernels beside the grid the
profile was made of, drawn by another seed; whole train steps of the zoo on one device
(the sum of the compiler's prices, loops multiplied out); compute and collectives of the
zoo's plans on eight and sixteen GPUs. Compiled facts are cached, results kept in a
file, rows already there not made again.
``python -m benchmarks.prediction_compile --help``.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models import FIRST, build
from rhino_jax.api.profiles import profiled
from rhino_jax.cluster import profile as profile_module
from rhino_jax.cluster.hardware import CATALOGUE, column
from rhino_jax.cluster.kernels import ARITHMETIC
from rhino_jax.cluster.links import TORUS_DIMENSIONS
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.profile import COMPILE_ONLY, SHIPPED, Profile, shipped
from rhino_jax.cluster.topology import Cluster, crossing, linked
from rhino_jax.cost.collectives import collective_seconds
from rhino_jax.cost.model import Prediction, predict
from rhino_jax.errors import OptionsError
from rhino_jax.ir.mesh import Mesh
from rhino_jax.profiling.compiled import (
    clock_of,
    has_table,
    kernel_seconds,
    options_of,
    priced,
)
from rhino_jax.profiling.fit import share_of
from rhino_jax.profiling.grid import GRIDS, others
from rhino_jax.rules import rule_of
from rhino_jax.verify.collectives import collective_axes, wire_bytes
from rhino_jax.verify.compile_only import compile_for
from rhino_jax.verify.hlo import read
from rhino_jax.verify.targets import parse_target

GOAL_COMPUTE, GOAL_COMM = 0.15, 0.20
SEED = 77
GPU_MESHES = {"1x8": {"data": 2, "tensor": 4}, "2x8": {"data": 2, "tensor": 8}}
RECIPES = ("data_parallel", "zero3", "megatron")
OF_PLANS = ("comm", "comm as compiled", "compute")
UNPRICED = ("reduce-scatter", "all-to-all")
"""XLA for GPUs prices all other collectives."""


def kernels_row(name: str) -> dict[str, Any]:
    """Kernels beside the grid: relative errors of predicted seconds, by kind."""
    device = CATALOGUE[name]
    profile = shipped(name, COMPILE_ONLY)
    assert profile is not None, name
    told = {curve.kind for curve in profile.curves if curve.axes}
    drawn = others(GRIDS[device.platform], seed=SEED)
    wanted = [one for one in drawn if one.curve in told]
    errors = defaultdict(list)
    for kernel, seconds in zip(wanted, kernel_seconds(wanted, name), strict=True):
        if seconds:
            size = tuple(map(float, kernel.size))
            dtype = column(kernel.dtype) if kernel.curve in ARITHMETIC else ""
            share = profile.kernels.share(kernel.curve, dtype, size)
            ratio = share_of(kernel, seconds, device) / share
            errors[kernel.curve].append(ratio - 1)
    return {"errors": errors}


def planned_for(text: str, model: str, size: str, depth: int, **how: Any) -> Any:
    """A model of the zoo planned for the cluster ``text``."""
    made = build(model, size=size, dtype="bfloat16", depth=depth)
    return rhino.plan(
        made.train_step,
        made.state_shapes,
        made.batch_shapes,
        cluster=text,
        pipeline_stages=1,
        cache_dir="",
        **how,
    )


def predicted(
    model: str, cluster: Cluster, text: str, size: str, depth: int, **how: Any
) -> tuple[Any, Prediction]:
    """A recipe's plan, and its price on ``cluster``."""
    planned = planned_for(text, model, size, depth, **how)
    plan, traced = planned.plan, planned.traced
    mesh = linked(cluster, plan.mesh)
    donated = traced.donated
    found = predict(traced.program, plan.assignment, mesh, cluster, rule_of, donated)
    return planned, found


def _compiled(name: str, model: str, size: str, depth: int) -> Any:
    """One device's name, and what its compiler makes of a whole step."""
    text = f"{name}:" + "x".join("1" * TORUS_DIMENSIONS.get(name, 2))
    planned = planned_for(text, model, size, depth, recipe="data_parallel")
    target = parse_target(text)
    options = options_of(target)
    return text, compile_for(
        planned.lower(), target, options=options, timeout_seconds=1200
    )


def program_row(name: str, model: str, size: str, depth: int) -> dict[str, Any]:
    """A whole step on one device: predicted compute, and the compiler's prices."""
    text, facts = _compiled(name, model, size, depth)
    if not facts.ok:
        return {"outcome": f"{facts.outcome}: {facts.message[:300]}"}
    cluster = profiled(parse_cluster(text), COMPILE_ONLY)
    how = {"recipe": "data_parallel"}
    _, found = predicted(model, cluster, text, size, depth, **how)
    prices = priced(facts.hlo, clock_of(parse_target(text)))
    return {
        "outcome": "ok",
        "predicted": found.compute_seconds,
        "compiler": sum(one.seconds for one in prices if not one.is_collective),
    }


def calibrated(name: str, model: str, size: str, depth: int) -> dict[str, Any]:
    """The share of traffic that makes one program's prediction the compiler's sum.

    Predicted seconds are a straight line in it. Written into the profile at hand.
    """
    place = Path(profile_module.__file__).parent / "profiles"
    file = place / f"{name}.{COMPILE_ONLY}.json"
    profile = Profile.load(file)
    text, facts = _compiled(name, model, size, depth)
    if not facts.ok:
        return {"outcome": f"{facts.outcome}: {facts.message[:300]}"}

    def seconds(traffic: float) -> float:
        cluster = replace(profile, traffic=traffic).merged(parse_cluster(text))
        how = {"recipe": "data_parallel"}
        return predicted(model, cluster, text, size, depth, **how)[1].compute_seconds

    prices = priced(facts.hlo, clock_of(parse_target(text)))
    wanted = sum(one.seconds for one in prices if not one.is_collective)
    most, half = seconds(1.0), seconds(0.5)
    share = 1.0 - (most - wanted) / (2 * (most - half))
    traffic = float(f"{min(max(share, 0.05), 1.0):.3g}")
    machine = f"{profile.machine.partition('; traffic')[0]}; traffic: {model} {size}"
    replace(profile, traffic=traffic, machine=machine).save(file)
    return {"outcome": "ok", "traffic": traffic}


def plan_row(name: str, shape: str, model: str, recipe: str) -> dict[str, Any]:
    """A plan on several GPUs: its compute, and the collectives that XLA prices.

    ``comm`` is of the plan's collectives, ``comm as compiled`` of the program's.
    """
    text = f"{name}:{shape}"
    cluster = profiled(parse_cluster(text), COMPILE_ONLY)
    how = {"recipe": recipe, "mesh": GPU_MESHES[shape]}
    try:
        planned, found = predicted(model, cluster, text, "medium", 2, **how)
    except OptionsError as error:
        return {"outcome": f"does not apply: {error}"[:200]}
    target = parse_target(text)
    facts = compile_for(planned.lower(), target, options=options_of(target))
    if not facts.ok:
        return {"outcome": f"{facts.outcome}: {facts.message[:300]}"}
    prices = priced(facts.hlo)
    ours = [one for one in found.collectives if one.kind not in UNPRICED]
    return {
        "outcome": "ok",
        "comm": {
            "predicted": sum(one.total_seconds for one in ours),
            "compiler": sum(one.seconds for one in prices if one.is_collective),
        },
        "comm as compiled": {
            "predicted": sum(_as_compiled(facts.hlo, cluster, planned.plan.mesh)),
            "compiler": sum(one.seconds for one in prices if one.is_collective),
        },
        "compute": {
            "predicted": found.compute_seconds,
            "compiler": sum(one.seconds for one in prices if not one.is_collective),
        },
    }


def _as_compiled(hlo: str, cluster: Cluster, mesh: Mesh) -> Iterator[float]:
    """Our price of every collective of the compiled program that XLA prices."""
    for one in read(hlo):
        axes = collective_axes(one, mesh.shape)
        if one.kind not in UNPRICED and set(axes) <= set(mesh.names):
            crossed = crossing(cluster, mesh, axes)
            sent = wire_bytes(one)
            if crossed and sent:
                yield one.trip_count * collective_seconds(one.kind, sent, crossed)


def shares(what: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Predicted over the compiler's, by what it is of; none where nothing is told."""
    if row.get("outcome") != "ok":
        return
    for of in OF_PLANS if what == "plan" else ("",):
        found = row[of] if of else row
        if found["compiler"]:
            yield of or "program", found["predicted"] / found["compiler"]


def show(rows: dict[str, Any]) -> bool:
    """Print medians by device; whether all goals are met."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for key, row in rows.items():
        what, name, *_ = key.split("|")
        if what == "kernels":
            for kind, found in row["errors"].items():
                errors[name, f"kernels: {kind}"] += map(abs, found)
                errors[name, "kernels"] += map(abs, found)
        elif what != "calibrated":
            for of, share in shares(what, row):
                errors[name, of] += [abs(share - 1)]
                click.echo(f"{key}: {of}: predicted / compiler {share:.2f}")
    table = Table()
    for heading in ("device", "of", "cases", "median error", "goal"):
        table.add_column(heading)
    good = True
    for (name, what), found in sorted(errors.items()):
        goal = GOAL_COMM if what.startswith("comm") else GOAL_COMPUTE
        median = statistics.median(found)
        judged = ":" not in what
        good &= not judged or median <= goal
        table.add_row(
            name, what, str(len(found)), f"{median:.1%}", f"{goal:.0%}" * judged
        )
    Console().print(table)
    return good


@click.command()
@click.option("--devices", default=",".join(SHIPPED), show_default=True)
@click.option("--models", default=",".join(FIRST), show_default=True)
@click.option("--size", default="medium", show_default=True)
@click.option("--depth", default=2, show_default=True)
@click.option("--calibrate", default="", help="Fit traffic to this model first.")
@click.option("--parts", default="kernels,program,plan", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default="prediction_compile.json"
)
def main(
    devices: str,
    models: str,
    size: str,
    depth: int,
    calibrate: str,
    parts: str,
    out: Path,
) -> None:
    """Print median errors by device; exit 1 where a goal is missed."""
    rows: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    def keep(key: str, make: Any, *args: Any) -> None:
        if key not in rows:
            rows[key] = make(*args)
            click.echo(f"{key}: {rows[key].get('outcome', '')}", err=True)
            out.write_text(json.dumps(rows, indent=1))

    for name in devices.split(","):
        if calibrate:
            keep(f"calibrated|{name}", calibrated, name, calibrate, size, depth)
            shipped.cache_clear()
        if "kernels" in parts:
            keep(f"kernels|{name}", kernels_row, name)
        for model in models.split(","):
            if "program" in parts:
                key = f"program|{name}|{model}"
                keep(key, program_row, name, model, size, depth)
            for recipe in RECIPES if "plan" in parts and has_table(name) else ():
                for shape in GPU_MESHES:
                    key = f"plan|{name}|{shape}|{model}|{recipe}"
                    keep(key, plan_row, name, shape, model, recipe)
    raise SystemExit(0 if show(rows) else 1)


if __name__ == "__main__":
    main()
