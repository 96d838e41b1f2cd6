"""Seconds of collectives: the formulas by hand, and what must hold of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Crossing, Fit, Link, crossing
from rhino_jax.cost.collectives import collective_seconds, step_seconds
from rhino_jax.cost.compute import memory_seconds
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
Digits = Sequence[tuple[str, int]]


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
        # 4 hosts of 8, 8 rings at once: 28 steps inside hosts, 3 between; each ring
        # carries an eighth over the network.
        (ALL_GATHER, 3100, 28 * 0.25 + 3 * 2.0 + 3100 / 8 / 10),
        (REDUCE_SCATTER, 3100, 28 * 0.25 + 3 * 2.0 + 3100 / 8 / 10),
        (ALL_REDUCE, 6200, 2 * (28 * 0.25 + 3 * 2.0 + 3100 / 8 / 10)),
        # 32 bytes gathered: level by level. Over the network 4 are put together of 4
        # times 1, inside the host 32 of 8 times 4.
        (ALL_GATHER, 31, 7 * 0.25 + 28 / 100 + 3 * 2.0 + 3 / 10),
        (REDUCE_SCATTER, 31, 7 * 0.25 + 28 / 100 + 3 * 2.0 + 3 / 10),
        (ALL_REDUCE, 62, 2 * (7 * 0.25 + 28 / 100 + 3 * 2.0 + 3 / 10)),
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


def torus(rate: float, latency: float, wraps: bool = True) -> Link:
    return Link("torus", TORUS, rate, latency, "", "", wraps)


def test_a_closed_ring_takes_half_the_steps() -> None:
    closed, line = torus(1e30, 1.0), torus(1e30, 1.0, wraps=False)
    assert collective_seconds(ALL_GATHER, 8, ((closed, 16),)) == SECONDS(8)
    assert collective_seconds(ALL_GATHER, 8, ((line, 16),)) == SECONDS(15)


def test_dimensions_of_a_torus_work_at_once() -> None:
    one = torus(10.0, 1e-12)
    # 1600 bytes, 1500 of them sent: half first along x, half first along y, 20 a second
    # each (750/20), instead of 1200 along one and then 300 along the other.
    square = ((one, 4), (one, 4))
    assert collective_seconds(ALL_GATHER, 1500, square) == SECONDS(1500 / 40)
    assert collective_seconds(ALL_REDUCE, 3000, square) == SECONDS(2 * 1500 / 40)
    cube = ((one, 4), (one, 4), (one, 4))
    assert collective_seconds(ALL_GATHER, 6300, cube) == SECONDS(6300 / 60)


def test_slices_reduce_over_the_slow_network_what_ici_has_divided() -> None:
    ici, dcn = torus(10.0, 1e-12), link(1.0, 1e-12)
    crossed = ((ici, 4), (ici, 4), (dcn, 2))
    # 1600 bytes: scattered over 16 chips, 100 of them reduced with the other slice.
    wire_bytes = 2 * 1600 * 31 // 32
    inside = 2 * 1500 / 40
    assert collective_seconds(ALL_REDUCE, wire_bytes, crossed) == SECONDS(inside + 100)


@pytest.mark.parametrize(
    ("count", "wraps", "seconds"),
    [
        # 100 bytes a device to each of n: what crosses the middle, over its wires.
        (4, False, 2 * 2 * 100 / 10),  # 2 devices send 200 to the other 2: one wire
        (4, True, 2 * 2 * 100 / 2 / 10),  # two wires
        (8, True, 4 * 4 * 100 / 2 / 10),
    ],
)
def test_an_all_to_all_on_a_torus_is_bound_by_its_middle(
    count: int, wraps: bool, seconds: float
) -> None:
    crossed = ((torus(10.0, 1e-12, wraps), count),)
    wire_bytes = 100 * (count - 1)
    assert collective_seconds(ALL_TO_ALL, wire_bytes, crossed) == SECONDS(seconds)


def test_small_all_reduces_go_by_tree() -> None:
    """By hand: 32 hosts of 8, a chain of 8 and binary trees of 32, there and back."""
    crossed = crossing(parse_cluster("h100:32x8"), Mesh.of(d=256), ("d",))
    tree = 2 * (7 * 1.25e-6 + 5 * 8.5e-6)
    assert collective_seconds(ALL_REDUCE, 2, crossed) == SECONDS(tree, rel=1e-3)
    few = crossing(parse_cluster("h100:1x8"), Mesh.of(d=8), ("d",))
    assert collective_seconds(ALL_REDUCE, 2, few) == SECONDS(6 * 1.25e-6, rel=1e-3)


def flat_ring(kind: str, wire_bytes: int, crossed: Crossing) -> float:
    """One ring through all devices, in step with the slowest link."""
    size = math.prod(count for _, count in crossed)
    latency = max(link.latency_seconds for link, _ in crossed)
    rate = min(link.bytes_per_second for link, _ in crossed)
    steps = (size - 1) * (2 if kind == ALL_REDUCE else 1)
    return steps * latency + wire_bytes / rate


@given(
    st.sampled_from((ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER)),
    st.sampled_from(("h100:4x8", "gb200:36x4", "v5e:16x16x4slices", "v4:2x2x4")),
    st.integers(1, 10**11),
)
def test_levels_are_never_worse_than_one_flat_ring(
    kind: str, text: str, wire_bytes: int
) -> None:
    cluster = parse_cluster(text)
    mesh = Mesh.of(d=cluster.num_devices)
    crossed = crossing(cluster, mesh, ("d",))
    found = collective_seconds(kind, wire_bytes, crossed)
    assert found <= flat_ring(kind, wire_bytes, crossed) * (1 + 1e-9)


@given(
    st.sampled_from(KINDS),
    st.sampled_from(("h100:4x8", "gb200:36x4", "v5e:16x16x4slices", "v4:2x2x4")),
    st.integers(1, 10**10),
    st.integers(1, 10**10),
)
def test_more_bytes_take_longer_on_every_cluster(
    kind: str, text: str, few: int, more: int
) -> None:
    cluster = parse_cluster(text)
    mesh = Mesh.of(d=cluster.num_devices)
    crossed = crossing(cluster, mesh, ("d",))
    least = collective_seconds(kind, few, crossed)
    assert 0 < least <= collective_seconds(kind, few + more, crossed)


def test_a_profile_takes_the_place_of_rings() -> None:
    fits = tuple(
        Fit(ALL_REDUCE, n, ((10.0, n / 2), (1010.0, n / 2 + 100))) for n in (2, 8)
    )
    told = link(100.0, 0.25, fits=fits)
    assert collective_seconds(ALL_REDUCE, 100, ((told, 2),)) == SECONDS(10.0)
    assert collective_seconds(ALL_REDUCE, 100, ((told, 4),)) == SECONDS(11.5)
    assert collective_seconds(ALL_REDUCE, 100, ((told, 64),)) == SECONDS(13.0)
    unknown = collective_seconds(ALL_GATHER, 100, ((told, 2),))
    assert unknown == collective_seconds(ALL_GATHER, 100, ((link(100.0, 0.25), 2),))


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


@pytest.mark.parametrize(
    ("kind", "source", "target", "copies"),
    [
        (ALL_GATHER, ([("x", 8)], []), ([], []), 0),
        (ALL_GATHER, ([], [("x", 8)]), ([], []), 1),
        (REDUCE_SCATTER, ([], []), ([], [("x", 8)]), 1),
        (ALL_TO_ALL, ([("x", 8)], []), ([], [("x", 8)]), 1),
        (ALL_TO_ALL, ([("y", 1)], [("x", 8)]), ([("y", 1)], [("x", 1)]), 2),
        (ALL_REDUCE, ([], [("y", 8)]), ([], [("y", 8)]), 0),
    ],
)
def test_simulated_devices_copy_what_does_not_lie_together(
    kind: str, source: Sequence[Digits], target: Sequence[Digits], copies: int
) -> None:
    mesh = Mesh.of(x=4, y=2)
    step = Step(kind, ("x",), Layout.of(*source), Layout.of(*target), 3000)
    for name, times in (("cpu:8", copies), ("h100:1x8", 0)):
        cluster = parse_cluster(name)
        crossed = crossing(cluster, mesh, ("x",))
        bare = collective_seconds(kind, 3000, crossed)
        copied = memory_seconds(2 * 4000, cluster.device)  # read and written
        assert step_seconds(step, mesh, cluster) == SECONDS(bare + times * copied)
