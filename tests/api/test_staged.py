"""Pipelines on several processes: the undecorated step's results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.test_processes import launch

pytestmark = pytest.mark.multiprocess


def test_pipelines_of_two_processes_are_the_undecorated_step(tmp_path: Path) -> None:
    done = launch(Path(__file__).with_name("staged.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in tmp_path.iterdir()} >= {"0.json", "1.json"}
