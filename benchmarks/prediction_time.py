"""Do predicted step times order plans as measured ones do? On simulated CPU devices.

For a GPT, a ResNet and a mixture of experts on 8 simulated devices: the plan that the
search finds, and those that it finds on other meshes, with microbatches, and with
layouts of inputs held, all drawn by a recorded seed, that are predicted within 3 times
of the first. They run in turn, round by round; a plan's time is its shortest.

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

import itertools
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from benchmarks.kept import keep, rows
from benchmarks.models import build
from benchmarks.models.zoo import Model, run_init
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.api.profiles import profiled
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import InfeasibleError, PinError
from rhino_jax.ir.mesh import Mesh
from rhino_jax.options import make_options
from rhino_jax.plan import Plan, make_plan
from rhino_jax.profiling.live import Clock, core_seconds
from rhino_jax.profiling.make import measured_profile
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Candidate, Wish
from rhino_jax.search.meshes import candidate_meshes
from rhino_jax.search.remat import NONE
from rhino_jax.search.specs import Spec
from rhino_jax.trace import Traced

MODELS = ("gpt_scanned", "resnet", "moe")
SEED, PLANS, WITHIN = 11, 20, 3.0
TRIES, HELD = 80, (1, 16)
PASSES = 1
"""Of the live profile."""
CLOCKS: Mapping[str, Clock] = {"cores": core_seconds, "wall": time.perf_counter}
"""What a step takes: of both cores, wherever the process had them; on the wall."""
GOAL_SPEARMAN, GOAL_FOUND = 0.85, 1.1
WARM, STEPS = 1, 2
PLENTY_BYTES = 2**50


# ---- plans ---------------------------------------------------------------------------


def drawn(traced: Traced, cluster: Cluster, count: int) -> list[Candidate]:
    """The found plan, and others by :data:`SEED`, all within :data:`WITHIN`.

    Others are what the search finds where the layouts of one input of the batch and of
    some of the state are held at random, on a mesh and with microbatches at random.
    """
    subject, rng = subject_of(traced), random.Random(SEED)
    meshes = candidate_meshes(cluster, 2)
    wish = Wish(cluster, meshes, PLENTY_BYTES, remat=NONE, donated=traced.donated)
    first = plan_search(subject, wish).best
    limit = WITHIN * first.prediction.step_seconds
    found = {repr(first.assignment): first}
    for _ in range(TRIES):
        if len(found) == count:
            break
        mesh, pins = rng.choice(meshes), {}
        state = sorted(traced.state_inputs)
        held_state = rng.sample(state, min(rng.randint(*HELD), len(state)))
        for place in (rng.choice(traced.batch_inputs), *held_state):
            pins[subject.input_paths[place]] = _spec(subject.shape(place), mesh, rng)
        held = replace(
            wish, meshes=(mesh,), microbatches=rng.choice((1, 1, 2, 4)), pins=pins
        )
        try:
            one = plan_search(subject, held).best
        except (InfeasibleError, PinError):
            continue
        if one.prediction.step_seconds <= limit:
            found.setdefault(repr(one.assignment), one)
    return list(found.values())


def _spec(shape: tuple[int, ...], mesh: Mesh, rng: random.Random) -> Spec:
    """Each axis splits one dimension, or none."""
    dims: list[tuple[str, ...]] = [()] * len(shape)
    for axis in mesh.axes:
        place = rng.randrange(len(shape) + 1)
        if place < len(shape) and not shape[place] % (
            axis.size * mesh.group_size(dims[place])
        ):
            dims[place] = (*dims[place], axis.name)
    return tuple(dims)


def plan_of(traced: Traced, one: Candidate) -> Plan:
    """A candidate as a plan of the decorated step."""
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
    """The folder of everything: ``profile.json``; of every model its plans and what is
    predicted of them, and a line for every round: seconds by clock, of every plan."""

    folder: Path
    size: str

    @property
    def profile(self) -> Path:
        return self.folder / "profile.json"

    def file(self, model: str, what: str) -> Path:
        return self.folder / f"{model}.{self.size}.{what}"

    def plans(self, model: str) -> dict[str, Any]:
        """``plans`` (as JSON), ``names``, ``predicted`` and ``predicted_comm``."""
        found: dict[str, Any] = json.loads(self.file(model, "plans.json").read_text())
        return found

    def rounds(self, model: str) -> list[dict[str, list[float]]]:
        """Seconds of every plan, by clock, by round."""
        return rows(self.file(model, "rounds.jsonl"))

    def add(self, model: str, seconds: dict[str, list[float]]) -> None:
        keep(self.file(model, "rounds.jsonl"), seconds)


def profile_measured(kept: Kept) -> None:
    """A live profile of the simulated devices, where there is none."""
    if not kept.profile.exists():
        click.echo("measuring the simulated devices", err=True)
        found = measured_profile(jax.devices(), passes=PASSES, clock=core_seconds)
        found.save(kept.profile)


def planned(kept: Kept, name: str, count: int) -> None:
    """The plans of a model, where they were not drawn yet."""
    place = kept.file(name, "plans.json")
    if place.exists():
        return
    cluster = profiled(parse_cluster(f"cpu:{jax.device_count()}"), str(kept.profile))
    model = build(name, size=kept.size)
    args = (model.state_shapes, model.batch_shapes)
    traced = traced_bare(model.train_step, args, {}, make_options(donate=False))
    found = drawn(traced, cluster, count)
    data = {
        "names": [str(one) for one in found],
        "predicted": [one.prediction.step_seconds for one in found],
        "predicted_comm": [one.prediction.comm_seconds for one in found],
        "plans": [plan_of(traced, one).to_json() for one in found],
    }
    place.write_text(json.dumps(data, indent=1))
    click.echo(f"{name}: {len(found)} plans drawn", err=True)


# ---- the clock -----------------------------------------------------------------------


def timed(kept: Kept, name: str, rounds: int, until: float) -> None:
    """Run the plans of a model in turn, ``rounds`` times; one round past ``until``."""
    if len(kept.rounds(name)) >= rounds:
        return
    model = build(name, size=kept.size)
    runs = [_running(model, text) for text in kept.plans(name)["plans"]]
    while len(kept.rounds(name)) < rounds:
        took = [_least(run) for run in runs]
        kept.add(name, {clock: [one[clock] for one in took] for clock in CLOCKS})
        if time.perf_counter() > until:
            break


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


def judged(kept: Kept, model: str, clock: str) -> Judged:
    """What all rounds so far say of a model's plans, by one clock."""
    rounds = (seconds[clock] for seconds in kept.rounds(model))
    least = [min(column) for column in zip(*rounds, strict=True)]
    return Judged(kept.plans(model)["predicted"], least)


def show(kept: Kept, models: list[str], by: str) -> bool:
    """Print a line a model and clock; whether all goals are met ``by`` one of them."""
    table = Table()
    for heading in (
        *("model", "clock", "plans", "rounds", "Spearman", "found / fastest"),
        *("slowest / fastest", "predicted / measured"),
    ):
        table.add_column(heading)
    good = True
    for name, clock in itertools.product(models, CLOCKS):
        count = len(kept.rounds(name))
        if not count:
            table.add_row(name, clock, "", "0")
            good = False
            continue
        one = judged(kept, name, clock)
        good &= one.good or clock != by
        shares = sorted(p / m for p, m in zip(one.predicted, one.measured, strict=True))
        table.add_row(
            *(name, clock, str(len(shares)), str(count), f"{one.spearman:.2f}"),
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
@click.option("--rounds", default=12, show_default=True)
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
