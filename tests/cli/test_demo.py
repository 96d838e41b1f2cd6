"""``rhino demo``: plans, trains, and agrees with the undecorated step."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def rhino(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rhino_jax.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_trains_beside_the_undecorated_step() -> None:
    """Over 20 seconds: three programs for 8 devices are compiled."""
    out = rhino("demo", "--steps", "6")
    pairs = re.findall(r"loss (\d\.\d+)   undecorated (\d\.\d+)", out)
    assert len(pairs) == 3
    for ours, plain in pairs:
        assert float(ours) == pytest.approx(float(plain), rel=1e-4)
    assert re.search(r"[\d,]+ tokens per second", out)


def test_plan_for_a_cluster() -> None:
    out = rhino("demo", "--cluster", "h100:2x8", "--recipe", "zero3")
    assert "h100:2x8" in out and "reduce-scatter" in out


def test_a_wrong_recipe_is_a_message() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rhino_jax.cli", "demo", "--recipe", "zero4"],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode != 0
    assert "zero3" in done.stderr and "Traceback" not in done.stderr
