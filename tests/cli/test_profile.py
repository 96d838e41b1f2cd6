"""``rhino profile``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rhino_jax.cli import main
from rhino_jax.cluster.profile import COMPILE_ONLY, Profile, shipped


def test_a_profile_is_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = shipped("v5e", COMPILE_ONLY)
    assert wanted is not None

    def made(name: str, told: Any) -> Profile:
        told("kernels", 1, 2)
        return wanted

    command = importlib.import_module("rhino_jax.cli.profile")
    monkeypatch.setattr(command, "compiled_profile", made)
    place = tmp_path / "v5e.json"
    arguments = ["profile", "--compile-only", "v5e", "--out", str(place)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "batched product" in result.output and str(place) in result.output
    assert Profile.load(place) == wanted


def test_devices_that_no_compiler_prices() -> None:
    result = CliRunner().invoke(main, ["profile", "--compile-only", "v4"])
    assert result.exit_code == 1
    assert "no compiler prices kernels of v4" in result.output
