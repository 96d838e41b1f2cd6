"""What each of several processes runs for ``test_staged``: ``staged.py FOLDER``.

Pipelines whose workers are processes, lie across them, or share one. Every check is
made in every process; the first writes what the test goes on with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from benchmarks.equality import STATE_TOLERANCE, worst_leaf
from benchmarks.models.branches import STEPS
from rhino_jax.errors import OptionsError
from tests.api import resumed


def across(workers: int, **axes: int) -> jax.sharding.Mesh:
    """Devices of all processes in turn, so that every worker has some of each."""
    by_process = np.array(jax.devices(), object).reshape(jax.process_count(), -1)
    grid = by_process.T.reshape(workers, *axes.values())
    return jax.sharding.Mesh(grid, ("stage", *axes))


def plans() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> step, and options: a worker a process, workers across processes, two
    workers a process."""
    half = len(jax.devices()) // 2
    tied = {"recipe": "zero3", "microbatches": 4, "pipeline_stages": 2}
    return {
        "a worker a process": ("tied", tied),
        "workers across": ("tied", {**tied, "mesh": across(2, data=half)}),
        "two workers a process": (
            "unet",
            {"pipeline_stages": 4, "schedule": "zero_bubble", "microbatches": 4},
        ),
    }


def check(name: str, options: dict[str, Any], trace: Path) -> None:
    """Created in place, fed with rows and with all, fetched, put back and recorded."""
    step, state, batch = STEPS[name]("float64")
    state = jax.device_get(state)
    piped = rhino.auto_parallel(cache_dir="", **options)(step)
    rank, count = jax.process_index(), jax.process_count()
    rows = jax.tree.map(lambda x: np.split(x, count)[rank], batch)

    def init(_: jax.Array) -> Any:
        return jax.tree.map(jnp.asarray, state)

    now = piped.init(init, jax.random.key(0), rhino.global_shapes(rows))
    expected = state
    for given in (piped.shard_batch(rows), batch):
        now, metrics = piped(now, given)
        expected, wanted = jax.jit(step)(expected, batch)
        np.testing.assert_allclose(
            float(metrics["loss"]), float(wanted["loss"]), rtol=1e-9
        )
    error, path = worst_leaf(expected, piped.fetch(now))
    assert error <= STATE_TOLERANCE, f"{name}: {path}: {error}"
    again, metrics = piped(piped.place(piped.fetch(now)), batch)
    expected, wanted = jax.jit(step)(expected, batch)
    np.testing.assert_allclose(float(metrics["loss"]), float(wanted["loss"]), rtol=1e-9)
    with pytest.raises(OptionsError, match="several processes"):
        rhino.follow(piped, lambda state, _: state)(again, batch)
    again, metrics = piped.trace(trace, again, batch)
    expected, wanted = jax.jit(step)(expected, batch)
    np.testing.assert_allclose(float(metrics["loss"]), float(wanted["loss"]), rtol=1e-9)
    assert len(piped._entries) == 1, "what came back is what was planned"


def save(folder: Path) -> list[float]:
    """All sorts of leaves saved, read back to where they lay, and two more losses."""
    step = rhino.auto_parallel(
        pipeline_stages=2, recipe="data_parallel", microbatches=1, cache_dir=""
    )(resumed.train_step)
    state = step.init(resumed.init, jax.random.key(0), resumed.X)
    state, _ = step(state, resumed.X)
    step.save(folder / "saved", state, 1)
    again = step.restore(folder / "saved")
    for a, b in zip(*map(jax.tree.leaves, (state, again)), strict=True):
        assert a.sharding == b.sharding
    expected, _ = resumed.losses(step, state, 2)
    assert resumed.losses(step, again, 2)[0] == expected
    assert len(step._entries) == 1
    return expected


def main(folder: Path) -> None:
    rhino.initialize()
    losses = save(folder)
    with jax.enable_x64(True):
        for plan, (name, options) in plans().items():
            check(name, options, folder / f"{plan}.json")
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
