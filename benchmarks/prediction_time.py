"""Do predicted step times order plans as measured ones do? On simulated CPU devices.

For a GPT, a ResNet and a mixture of experts on 8 simulated devices: the plan that the
search finds, and others from among which it chooses, drawn by a recorded seed
(:mod:`benchmarks.drawing`), up to 3 times slower than the fastest, by what is
predicted. They run in turn, round by round; a plan's time is its shortest.

By the clock on the wall, and by one that goes while this process has a core
(:func:`rhino_jax.profiling.live.core_seconds`): simulated devices share the machine's
cores, and are never idle all together, so that both say the same where nothing else
runs, and the second where something does. The profile is made by the second.

Everything is kept in one folder and taken up again: the live profile (measured where
there is none yet), the plans drawn, compiled programs, and every round. ``--seconds``
ends a call early; the next one goes on.
``python -m benchmarks.prediction_time --help``.
"""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import click
import jax
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import rhino_jax as rhino
from benchmarks.drawing import Drawn, draws, found_plan, spread
from benchmarks.kept import keep, rows
from benchmarks.models import build
from benchmarks.models.zoo import Model, run_init
from rhino_jax.api.planning import traced_bare
from rhino_jax.api.profiles import profiled
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.model import predict
from rhino_jax.options import make_options
from rhino_jax.plan import Plan, make_plan
from rhino_jax.profiling.live import Clock, core_seconds, keep_memory
from rhino_jax.profiling.make import measured_profile
from rhino_jax.rules import rule_of
from rhino_jax.trace import Traced

MODELS = ("gpt_scanned", "resnet", "moe")
SEED, PLANS, WITHIN = 11, 20, 3.0
TRIES = 120
PASSES = 1
"""Of the live profile."""
CLOCKS: Mapping[str, Clock] = {"cores": core_seconds, "wall": time.perf_counter}
"""What a step takes: of both cores, wherever the process had them; on the wall."""
GOAL_SPEARMAN, GOAL_FOUND = 0.85, 1.1
WARM, STEPS = 2, 4


# ---- plans ---------------------------------------------------------------------------


def drawn(traced: Traced, cluster: Cluster, count: int) -> list[Drawn]:
    """The found plan, and others by :data:`SEED`, all within :data:`WITHIN`."""
    rng = random.Random(SEED)
    found = [found_plan(traced, cluster), *draws(traced, cluster, TRIES, rng)]
    return spread(found, count, WITHIN, rng)


def plan_of(traced: Traced, one: Drawn) -> Plan:
    """What was drawn as a plan of the decorated step."""
    return make_plan(
        traced.program,
        one.assignment,
        one.mesh,
        traced.input_paths,
        traced.output_paths,
        microbatches=one.microbatches,
    )


# ---- what is kept --------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """The folder of everything: ``profile.json``; of every model its plans, the found
    one first, and a line for every plan and round: seconds by clock."""

    folder: Path
    size: str

    @property
    def profile(self) -> Path:
        return self.folder / "profile.json"

    def file(self, model: str, what: str) -> Path:
        return self.folder / f"{model}.{self.size}.{what}"

    def plans(self, model: str) -> dict[str, Any]:
        """``plans`` (as JSON) and their ``names``."""
        found: dict[str, Any] = json.loads(self.file(model, "plans.json").read_text())
        return found

    def times(self, model: str) -> dict[str, list[list[float]]]:
        """Of every plan the seconds of every round, by clock."""
        found = {clock: [[] for _ in self.plans(model)["plans"]] for clock in CLOCKS}
        for row in rows(self.file(model, "times.jsonl")):
            for clock, of in found.items():
                of[row["plan"]].append(row[clock])
        return found

    def visits(self, model: str, plan: int) -> int:
        """How many rounds a plan has."""
        return len(self.times(model)["wall"][plan])

    def add(self, model: str, plan: int, seconds: dict[str, float]) -> None:
        keep(self.file(model, "times.jsonl"), {"plan": plan, **seconds})


def profile_measured(kept: Kept) -> None:
    """A live profile of the simulated devices, where there is none."""
    if not kept.profile.exists():
        click.echo("measuring the simulated devices", err=True)
        found = measured_profile(jax.devices(), passes=PASSES, clock=core_seconds)
        found.save(kept.profile)


def priced(kept: Kept) -> Cluster:
    """The simulated devices, with what the profile says of them."""
    return profiled(parse_cluster(f"cpu:{jax.device_count()}"), str(kept.profile))


def traced_step(kept: Kept, name: str) -> Traced:
    """A model's train step."""
    model = build(name, size=kept.size)
    args = (model.state_shapes, model.batch_shapes)
    return traced_bare(model.train_step, args, {}, make_options(donate=False))


def planned(kept: Kept, name: str, count: int) -> None:
    """The plans of a model, where they were not drawn yet."""
    place = kept.file(name, "plans.json")
    if place.exists():
        return
    traced = traced_step(kept, name)
    found = drawn(traced, priced(kept), count)
    data = {
        "names": [str(one) for one in found],
        "plans": [plan_of(traced, one).to_json() for one in found],
    }
    place.write_text(json.dumps(data, indent=1))
    click.echo(f"{name}: {len(found)} plans drawn", err=True)


def predicted(kept: Kept, name: str) -> list[float]:
    """Seconds of a model's plans, by the profile and the prices as they are now."""
    traced, cluster = traced_step(kept, name), priced(kept)
    plans = map(Plan.from_json, kept.plans(name)["plans"])
    return [
        predict(
            traced.program,
            plan.assignment,
            plan.mesh,
            cluster,
            rule_of,
            traced.donated,
        ).step_seconds
        for plan in plans
    ]


# ---- the clock -----------------------------------------------------------------------


def timed(kept: Kept, name: str, rounds: int, until: float) -> None:
    """Run the plans of a model in turn, ``rounds`` times; one plan past ``until``.

    One at a time is compiled (again: from the cache) and let go: the machine code of
    twenty is in more pieces than Linux lets a process map (``vm.max_map_count``).
    """
    model, plans = build(name, size=kept.size), kept.plans(name)["plans"]
    for _ in range(rounds):
        for number, text in enumerate(plans):
            if kept.visits(name, number) == rounds:
                continue
            if time.perf_counter() > until:
                return
            kept.add(name, number, _least(_running(model, text)))
            jax.clear_caches()
            gc.collect()


def _running(model: Model, text: str) -> Callable[[], Any]:
    """A compiled step on a state of its own, as a plan has it."""
    step = rhino.auto_parallel(plan=Plan.from_json(text), donate=False, cache_dir="")(
        model.train_step
    )
    _, state, batch = run_init(model)
    state, batch = jax.device_get((state, batch))
    state = jax.block_until_ready(step(state, batch)[0])
    return lambda: step(state, batch)


def _least(run: Callable[[], Any]) -> dict[str, float]:
    """Of several steps behind :data:`WARM` others of the same plan, by clock."""
    least = dict.fromkeys(CLOCKS, float("inf"))
    for take in range(WARM + STEPS):
        began = {name: clock() for name, clock in CLOCKS.items()}
        jax.block_until_ready(run())
        for name, clock in CLOCKS.items():
            if take >= WARM:
                least[name] = min(least[name], clock() - began[name])
    return least


# ---- the judgement -------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Of one model, predicted and shortest measured seconds, the found plan's first."""

    predicted: list[float]
    measured: list[float]

    @property
    def spearman(self) -> float:
        return float(spearmanr(self.predicted, self.measured).statistic)

    @property
    def found_over_fastest(self) -> float:
        return self.measured[0] / min(self.measured)

    @property
    def good(self) -> bool:
        return self.spearman >= GOAL_SPEARMAN and self.found_over_fastest <= GOAL_FOUND


def judged(kept: Kept, model: str) -> dict[str, Judged]:
    """What all rounds so far say of a model's plans, by clock; nothing before one."""
    times = kept.times(model)
    if not all(map(all, times.values())):
        return {}
    told = predicted(kept, model)
    return {clock: Judged(told, list(map(min, of))) for clock, of in times.items()}


def show(kept: Kept, models: list[str], by: str) -> bool:
    """Print a line a model and clock; whether all goals are met ``by`` one of them."""
    table = Table()
    for heading in (
        *("model", "clock", "plans", "rounds", "Spearman", "found / fastest"),
        *("slowest / fastest", "predicted / measured"),
    ):
        table.add_column(heading)
    good = True
    for name in models:
        count = str(min(map(len, kept.times(name)["wall"])))
        of = judged(kept, name)
        good &= by in of and of[by].good
        for clock, one in of.items():
            pairs = zip(one.predicted, one.measured, strict=True)
            shares = sorted(p / m for p, m in pairs)
            table.add_row(
                *(name, clock, str(len(shares)), count, f"{one.spearman:.2f}"),
                f"{one.found_over_fastest:.2f}",
                f"{max(one.measured) / min(one.measured):.1f}",
                f"{shares[0]:.2f} to {shares[-1]:.2f}",
            )
    Console(width=120).print(table)
    return good


@click.command()
@click.option("--time/--no-time", "clocked", default=True, help="Run plans, or not.")
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--size", default="small", show_default=True)
@click.option("--plans", default=PLANS, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=1e9, help="Begin no round of plans after so many.")
@click.option("--by", default="cores", type=click.Choice([*CLOCKS]), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="prediction_time")
def main(
    clocked: bool,
    models: str,
    size: str,
    plans: int,
    rounds: int,
    seconds: float,
    by: str,
    out: Path,
) -> None:
    """Print rank correlation and how good the found plan is; exit 1 below the goals."""
    until = time.perf_counter() + seconds
    keep_memory()
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(out.resolve() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    kept, names = Kept(out, size), models.split(",")
    profile_measured(kept)
    for name in names:
        planned(kept, name, plans)
        if clocked and time.perf_counter() < until:
            timed(kept, name, rounds, until)
    raise SystemExit(0 if show(kept, names, by) else 1)


if __name__ == "__main__":
    main()
