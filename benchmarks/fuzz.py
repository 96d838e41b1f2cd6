"""Random programs under random layouts: equal to the undecorated run, or a failure.

``python -m benchmarks.fuzz --count 2000`` plans programs of
:mod:`benchmarks.random_programs` with a random choice for every op and a random layout
for every boundary (what the search may choose, without asking what it costs), on a mesh
of 2 x 4 simulated devices, lowers them and compares in float64. Results go to a file
of seeds, so that a run that was ended goes on where it stood; ``--seeds 17 23`` runs
and prints single programs. A failure ends nothing: it is listed with its program.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np

from benchmarks.random_programs import RandomProgram, random_program
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.devices import device_mesh
from rhino_jax.lower.program import jit_step
from rhino_jax.plan import Plan, make_plan
from rhino_jax.search.descend import Answer
from rhino_jax.search.domains import Kind, Slots
from rhino_jax.search.planner import Request, energy_of, read, written
from rhino_jax.search.prices import ClusterPrices
from rhino_jax.search.subject import Subject
from rhino_jax.trace import Traced, trace

RTOL = 1e-7
"""Of float64: what a sum in another order may change, and no more."""

QUICKLY = {"xla_backend_optimization_level": 0}
"""How the CPU compiler is asked to compile: that is most of the time."""

SHAKE = 1e-13
"""Of inputs, relative: what then moves as far as it differs tells nothing (the sine
of a large number)."""

TOGETHER = 8
"""Programs in one step: compiling is most of the time."""


ENDED, ENDED_ALONE = "the process ended, of several", "the process ended"
"""Of programs that are run: what is told of them where nothing follows. Those of
several are tried alone by the next call."""


class Differs(AssertionError):
    """A program gave something else than the undecorated one."""


def check(programs: Sequence[RandomProgram], rng: Random, mesh: Mesh) -> None:
    """Run ``programs`` as one step under random layouts, and as they stand.

    Raises:
        Differs: an output is not that of the undecorated run.
    """

    def step(given: list[list[Any]]) -> list[list[Any]]:
        return [p(*args) for p, args in zip(programs, given, strict=True)]

    with jax.enable_x64(True):
        given = [p.arguments(n) for n, p in enumerate(programs)]
        wanted = jax.jit(step, compiler_options=QUICKLY)(given)
        traced = trace(step, [given])
        plan = random_plan(traced, mesh, rng)
        assert Plan.from_json(plan.to_json()) == plan
        grid = device_mesh(mesh, devices(mesh))
        jitted = jit_step(traced.program, plan.assignment, mesh, grid)
        flat = [*jax.tree.leaves(given), *traced.constants]
        found = jitted.lower(*flat).compile(QUICKLY)(*flat)
        paths = [f"{n}/{k}" for n, outs in enumerate(wanted) for k in range(len(outs))]
        pairs = list(zip(found, jax.tree.leaves(wanted), strict=True))
        differs = [_difference(np.asarray(x), np.asarray(y)) for x, y in pairs]
        moved: list[Any] = []
        if any(differs):
            shaken = jax.jit(step, compiler_options=QUICKLY)(_shaken(given))
            moved = jax.tree.leaves(shaken)
        for k, (path, why) in enumerate(zip(paths, differs, strict=True)):
            if why and not _as_far(*map(np.asarray, (*pairs[k], moved[k]))):
                raise Differs(f"output {path}: {why}")


def _difference(have: np.ndarray, want: np.ndarray) -> str:
    """What is not equal, to rounding; "" where all is."""
    if have.dtype != want.dtype or have.shape != want.shape:
        return f"{have.dtype}{have.shape}, undecorated {want.dtype}{want.shape}"
    finite = np.abs(want[np.isfinite(want)]) if want.dtype.kind == "f" else want
    rtol = RTOL if want.dtype.kind == "f" else 0.0
    atol = rtol * float(np.max(finite, initial=1e-3)) if rtol else 0.0
    good = np.isclose(have, want, rtol=rtol, atol=atol, equal_nan=True)
    if good.all():
        return ""
    at = tuple(int(i) for i in np.argwhere(~good)[0])
    return (
        f"{np.sum(~good)} of {good.size} elements, first {at}: {have[at]!r}, "
        f"undecorated {want[at]!r}"
    )


def _shaken(given: list[list[Any]]) -> list[list[Any]]:
    """Inputs moved a little: by as much as another order of a few sums would."""
    return jax.tree.map(
        lambda x: x * (1 + SHAKE) if np.issubdtype(x.dtype, np.floating) else x, given
    )


def _as_far(have: np.ndarray, want: np.ndarray, moved: np.ndarray) -> bool:
    """Whether the undecorated run, shaken, moves as far as the other differs."""
    if have.shape != want.shape or want.dtype.kind != "f":
        return False
    if not (np.isfinite(have) == np.isfinite(want)).all():
        return False
    with np.errstate(invalid="ignore"):
        differs, moves = (np.nan_to_num(np.abs(x - want)) for x in (have, moved))
    return bool(np.max(differs) <= np.max(moves))


def devices(mesh: Mesh) -> list[Any]:
    found = jax.devices("cpu")
    assert len(found) >= mesh.num_devices, f"{mesh.num_devices} CPU devices are needed"
    return found[: mesh.num_devices]


def random_plan(traced: Traced, mesh: Mesh, rng: Random) -> Plan:
    """A plan with a random choice for every op, and a random layout at boundaries."""
    subject = Subject(
        traced.program, traced.input_paths, traced.output_paths, traced.state_pairs
    )
    reading = read(subject)
    request = Request(mesh, ClusterPrices(parse_cluster("h100:1x8")))
    energy = energy_of(reading, request)
    slots = tuple(_random_slots(kind, mesh, rng) for kind in energy.kinds)
    found = written(reading, energy, Answer(slots, 0))
    return make_plan(
        traced.program,
        found.assignment,
        mesh,
        traced.input_paths,
        traced.output_paths,
    )


def _random_slots(kind: Kind, mesh: Mesh, rng: Random) -> Slots:
    """What each axis does, one after the other; mostly something."""
    slots: Slots = (None,) * len(mesh.axes)
    for number in rng.sample(range(len(mesh.axes)), len(mesh.axes)):
        options = list(kind.options(mesh.names[number]))
        rng.shuffle(options)
        options.sort(key=lambda slot: slot is None and rng.random() < 0.8)
        for slot in options:
            tried = (*slots[:number], slot, *slots[number + 1 :])
            if kind.meaning(tried) is not None:
                slots = tried
                break
    return slots


# ---- the long run -----------------------------------------------------------------


def run_seeds(seeds: Sequence[int], mesh: Mesh) -> dict[int, str]:
    """Seed -> what went wrong; programs that fail together are tried one by one."""
    programs = []
    with jax.enable_x64(True):
        programs = [random_program(Random(seed)) for seed in seeds]
    try:
        check(programs, Random(seeds[0]), mesh)
        return {}
    except Exception:
        if len(seeds) == 1:
            return {seeds[0]: f"{traceback.format_exc(limit=-4)}\n{programs[0]}"}
    half = len(seeds) // 2
    return {**run_seeds(seeds[:half], mesh), **run_seeds(seeds[half:], mesh)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--file", type=Path, default=Path(".cache/fuzz.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    mesh = Mesh.of(x=2, y=4)
    if given.seeds:
        for seed, why in run_seeds(given.seeds, mesh).items():
            print(f"seed {seed}: {why}")
        return
    done = json.loads(given.file.read_text()) if given.file.exists() else {}
    end = time.monotonic() + given.seconds
    every = range(given.first, given.first + given.count)
    suspects = [s for s in every if done.get(str(s)) == ENDED]
    todo = [s for s in every if str(s) not in done]
    groups = [[seed] for seed in suspects]
    groups += [todo[at : at + TOGETHER] for at in range(0, len(todo), TOGETHER)]
    for seeds in groups:
        if time.monotonic() > end:
            break
        given.file.parent.mkdir(parents=True, exist_ok=True)
        began = ENDED if len(seeds) > 1 else ENDED_ALONE
        given.file.write_text(json.dumps(done | dict.fromkeys(map(str, seeds), began)))
        failed = run_seeds(seeds, mesh)
        done |= {str(seed): failed.get(seed, "") for seed in seeds}
        given.file.write_text(json.dumps(done))
        jax.clear_caches()
        for seed, why in failed.items():
            print(f"seed {seed}: {why}", flush=True)
    wrong = [seed for seed, why in done.items() if why]
    print(f"{len(done)} programs, {len(wrong)} failed: {' '.join(wrong)}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
