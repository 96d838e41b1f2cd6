"""The benchmarks of schedules and stage cuts, on a little of what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import schedules, stage_cuts


def test_the_table_has_the_bubble_of_the_papers() -> None:
    """(p - 1) / (m + p - 1) for 1F1B, at most 1 microbatch of all layers kept."""
    options = ["--workers", "4", "--microbatches", "8"]
    result = CliRunner().invoke(schedules.main, options)
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines()}
    assert lines["1f1b"] == [f"{3 / 11:.1%}", "|", "1.00"]
    assert lines["zero_bubble"] == [f"{3 / 27:.1%}", "|", "1.00"]
    assert lines["gpipe"] == [f"{3 / 11:.1%}", "|", "2.00"]


def test_a_sweep_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "MICROBATCHES", range(1, 5))
    file = tmp_path / "sweep.jsonl"
    assert schedules.run_sweep(file, range(1, 3)) == 0
    rows = file.read_text().splitlines()
    assert len(rows) == 2 * 6
    file.write_text("\n".join(rows[:5]) + "\n")
    monkeypatch.setattr(schedules, "as_told", lambda name, p, m, v: (p, m) != (2, 3))
    assert schedules.run_sweep(file, range(1, 3)) == 6
    assert file.read_text().splitlines()[:5] == rows[:5]


def test_found_cuts_are_no_worse_than_estimated_ones() -> None:
    rows = [
        stage_cuts.gaps(stage_cuts.small_problem(seed, "1f1b", True))
        for seed in range(10)
    ]
    assert all(0 <= found <= by_estimate for by_estimate, found in rows)
    assert any(by_estimate > 0 for by_estimate, _ in rows)
