"""Several processes: the undecorated step's results, refusals, killed processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import rhino_jax as rhino
from benchmarks.faults import killed, losses_of, start
from benchmarks.resumable import EVERY, STEPS, batch_of
from benchmarks.resumable import init as resumable_init
from benchmarks.resumable import train_step as resumable_step
from tests.api.among import PLANS
from tests.api.resumed import X, init, make

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
TOLD = {
    "x of shape (16, 8) (this process's rows (8, 8)), given (7, 8)": 2,
    "ProcessError planning <lambda>: the processes differ:": 2,
    "option memory_limit_bytes: 1000000000 in process 0; 1000000001 in process 1": 2,
    "- program: ": 2,
}
"""What is told, and how often: once by each process."""


def launch(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rhino_jax.cli", "launch", "-n", "2", "--all"]
    return subprocess.run(
        [*command, "--devices", "2", str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def test_two_processes_are_the_undecorated_step(tmp_path: Path) -> None:
    """A process alone goes on from what they saved; unlike ones are refused."""
    done = launch(Path(__file__).with_name("among.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for said, count in TOLD.items():
        assert done.stdout.count(said) == count, done.stdout
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second and first["plan"][1] == 4
    shapes = jax.eval_shape(init, jax.random.key(0))
    for name in PLANS:
        step = make(8)
        _, loss = step(step.restore(tmp_path / name, shapes, X), X)
        np.testing.assert_allclose(float(loss), first["next"], rtol=1e-5)


def test_killed_processes_end_the_job_and_it_goes_on(tmp_path: Path) -> None:
    """Process 1 after the first checkpoint; process 0, of a pipeline, after the second:
    it tells what its stage did."""
    for rank, step, stages in ((1, EVERY + 1, 0), (0, 2 * EVERY - 1, 2)):

        def when(_: float, step: int = step) -> bool:
            return written(tmp_path) > step

        death = killed(tmp_path, 2, rank, when, stages)
        assert death is not None and death.named, death
        assert death.exit_code == 128 + 9 and death.exit_seconds < 30
        assert "its last instruction: " in death.last_line
    assert re.search(r"train_step, call \d+: .* worker [01]", death.last_line)
    job = start(tmp_path, 2)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    state, plain, expected = (
        resumable_init(jax.random.key(0)),
        jax.jit(resumable_step),
        [],
    )
    for number in range(STEPS):
        state, loss = plain(state, batch_of(number))
        expected.append(float(loss))
    rows = losses_of(tmp_path)
    found = [row["loss"] for row in rows]
    wanted = [expected[int(row["step"])] for row in rows]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert {int(row["step"]) for row in rows} == set(range(STEPS))
    assert rhino.saved_steps(tmp_path / "checkpoints")[-1] == STEPS


def written(folder: Path) -> int:
    rows = losses_of(folder)
    return int(rows[-1]["step"]) if rows else -1
