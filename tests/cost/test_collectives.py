"""Seconds of collectives: the formulas by hand, and what must hold of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Crossing, Link, crossing
from rhino_jax.cost.collectives import collective_seconds, step_seconds
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TIME, TORUS, Mesh
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
    SLICE,
    Step,
)

KINDS = (ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, PERMUTE, REDUCE_SCATTER)
SECONDS = pytest.approx


def link(rate: float, latency: float = 1e-12, **more: object) -> Link:
    return Link("made up", "nvlink", rate, latency, "", "", **more)  # type: ignore[arg-type]


FAST, SLOW = link(100.0, 0.25), link(10.0, 2.0)


@pytest.mark.parametrize(
    ("kind", "wire_bytes", "seconds"),
    [
        # 4 devices, 1200 bytes gathered: 3 hops, 900 bytes.
        (ALL_GATHER, 900, 3 * 0.25 + 900 / 100),
        (REDUCE_SCATTER, 900, 3 * 0.25 + 900 / 100),
        (ALL_REDUCE, 1800, 6 * 0.25 + 1800 / 100),
        (ALL_TO_ALL, 900, 3 * 0.25 + 900 / 100),
        (PERMUTE, 1200, 0.25 + 1200 / 100),
    ],
)
def test_over_one_link(kind: str, wire_bytes: int, seconds: float) -> None:
    assert collective_seconds(kind, wire_bytes, ((FAST, 4),)) == SECONDS(seconds)


@pytest.mark.parametrize(
    ("kind", "wire_bytes", "seconds"),
    [
        # 4 hosts of 8: 3200 bytes gathered, of which 100 a device; over the network
        # 400 are put together of 4 times 100, inside the host 3200 of 8 times 400.
        (ALL_GATHER, 3100, 7 * 0.25 + 2800 / 100 + 3 * 2.0 + 300 / 10),
        (REDUCE_SCATTER, 3100, 7 * 0.25 + 2800 / 100 + 3 * 2.0 + 300 / 10),
        (ALL_REDUCE, 6200, 2 * (7 * 0.25 + 2800 / 100 + 3 * 2.0 + 300 / 10)),
        # 100 bytes to each of 7 peers in the host and 24 in others.
        (ALL_TO_ALL, 3100, 7 * 0.25 + 700 / 100 + 3 * 2.0 + 2400 / 10),
        (PERMUTE, 100, 2.0 + 100 / 10),
    ],
)
def test_over_two_levels(kind: str, wire_bytes: int, seconds: float) -> None:
    crossed = ((FAST, 8), (SLOW, 4))
    assert collective_seconds(kind, wire_bytes, crossed) == SECONDS(seconds)


def test_a_closed_ring_sends_both_ways_but_a_permute() -> None:
    ring = Link("torus", TORUS, 100.0, 1e-9, "", "", wraps=True)
    assert collective_seconds(ALL_GATHER, 900, ((ring, 4),)) == SECONDS(4.5, rel=1e-6)
    assert collective_seconds(PERMUTE, 900, ((ring, 4),)) == SECONDS(9.0, rel=1e-6)


@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(2, 8), min_size=1, max_size=3),
    st.integers(1, 10**9),
)
def test_levels_of_one_speed_are_one_ring(
    kind: str, sizes: list[int], wire_bytes: int
) -> None:
    one = link(1e9, 1e-15)
    levels: Crossing = tuple((one, size) for size in sizes)
    flat = collective_seconds(kind, wire_bytes, ((one, math.prod(sizes)),))
    assert collective_seconds(kind, wire_bytes, levels) == SECONDS(flat, abs=1e-11)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 10**9),
    st.integers(1, 10**9),
    st.integers(2, 16),
    st.integers(2, 16),
)
def test_more_bytes_take_longer_and_slower_links_too(
    kind: str, few: int, more: int, inner: int, outer: int
) -> None:
    fast, slow = link(1e9, 1e-6), link(1e8, 1e-5)
    levels = ((fast, inner), (slow, outer))
    a = collective_seconds(kind, few, levels)
    assert collective_seconds(kind, few + more, levels) > a > 0
    assert collective_seconds(kind, few, ((slow, inner), (slow, outer))) >= a


def test_over_the_links_of_a_cluster() -> None:
    cluster, mesh = parse_cluster("h100:2x8"), Mesh.of(data=2, tensor=8)
    whole, rows = Layout.replicated(1), Layout.of((("data", 512),))

    def seconds(kind: str, axis: str, wire_bytes: int = 10**8) -> float:
        step = Step(kind, (axis,), rows, whole, wire_bytes)
        return step_seconds(step, mesh, cluster)

    assert seconds(ALL_GATHER, "data") > 3 * seconds(ALL_GATHER, "tensor")
    crossed = crossing(cluster, mesh, ("data",))
    by_hand = collective_seconds(ALL_GATHER, 10**8, crossed)
    assert seconds(ALL_GATHER, "data") == by_hand
    assert seconds(ALL_GATHER, "data", 0) == seconds(SLICE, "data") == 0.0


def test_the_time_axis_crosses_nothing() -> None:
    cluster = parse_cluster("h100:1x8")
    mesh = Mesh.of(data=8, **{TIME: 4})
    whole = Layout.replicated(1)
    term = whole.with_partial(TIME, "sum")
    step = Step(ALL_REDUCE, (TIME,), term, whole, 10**9)
    assert step_seconds(step, mesh, cluster) == 0.0
