"""Which links a group of mesh axes crosses, against the groups counted one by one."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rhino_jax.cluster.hardware import CATALOGUE
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import (
    NETWORK,
    NVLINK,
    Cluster,
    Link,
    crossing,
    linked,
    slowest,
)
from rhino_jax.ir.mesh import TIME, TORUS, Axis, Mesh

NAMES = ("a", "b", "c")


def brief(text: str, mesh: Mesh, *axes: str) -> list[tuple[str, int]]:
    return [(k.name, n) for k, n in crossing(parse_cluster(text), mesh, axes)]


def test_gpus() -> None:
    mesh = Mesh.of(data=2, tensor=8)
    assert brief("h100:2x8", mesh, "tensor") == [("NVLink", 8)]
    assert brief("h100:2x8", mesh, "data") == [("InfiniBand", 2)]
    both = [("NVLink", 8), ("InfiniBand", 2)]
    assert brief("h100:2x8", mesh, "data", "tensor") == both
    assert brief("h100:2x8", Mesh.of(data=16), "data") == both
    assert brief("h100:2x8", mesh) == []
    assert slowest(crossing(parse_cluster("h100:2x8"), mesh, ())) is None


def test_an_axis_of_one_and_time_cross_nothing() -> None:
    mesh = Mesh((Axis(TIME, 4), Axis("d", 8), Axis("one", 1)))
    assert brief("h100:1x8", mesh, TIME, "one") == []
    assert brief("h100:1x8", mesh, TIME, "d") == [("NVLink", 8)]


def test_hosts_cut_unevenly_are_bound_by_the_network() -> None:
    mesh = Mesh.of(d=3, t=4)
    assert brief("h100:2x6", mesh, "t") == [("InfiniBand", 4)]
    assert brief("h100:2x6", mesh, "d") == [("InfiniBand", 3)]


def test_a_torus() -> None:
    mesh = Mesh.of(x=4, y=4)
    assert brief("v5e:4x4", mesh, "x") == [("ICI x", 4)]
    assert brief("v5e:4x4", mesh, "y") == [("ICI y", 4)]
    assert brief("v5e:4x4", mesh, "x", "y") == [("ICI y", 4), ("ICI x", 4)]
    assert brief("v5e:8x16", Mesh.of(d=128), "d") == [("ICI y", 16), ("ICI x", 8)]
    assert brief("v5e:16x8", Mesh.of(d=128), "d") == [("ICI x", 16), ("ICI y", 8)]


def test_part_of_a_torus_dimension_does_not_close_and_shares_wires() -> None:
    mesh = Mesh.of(far=4, near=4, rest=16)
    cluster = parse_cluster("v5e:16x16")
    (whole, _) = cluster.levels[0]
    ((far, _),) = crossing(cluster, mesh, ("far",))
    ((near, _),) = crossing(cluster, mesh, ("near",))
    ((both, size),) = crossing(cluster, mesh, ("far", "near"))
    assert (both, size) == (whole, 16) and whole.wraps
    assert not near.wraps and near.bytes_per_second == whole.bytes_per_second
    assert far.wraps and far.bytes_per_second == whole.bytes_per_second / 4
    assert far.latency_seconds == 4 * whole.latency_seconds


def test_dimensions_of_a_torus_cut_unevenly_do_not_close() -> None:
    cluster = cluster_of(TORUS, True, 6, 6)
    mesh = Mesh.of(a=4, b=9)
    for axes in (("a",), ("b",), ("a", "b")):
        ((link, size),) = crossing(cluster, mesh, axes)
        assert size == mesh.group_size(axes) and not link.wraps


def test_axes_know_their_links() -> None:
    def links(text: str, mesh: Mesh) -> list[str]:
        return [axis.link for axis in linked(parse_cluster(text), mesh).axes]

    mesh = Mesh((Axis(TIME, 2), Axis("d", 2), Axis("t", 8)))
    assert links("h100:2x8", mesh) == ["", NETWORK, NVLINK]
    assert links("v5e:4x4", Mesh.of(d=2, t=8)) == [TORUS, TORUS]
    assert links("v5e:4x4x2slices", Mesh.of(d=2, t=16)) == [NETWORK, TORUS]


# ---- against enumeration -----------------------------------------------------------


def cluster_of(kind: str, wraps: bool, *sizes: int) -> Cluster:
    """Levels of distinct speeds, the outermost the slowest; a torus has one speed."""
    levels = []
    for place, size in enumerate(sizes):
        speed = 8e9 if kind == TORUS else 1e9 * 4**place
        link = Link(f"level {place}", kind, speed, 1e-6, "test", "test", wraps)
        levels.append((link, size))
    return Cluster("test", CATALOGUE["cpu"], tuple(levels))


@st.composite
def meshes(draw: st.DrawFn, count: int) -> Mesh:
    """``count`` devices over up to three axes, in any factorization."""
    sizes = []
    for _ in NAMES[:-1]:
        sizes.append(draw(st.sampled_from([n for n in range(1, 65) if count % n == 0])))
        count //= sizes[-1]
    return Mesh.of(**dict(zip(NAMES, [*sizes, count], strict=True)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Cluster, Mesh, tuple[str, ...]]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    kind, wraps = draw(st.sampled_from([(NETWORK, False), (TORUS, True)]))
    cluster = cluster_of(kind, wraps, *sizes)
    axes = draw(st.sets(st.sampled_from(NAMES)))
    return cluster, draw(meshes(cluster.num_devices)), tuple(sorted(axes))


def coordinates(number: int, sizes: list[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.append(digit)
    return tuple(reversed(found))


def groups(cluster: Cluster, mesh: Mesh, axes: tuple[str, ...]) -> list[list[tuple]]:
    """The groups of a collective, each device as its coordinates in the levels."""
    found: dict[tuple, list[tuple]] = {}
    for number in range(cluster.num_devices):
        at = coordinates(number, [axis.size for axis in mesh.axes])
        key = tuple(
            place for place, name in zip(at, NAMES, strict=True) if name not in axes
        )
        levels = coordinates(number, [size for _, size in cluster.levels])
        found.setdefault(key, []).append(levels)
    return list(found.values())


def spread(group: list[tuple]) -> tuple[int, ...] | None:
    """How many ways a group parts at each level; None if not the same everywhere."""
    found, subgroups = [], 1
    for depth in range(1, len(group[0]) + 1):
        below = Counter(at[:depth] for at in group)
        if len(set(below.values())) > 1:
            return None
        found.append(len(below) // subgroups)
        subgroups = len(below)
    return tuple(found)


def crossed_levels(group: list[tuple]) -> set[int]:
    """The levels at which two of a group's devices first differ."""
    return {
        next(
            place
            for place, pair in enumerate(zip(*two, strict=True))
            if len({*pair}) > 1
        )
        for two in itertools.combinations(group, 2)
    }


def even(cluster: Cluster, mesh: Mesh) -> bool:
    """No axis ends inside a level without dividing it, nor the other way round."""

    def tops(sizes: list[int]) -> list[int]:
        return [math.prod(sizes[place:]) for place in range(len(sizes))]

    axes = tops([axis.size for axis in mesh.axes])
    levels = tops([size for _, size in cluster.levels])
    return all(max(pair) % min(pair) == 0 for pair in itertools.product(axes, levels))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_as_the_devices_are_spread(
    case: tuple[Cluster, Mesh, tuple[str, ...]],
) -> None:
    cluster, mesh, axes = case
    found = crossing(cluster, mesh, axes)
    assert math.prod(size for _, size in found) == mesh.group_size(axes)
    assert all(size > 1 for _, size in found)
    speeds = [link.ring_bytes_per_second for link, _ in found]
    assert speeds == sorted(speeds, reverse=True)
    apart = groups(cluster, mesh, axes)
    names = [link.name for link, _ in cluster.levels]
    if even(cluster, mesh):
        for group in apart:
            ways = spread(group)
            assert ways is not None
            expected = {n: w for n, w in zip(names, ways, strict=True) if w > 1}
            assert {link.name: size for link, size in found} == expected
        return
    for place in set().union(*map(crossed_levels, apart)):
        link, _ = cluster.levels[place]
        assert speeds[-1] <= link.ring_bytes_per_second


@st.composite
def lines(draw: st.DrawFn) -> tuple[Mesh, str, bool]:
    """A mesh over one torus dimension, one of its axes, whether the torus closes."""
    count = draw(st.sampled_from([4, 6, 8, 12, 16]))
    return draw(meshes(count)), draw(st.sampled_from(NAMES)), draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(lines())
def test_wires_of_a_torus_are_shared_as_counted(case: tuple[Mesh, str, bool]) -> None:
    """All groups step to their next device at once: the fullest wire sets the pace."""
    mesh, axis, wraps = case
    cluster = cluster_of(TORUS, wraps, mesh.num_devices)
    found = crossing(cluster, mesh, (axis,))
    if mesh.size(axis) == 1:
        assert found == ()
        return
    ((link, size),) = found
    load: Counter[int] = Counter()
    hops = set()
    for group in groups(cluster, mesh, (axis,)):
        places = [place for (place,) in group]
        for here, there in itertools.pairwise(places):
            load.update(range(here, there))
            hops.add(there - here)
        # Closing costs a group as much as any step where the torus closes for it.
        closes = wraps and mesh.num_devices - places[-1] + places[0] == max(hops)
        assert link.wraps == closes
    (whole, _), *_ = cluster.levels
    assert size == mesh.size(axis)
    assert link.bytes_per_second == whole.bytes_per_second / max(load.values())
    assert hops == {round(link.latency_seconds / whole.latency_seconds)}
