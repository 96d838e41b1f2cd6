"""Published plans: the comparison itself, and rows quick enough for every run."""

from __future__ import annotations

import pytest

from benchmarks.expert.rows import Expected, Row, rows
from benchmarks.rediscovery import FINDING, MISS, PASS, judge, tried
from rhino_jax.sent import Collective

ROWS = {row.name: row for row in rows()}
NAMED = {
    *("M1", "M3", "M4", "M6", "M9a", "M9b", "B1", "B2", "B4", "B5", "B6", "E1"),
    *("C1", "C2", "C3", "X1a", "X1b", "X2", "X3", "X4a", "X4b", "X5a", "X5b", "G1"),
}
QUICK = ("M1", "M3", "M4", "M9b", "B2", "E1", "C3", "X2", "X3", "G1")


def collective(kind: str, axis: str, wire_bytes: int, count: int = 1) -> Collective:
    return Collective(kind, (axis,), wire_bytes, count, "float32", (4, 4), "here")


def row(*expected: Expected, **beta: float) -> Row:
    return Row("T", "test", ROWS["M1"].build, {"x": 4, "y": 2}, expected, beta)


def test_every_row_that_is_asked_for_is_there() -> None:
    assert set(ROWS) >= NAMED
    assert len(ROWS) == len(rows())


def test_bytes_are_those_of_one_counter() -> None:
    sizes = {"x": 4}
    found = {
        kind: Expected(kind, "x", 400.0, 2).wire_bytes(sizes)
        for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    }
    assert found == {
        "all-reduce": 1200.0,
        "all-gather": 600.0,
        "reduce-scatter": 600.0,
        "all-to-all": 150.0,
    }


def test_a_miss_is_a_miss_and_less_is_a_finding() -> None:
    asked = row(Expected("all-reduce", "x", 1_000_000))
    same = [collective("all-reduce", "x", 1_500_000)]
    halves = [
        collective("reduce-scatter", "x", 750_000),
        collective("all-gather", "x", 750_000),
    ]
    assert judge(asked, same).verdict == PASS
    assert judge(asked, halves).verdict == PASS
    assert judge(asked, [*same, collective("all-gather", "x", 9_000)]).verdict == MISS
    assert judge(asked, halves[:1]).verdict == FINDING


def test_each_axis_has_its_price() -> None:
    asked = row(Expected("all-reduce", "x", 1_000_000), x=1.0, y=0.1)
    on_y = [collective("all-reduce", "y", 14_000_000)]
    assert judge(asked, on_y).verdict == FINDING
    both = Collective("all-reduce", ("x", "y"), 14_000_000, 1, "float32", (4,), "")
    assert judge(asked, [both]).verdict == MISS


@pytest.mark.parametrize("name", QUICK)
def test_the_search_finds_it(name: str) -> None:
    outcome = tried(ROWS[name])
    assert outcome.verdict != MISS, (outcome.found, outcome.expected)
