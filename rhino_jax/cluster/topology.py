"""How devices are linked, and which links a group of mesh axes crosses.

The devices of a cluster are numbered row-major over its levels, the outermost (between
slices or hosts) first: device ``n`` of "h100:2x8" is GPU ``n % 8`` of host ``n // 8``,
device ``n`` of "v5e:4x8" the chip at torus coordinates ``(n // 8, n % 8)``. A mesh is
laid over them row-major too, so its last axis runs over neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from rhino_jax.cluster.hardware import TPU, Device
from rhino_jax.errors import MeshError
from rhino_jax.ir.mesh import TIME, TORUS, Axis, Mesh

MEMORY, CHIP, NVLINK, PCIE, NETWORK = "memory", "chip", "nvlink", "pcie", "network"
"""Kinds of link, with :data:`rhino_jax.ir.mesh.TORUS`."""


@dataclass(frozen=True)
class Fit:
    """What one kind of collective takes among ``count`` devices over one link.

    A line through what was measured or told: ``latency_seconds`` and bytes sent.
    """

    kind: str
    count: int
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Link:
    """One level of a cluster's links, as one device sees it.

    On a torus these are the wires along one dimension; with any other kind each device
    has a port of its own into a switch, and groups do not disturb one another.
    """

    name: str
    kind: str
    bytes_per_second: float
    """What one device can send in one direction, before protocol overhead."""
    latency_seconds: float
    """From one device to the next, per step of a collective."""
    bandwidth_source: str
    latency_source: str
    wraps: bool = False
    """The last device of a torus dimension is wired to the first."""
    tree_latency_seconds: float = 0.0
    """Per step of a tree; 0.0 where the library knows no trees."""
    fits: tuple[Fit, ...] = ()
    """What a profile says of collectives over this link, by kind and count."""

    def __post_init__(self) -> None:
        assert self.bytes_per_second > 0 and self.latency_seconds > 0, self
        assert not self.wraps or self.kind == TORUS, f"{self.name}: only a torus wraps"

    @property
    def ring_bytes_per_second(self) -> float:
        """What one device can send in a ring collective.

        A torus dimension that closes is two rings, one each way; one that does not is
        a line, whose ends have one wire.
        """
        return self.bytes_per_second * (2 if self.wraps else 1)

    def fitted(self, kind: str, wire_bytes: float, count: int) -> float | None:
        """Seconds by the profile; None where it says nothing of ``kind``.

        Between counts that it knows, on a straight line over the logarithm of the
        count; beyond them, as the nearest.
        """
        known = sorted(
            (fit.count, fit.latency_seconds + wire_bytes / fit.bytes_per_second)
            for fit in self.fits
            if fit.kind == kind
        )
        if not known:
            return None
        places = [math.log2(at) for at, _ in known]
        return float(np.interp(math.log2(count), places, [s for _, s in known]))


@dataclass(frozen=True)
class Cluster:
    """Equal devices and their links, level by level.

    >>> from rhino_jax.cluster.parse import parse_cluster
    >>> cluster = parse_cluster("h100:2x8")
    >>> [(link.name, size) for link, size in cluster.levels]
    [('InfiniBand', 2), ('NVLink', 8)]
    >>> cluster.num_devices, cluster.grid, parse_cluster("v5e:4x8").grid
    (16, (16,), (4, 8))
    """

    name: str
    device: Device
    levels: tuple[tuple[Link, int], ...]
    """(link, size), outermost first; sizes of 1 stay, to keep the shape as written."""

    def __hash__(self) -> int:
        # Look-ups by cluster are many; the rest follows from the name but for profiles.
        return hash(self.name)

    def __post_init__(self) -> None:
        assert self.levels, f"{self.name} has no levels"
        assert all(size >= 1 for _, size in self.levels), f"{self.name}: {self.levels}"

    @property
    def num_devices(self) -> int:
        return math.prod(size for _, size in self.levels)

    @property
    def grid(self) -> tuple[int, ...]:
        """How the devices lie for a mesh by default.

        A TPU's dimensions above 1 (cores of a chip belong to the last, slices of a
        multi-slice to the first); all in a row elsewhere.
        """
        if self.device.platform != TPU:
            return (self.num_devices,)
        torus = [
            place for place, (link, _) in enumerate(self.levels) if _is_torus(link)
        ]
        sizes = [size for _, size in self.levels]
        outside, inside = (
            math.prod(sizes[: torus[0]]),
            math.prod(sizes[torus[-1] + 1 :]),
        )
        sides = [sizes[place] for place in torus]
        sides[0], sides[-1] = sides[0] * outside, sides[-1] * inside
        return tuple(side for side in sides if side > 1) or (1,)


def part(cluster: Cluster, parts: int) -> Cluster:
    """One of ``parts`` equal shares of a cluster: runs of neighbouring devices.

    Raises:
        MeshError: the devices, or a level of links, can not be divided so.

    >>> from rhino_jax.cluster.parse import parse_cluster
    >>> [size for _, size in part(parse_cluster("h100:2x8"), 4).levels]
    [1, 4]
    """
    levels, rest = [], parts
    for link, size in cluster.levels:
        shared = math.gcd(size, rest)
        if rest > 1 and shared not in (size, rest):
            break
        cut = shared > 1 and link.wraps
        levels.append((replace(link, wraps=False) if cut else link, size // shared))
        rest //= shared
    if rest > 1:
        sizes = " x ".join(str(size) for _, size in cluster.levels)
        raise MeshError(
            f"{cluster.name} ({sizes} = {cluster.num_devices} devices) can not be "
            f"divided among {parts} pipeline stages that run side by side; ask for a "
            "number that divides the hosts, or their devices"
        )
    if parts == 1:
        return cluster
    return replace(cluster, name=f"1/{parts} of {cluster.name}", levels=tuple(levels))


def between_parts(cluster: Cluster) -> Link:
    """The slowest link that neighbouring shares of :func:`part` talk over."""
    whole = [link for link, size in cluster.levels if size > 1]
    return (whole or [cluster.levels[0][0]])[0]


Crossing = tuple[tuple[Link, int], ...]
"""The links that a group of devices crosses, and how many devices (or subgroups on the
faster links) it joins over each."""


@lru_cache(maxsize=65_536)
def crossing(cluster: Cluster, mesh: Mesh, axes: tuple[str, ...]) -> Crossing:
    """Which links a collective over ``axes`` crosses, the fastest first.

    The sizes multiply to the group's size. A link of a torus is narrowed to what the
    group gets of it: it closes only around the whole dimension, and groups of every
    ``s``-th device share each wire with ``s - 1`` others and hop ``s`` wires a step.
    A level that the mesh cuts unevenly (hosts of 6 GPUs, an axis of 4) is one with the
    level outside it, on the slower link of the two. The time axis crosses nothing.

    >>> from rhino_jax.cluster.parse import parse_cluster
    >>> cluster, mesh = parse_cluster("h100:2x8"), Mesh.of(data=4, tensor=4)
    >>> [(link.name, size) for link, size in crossing(cluster, mesh, ("data",))]
    [('NVLink', 2), ('InfiniBand', 2)]
    >>> [(link.name, size) for link, size in crossing(cluster, mesh, ("tensor",))]
    [('NVLink', 4)]
    """
    assert mesh.num_devices == cluster.num_devices, f"({mesh}) on {cluster.name}"
    assert set(axes) <= set(mesh.names), f"{axes} of ({mesh})"
    found = []
    for link, digits in _digits(cluster, mesh):
        size = math.prod(count for name, count in digits if name in axes)
        if size > 1:
            found.append((_narrowed(link, digits, axes), size))
    return tuple(sorted(found, key=lambda entry: -entry[0].ring_bytes_per_second))


def slowest(crossed: Crossing) -> Link | None:
    """The link that a crossing is bound by; None where it crosses none."""
    return crossed[-1][0] if crossed else None


def linked(cluster: Cluster, mesh: Mesh) -> Mesh:
    """``mesh`` with each axis naming the kind of the slowest link that it crosses.

    >>> from rhino_jax.cluster.parse import parse_cluster
    >>> mesh = linked(parse_cluster("h100:2x8"), Mesh.of(data=2, tensor=8))
    >>> [axis.link for axis in mesh.axes]
    ['network', 'nvlink']
    """

    def kind(axis: Axis) -> str:
        link = slowest(crossing(cluster, mesh, (axis.name,)))
        return link.kind if link else ""

    return Mesh(tuple(Axis(axis.name, axis.size, kind(axis)) for axis in mesh.axes))


def _is_torus(link: Link) -> bool:
    return link.kind == TORUS


_Digit = tuple[str, int]
"""Part of a device's number: the mesh axis it belongs to, how many values it takes."""


def _digits(cluster: Cluster, mesh: Mesh) -> list[tuple[Link, list[_Digit]]]:
    """Levels and, in each, the digits that mesh axes have in it; innermost first."""
    axis_tops = {}  # the number of devices up to the top of an axis -> its name
    top = 1
    for axis in reversed(mesh.axes):
        if axis.name != TIME and axis.size > 1:
            top *= axis.size
            axis_tops[top] = axis.name
    found = []
    bottom = 1
    for link, level_top in _merged(cluster, tuple(axis_tops)):
        digits = []
        for top, name in axis_tops.items():
            if top > bottom and bottom < level_top:
                digits.append((name, min(top, level_top) // bottom))
                bottom = min(top, level_top)
        found.append((link, digits))
    return found


def _merged(cluster: Cluster, axis_tops: tuple[int, ...]) -> list[tuple[Link, int]]:
    """(link, devices up to its top) innermost first, uneven cuts merged outwards."""
    found = []
    top = 1
    held: Link | None = None  # of levels whose top no digit can end at
    for link, size in reversed(cluster.levels):
        if size == 1:
            continue
        top *= size
        if held is not None:
            link = replace(min(link, held, key=_ring_speed), wraps=False)
        even = all(top % other == 0 or other % top == 0 for other in axis_tops)
        if even:
            found.append((link, top))
        held = None if even else link
    assert held is None, "the outermost level ends where the mesh does"
    return found


def _ring_speed(link: Link) -> float:
    return link.ring_bytes_per_second


def _narrowed(link: Link, digits: list[_Digit], axes: tuple[str, ...]) -> Link:
    """What a group over ``axes`` has of a link; only wires of a torus are shared."""
    if not _is_torus(link):
        return link
    last = max(place for place, (name, _) in enumerate(digits) if name in axes)
    apart = math.prod(count for name, count in digits[:last] if name not in axes)
    return replace(
        link,
        bytes_per_second=link.bytes_per_second / apart,
        latency_seconds=link.latency_seconds * apart,
        fits=link.fits if apart == 1 else (),
        wraps=link.wraps and last == len(digits) - 1,
    )
