"""The audit: plan against compiled, on golden texts and on made-up collectives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rhino_jax.errors import VerifyError
from rhino_jax.verify.audit import Audit, PlannedCollective, audit
from rhino_jax.verify.facts import CompiledFacts
from rhino_jax.verify.hlo import HloCollective, Part, read

DATA = Path(__file__).parent / "data"
MESH = {"d": 2, "t": 4}
KIB, MIB = 1024, 1024**2

AG, AR, RS, CP = "all-gather", "all-reduce", "reduce-scatter", "collective-permute"


def check(records: list[PlannedCollective], compiled: object) -> Audit:
    if isinstance(compiled, str):
        compiled = read((DATA / f"{compiled}.hlo").read_text())
    return audit(records, compiled, MESH)  # type: ignore[arg-type]


# What programs.py writes, in wire bytes of one run.
MIXED = [
    PlannedCollective(AG, ("d",), 512 * KIB, where="a.py:1", dtype="float32"),
    PlannedCollective(AR, ("t",), 768 * KIB, where="a.py:2", dtype="float32"),
    PlannedCollective(RS, ("t",), 384 * KIB, where="a.py:3", dtype="float32"),
    PlannedCollective(CP, ("d",), 128 * KIB, where="a.py:4", dtype="float32"),
]
NESTED = [
    PlannedCollective(AG, ("d",), 128 * KIB, 3, where="b.py:1"),
    PlannedCollective(RS, ("t",), 96 * KIB, 15, where="b.py:2"),
    PlannedCollective(AG, ("t",), 96 * KIB, 15, where="b.py:3"),
    PlannedCollective(AR, ("t",), 192 * KIB, where="b.py:4"),
]
ZERO = [
    *[PlannedCollective(AG, ("d",), 2 * MIB, where=f"c.py:{n}") for n in range(3)],
    *[PlannedCollective(RS, ("d",), 2 * MIB, where=f"c.py:{n}") for n in range(3)],
    PlannedCollective(AR, ("d", "t"), 7, where="c.py:9"),
]
PLANS = {"mixed": MIXED, "nested": NESTED, "zero": ZERO}


@pytest.mark.parametrize("where", ["cpu", "h100", "v5e"])
@pytest.mark.parametrize("name", list(PLANS))
def test_the_programs_follow_their_plans(where: str, name: str) -> None:
    found = check(PLANS[name], f"{where}_{name}")
    assert found.ok, str(found)
    assert all(row.ratio == pytest.approx(1.0, abs=1e-6) for row in found.rows)
    narrowed = [note for note in found.notes if "narrowed to bf16" in note]
    assert len(narrowed) == (1 if where == "v5e" else 0), found.notes
    assert str(found).endswith("the compiled program is the plan")


def test_tiny_ones_are_listed_apart_and_counted() -> None:
    found = check(ZERO, "h100_zero")
    assert [(one.kind, one.axes, one.total_bytes) for one in found.tiny] == [
        (AR, "d,t", 7)
    ]
    assert {row.axes: row.compiled_bytes for row in found.rows}["d,t"] == 7
    assert check(ZERO[:-1], "h100_zero").ok
    assert check([*ZERO, ZERO[-1]], "h100_zero").ok


@pytest.mark.parametrize("where", ["cpu", "h100", "v5e"])
def test_an_unplanned_collective_is_named_with_its_line(where: str) -> None:
    found = check(MIXED[:2] + MIXED[3:], f"{where}_mixed")
    assert not found.ok and not found.missing
    (extra,) = found.extra
    assert (extra.kind, extra.axes, extra.total_bytes) == (RS, "t", 384 * KIB)
    assert extra.source.startswith("programs.py:35")
    assert "NOT the plan" in str(found) and "programs.py:35" in str(found)


def test_a_planned_collective_that_is_not_there() -> None:
    more = PlannedCollective("all-to-all", ("t",), 64 * KIB, 2, where="a.py:7")
    found = check([*MIXED, more], "cpu_mixed")
    assert [(one.kind, one.source, one.total_bytes) for one in found.missing] == [
        ("all-to-all", "a.py:7", 128 * KIB)
    ]
    assert not found.extra and not found.ok


def test_wrong_axes_are_both_extra_and_missing() -> None:
    wrong = [replace(MIXED[0], axes=("t",)), *MIXED[1:]]
    found = check(wrong, "cpu_mixed")
    assert [one.axes for one in found.extra] == ["d"]
    assert [one.axes for one in found.missing] == ["t"]


def test_more_turns_than_planned() -> None:
    """A reduce-scatter per microbatch where one after the loop was planned."""
    once = [NESTED[0], replace(NESTED[1], count=1), *NESTED[2:]]
    found = check(once, "h100_nested")
    (extra,) = found.extra
    assert (extra.kind, extra.total_bytes) == (RS, 14 * 96 * KIB)


def test_padding_of_the_tpu_is_noted_not_judged() -> None:
    plan = [PlannedCollective(RS, ("t",), 24 * MIB, where="d.py:1")]
    found = check(plan, "v5e_padded")
    assert found.ok
    (row,) = found.rows
    assert row.ratio == pytest.approx(1.031, abs=1e-3)
    assert row.ratio_unaligned == pytest.approx(1.0)
    assert any("padded and realigned" in note for note in found.notes)


def test_loops_of_unknown_length_are_noted() -> None:
    plan = [PlannedCollective(AR, ("t",), 3 * MIB // 2, where="e.py:1")]
    found = check(plan, "v5e_endless")
    assert found.ok
    assert any("unknown length" in note for note in found.notes)


# ---- what compilers do -----------------------------------------------------------

GROUPS = {"d": ((0, 4), (1, 5), (2, 6), (3, 7)), "t": ((0, 1, 2, 3), (4, 5, 6, 7))}


def made(kind: str, axes: str, name: str, *arrays: tuple[str, int]) -> HloCollective:
    """A compiled collective of these (dtype, bytes) operands."""
    size = sum(array[1] for array in arrays)
    return HloCollective(
        kind=kind,
        name=name,
        dtype=arrays[0][0],
        operand_bytes=size,
        result_bytes=size * (len(GROUPS[axes][0]) if kind == AG else 1),
        groups=GROUPS[axes],
        trip_count=1,
        trip_known=True,
        computation="main",
        source="x.py:1",
        is_async=False,
        parts=tuple(Part(*array) for array in arrays),
    )


def plan(kind: str, axes: str, size: int, dtype: str = "") -> PlannedCollective:
    return PlannedCollective(kind, tuple(axes.split(",")), size, 1, "p.py:1", dtype)


def test_combined_arrays_are_matched_one_by_one() -> None:
    records = [plan(RS, "d", 4 * KIB), plan(RS, "d", 32 * KIB), plan(RS, "d", 512)]
    both = made(RS, "d", "rs", ("f32", 64 * KIB), ("f32", 1024), ("f32", 8 * KIB))
    assert check(records, [both]).ok


def test_concatenated_arrays_are_matched_by_their_sum() -> None:
    records = [plan(AR, "t", 6 * KIB * n) for n in (1, 2, 5)] + [plan(AR, "t", 96)]
    joined = made(AR, "t", "ar", ("f32", 32 * KIB + 64))
    found = check(records, [joined])
    assert found.ok, str(found)
    assert any("by their sum only" in note for note in found.notes)
    assert not check(records, [made(AR, "t", "ar", ("f32", 36 * KIB))]).ok


@pytest.mark.parametrize("told", [True, False])
def test_changed_element_types(told: bool) -> None:
    narrow = check(
        [plan(AG, "d", 64 * KIB, "float32" if told else "")],
        [made(AG, "d", "ag", ("bf16", 32 * KIB))],
    )
    assert narrow.ok and narrow.rows[0].ratio == 1.0
    assert narrow.notes == ("all-gather over d: 32,768 bytes narrowed to bf16",)
    wide = check(
        [plan(AG, "d", 32 * KIB, "bfloat16" if told else "")],
        [made(AG, "d", "ag", ("f32", 64 * KIB))],
    )
    assert wide.ok and wide.rows[0].ratio == 1.0
    assert wide.notes == ("all-gather over d: 65,536 bytes widened to f32",)


def test_half_the_bytes_of_the_same_element_type_are_missing() -> None:
    found = check(
        [plan(AG, "d", 64 * KIB, "float32")], [made(AG, "d", "ag", ("f32", 32 * KIB))]
    )
    assert [one.total_bytes for one in found.missing] == [32 * KIB]


def test_all_reduce_where_a_reduce_scatter_was_planned() -> None:
    """Small reduce-scatters on a TPU: the gathering half is extra, and said so."""
    found = check([plan(RS, "t", 48 * KIB)], [made(AR, "t", "ar", ("f32", 64 * KIB))])
    (extra,) = found.extra
    assert (extra.kind, extra.total_bytes) == (AR, 48 * KIB)
    assert "reduce-scatter over t: 49,152 bytes compiled as all-reduce" in found.notes


def test_small_ones_compiled_as_all_reduce_do_not_count_beside_large_ones() -> None:
    """A TPU gathers 768 numbers by an all-reduce: 0.1% beside a large gather."""
    records = [plan(AG, "t", 4 * MIB), plan(AG, "t", 3 * KIB)]
    large = made(AG, "t", "ag", ("f32", 4 * MIB // 3))
    found = check(records, [large, made(AR, "t", "ar", ("f32", 4 * KIB))])
    assert found.ok and not found.missing, str(found)
    assert "all-gather over t: 3,072 bytes compiled as all-reduce" in found.notes
    assert not check(records[:1], [large, made(AR, "t", "ar", ("f32", 4 * KIB))]).ok


def test_all_reduce_split_into_its_halves() -> None:
    halves = [
        made(RS, "t", "rs", ("f32", 64 * KIB)),
        made(AG, "t", "ag", ("f32", 16 * KIB)),
    ]
    found = check([plan(AR, "t", 96 * KIB)], halves)
    assert found.ok, str(found)
    assert check(
        [plan(RS, "t", 48 * KIB), plan(AG, "t", 48 * KIB)],
        [made(AR, "t", "ar", ("f32", 64 * KIB))],
    ).ok


def test_tolerance_is_five_percent() -> None:
    records = [plan(RS, "t", 48 * KIB)]
    assert check(records, [made(RS, "t", "rs", ("f32", 66 * KIB))]).ok
    assert not check(records, [made(RS, "t", "rs", ("f32", 70 * KIB))]).ok
    assert not check(records, [made(RS, "t", "rs", ("f32", 56 * KIB))]).ok


def test_axes_of_size_one_are_left_out() -> None:
    one = made(RS, "t", "rs", ("f32", 64 * KIB))
    record = PlannedCollective(RS, ("s", "t"), 48 * KIB)
    found = audit([record], [one], {"d": 2, "s": 1, "t": 4})
    assert found.ok and [row.axes for row in found.rows] == ["t"]


def test_nothing_to_audit() -> None:
    refused = CompiledFacts("refused", "v5e:2x4", 8, "libtpu", "1", "too large")
    with pytest.raises(VerifyError, match="refused: too large"):
        audit([], refused, MESH)
    assert audit([], [], MESH).ok
