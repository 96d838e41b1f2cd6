"""Pipelines on several processes: the undecorated step's results, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rhino_jax.report.timeline import RUNS
from tests.api.resumed import X, init, losses, make
from tests.api.test_processes import launch

pytestmark = pytest.mark.multiprocess


def test_pipelines_of_two_processes_are_the_undecorated_step(tmp_path: Path) -> None:
    """And one process alone goes on from what they saved, without stages."""
    done = launch(Path(__file__).with_name("staged.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second
    assert workers_in(tmp_path, "a worker a process") == [{0}, {1}]
    assert workers_in(tmp_path, "workers across") == [{0, 1}, {0, 1}]
    assert workers_in(tmp_path, "two workers a process") == [{0, 1}, {2, 3}]
    step = make()
    shapes = jax.eval_shape(init, jax.random.key(0))
    found, _ = losses(step, step.restore(tmp_path / "saved", shapes, X), 2)
    np.testing.assert_allclose(found, first, rtol=1e-5)


def workers_in(folder: Path, name: str) -> list[set[int]]:
    """The workers whose runs each process recorded."""
    return [
        {
            e["pid"]
            for e in json.loads((folder / f"{name}.{rank}.json").read_text())[
                "traceEvents"
            ]
            if e["ph"] == "X" and e["tid"] == RUNS and e["cat"] != "outside"
        }
        for rank in (0, 1)
    ]
