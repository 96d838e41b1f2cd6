"""Is the parallel step the undecorated step? The zoo × recipes × meshes, by running.

On 8 simulated CPU devices. In float64: gradients (read off one step of SGD with rate
1) and the state after 3 steps of the model's own optimizer, per leaf within
``1e-9 × max(leaf norm, 1e-3 × tree norm)``. In float32: the first loss within 1e-5 and
the third within 1e-3. Results are kept in a file; cells already there are not run
again. ``python -m benchmarks.equality --help``.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time; level 0 leaves LLVM's own optimizations out.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)

import click
import jax
import numpy as np
import optax

import rhino_jax as rhino
from benchmarks.kept import by_key, keep
from benchmarks.models import NAMES, build
from benchmarks.models.zoo import Model, run_init
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.ir.mesh import Mesh
from rhino_jax.options import make_options
from rhino_jax.plan import make_plan
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta
from rhino_jax.search.recipes import RECIPES, applies

MESHES = {
    "8": {"data": 8},
    "2x4": {"data": 2, "tensor": 4},
    "2x2x2": {"pod": 2, "data": 2, "tensor": 2},
}
SEARCH, BY_BYTES = "search", "search by bytes"
CHECKS = ("gradients", "state", "float32")
STATE_TOLERANCE = 1e-9
FIRST_LOSS_TOLERANCE, THIRD_LOSS_TOLERANCE = 1e-5, 1e-3


@cache
def reference(name: str, check: str) -> tuple[Model, Any, Any, list[Any], Any]:
    """Undecorated: the model, its first state and batch, the losses, the last state."""
    model = build(name, **_build_options(check))
    step, state, batch = run_init(model)
    state = jax.device_get(state) if check != "float32" else state
    jitted = jax.jit(step)
    losses, now = [], state
    for _ in range(1 if check == "gradients" else 3):
        now, metrics = jitted(now, batch)
        losses.append(float(metrics["loss"]))
    return model, state, batch, losses, now


def _build_options(check: str) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": "float32" if check == "float32" else "float64"}
    if check == "gradients":
        options["optimizer"] = optax.sgd(1.0)
    return options


def decorated(
    model: Model, recipe: str, mesh: str, state: Any, batch: Any
) -> rhino.ParallelFunction:
    """The step by a recipe, as searched for these devices, or as searched by bytes.

    On simulated devices tiny models are best left whole; where compute is free and
    no product may be done twice, the search has to split everything.
    """
    options = {"mesh": MESHES[mesh], "donate": False}
    if recipe != BY_BYTES:
        name = "" if recipe == SEARCH else recipe
        return rhino.auto_parallel(recipe=name, **options)(model.train_step)
    traced = traced_bare(model.train_step, (state, batch), {}, make_options())
    grid = Mesh.of(**MESHES[mesh])
    weight = 0.3  # of a byte held, against one sent: ZeRO pays
    request = Request(grid, AlphaBeta(), weight, replicate_heavy=False)
    found = search(subject_of(traced), request)
    plan = make_plan(
        traced.program,
        found.assignment,
        grid,
        traced.input_paths,
        traced.output_paths,
    )
    return rhino.auto_parallel(plan=plan, **options)(model.train_step)


def cell(name: str, recipe: str, mesh: str, check: str) -> dict[str, Any]:
    """Run one check of one cell; ``outcome`` is "equal" or says what differs."""
    with jax.enable_x64(check != "float32"):
        model, state, batch, losses, expected = reference(name, check)
        began = time.perf_counter()
        step = decorated(model, recipe, mesh, state, batch)
        planned = step.planned(state, batch)
        subject = subject_of(planned.traced)
        if recipe in RECIPES and not applies(
            RECIPES[recipe], subject, planned.plan.mesh
        ):
            return {"outcome": "does not apply"}
        plan_seconds = time.perf_counter() - began
        now, found = state, []
        for _ in losses:
            now, metrics = step(now, batch)
            found.append(float(metrics["loss"]))
        if check == "float32":
            return {"plan_seconds": plan_seconds, **_losses_agree(losses, found)}
        worst, path = worst_leaf(expected, now)
        return {
            "outcome": "equal" if worst <= STATE_TOLERANCE else f"differs at {path}",
            "worst": worst,
            "plan_seconds": plan_seconds,
        }


def _losses_agree(expected: list[float], found: list[float]) -> dict[str, Any]:
    first = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-30)
    third = abs(found[2] - expected[2]) / max(abs(expected[2]), 1e-30)
    good = first <= FIRST_LOSS_TOLERANCE and third <= THIRD_LOSS_TOLERANCE
    outcome = "equal" if good else f"losses {expected} and {found}"
    return {"outcome": outcome, "worst": max(first, third)}


def worst_leaf(expected: Any, found: Any) -> tuple[float, str]:
    """The largest difference of a leaf, over max(its norm, 1e-3 × the tree's)."""
    paths = jax.tree.leaves_with_path(expected)
    pairs = [
        (jax.tree_util.keystr(path), _array(a), _array(b))
        for (path, a), b in zip(paths, jax.tree.leaves(found), strict=True)
    ]
    whole = float(np.sqrt(sum(np.sum(np.square(a)) for _, a, _ in pairs)))
    errors = [
        (
            float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-3 * whole, 1e-300)),
            path,
        )
        for path, a, b in pairs
    ]
    return max(errors)


def _array(x: Any) -> np.ndarray:
    if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.float64).ravel()


@click.command()
@click.option("--models", default=",".join(NAMES), show_default=True)
@click.option("--recipes", default=",".join((*RECIPES, SEARCH, BY_BYTES)))
@click.option("--meshes", default=",".join(MESHES), show_default=True)
@click.option("--checks", default=",".join(CHECKS), show_default=True)
@click.option(
    "--out",
    default="equality.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
def main(models: str, recipes: str, meshes: str, checks: str, out: Path) -> None:
    """Run what is missing and say what is not equal."""
    done = by_key(out)
    for name in models.split(","):
        for check in checks.split(","):
            for mesh in meshes.split(","):
                for recipe in recipes.split(","):
                    key = f"{name}|{recipe}|{mesh}|{check}"
                    if key not in done:
                        row = {"key": key}
                        try:
                            row |= cell(name, recipe, mesh, check)
                        except rhino.RhinoError as error:
                            needs = "needs" in str(error)
                            row["outcome"] = (
                                "does not apply" if needs else f"error: {error}"
                            )
                        done[key] = row
                        keep(out, row)
                    click.echo(f"{key}: {done[key]['outcome']}")
        reference.cache_clear()
        jax.clear_caches()
    outcomes = [row["outcome"] for row in done.values()]
    run = [outcome for outcome in outcomes if outcome != "does not apply"]
    equal = sum(outcome == "equal" for outcome in run)
    click.echo(f"{equal} of {len(run)} cells equal")


if __name__ == "__main__":
    main()
