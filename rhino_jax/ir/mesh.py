"""Axes and meshes: the grid of devices a plan speaks of.

A :class:`Mesh` is a small ordered value that knows nothing of JAX or of real
devices. Device ``n`` sits at the row-major coordinates of ``n`` in the mesh, so
the first axis varies slowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

TIME = "time"
STAGE = "stage"
"""The leading axis of a mesh that holds those of all pipeline workers."""
TORUS = "torus"
"""The link of axes that lie on a TPU's torus."""


@dataclass(frozen=True)
class Axis:
    """One mesh axis: its name, how many devices it spans, the link it crosses.

    The time axis (:data:`TIME`) is an axis too: microbatches are a split over time,
    and its reduction is an accumulation that crosses no link.
    """

    name: str
    size: int
    link: str = ""

    def __post_init__(self) -> None:
        assert self.size >= 1, f"axis {self.name!r} has size {self.size}"
        assert self.name.isidentifier(), f"axis name {self.name!r} is no identifier"


@dataclass(frozen=True)
class Mesh:
    """An ordered tuple of axes.

    >>> mesh = Mesh.of(d=2, t=4)
    >>> mesh.size("t"), mesh.num_devices, str(mesh)
    (4, 8, 'd=2, t=4')
    """

    axes: tuple[Axis, ...]

    def __hash__(self) -> int:
        # Meshes are part of many keys: the hash is taken once.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.axes)

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {axis.name: axis.size for axis in self.axes}

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        assert len(set(names)) == len(names), f"axis names repeat: {names}"

    @staticmethod
    def of(**sizes: int) -> Mesh:
        """A mesh from keyword arguments, in their order."""
        return Mesh(tuple(Axis(name, size) for name, size in sizes.items()))

    def linked(self, link: str) -> Mesh:
        """This mesh with every axis on one kind of link."""
        return Mesh(tuple(Axis(axis.name, axis.size, link) for axis in self.axes))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def shape(self) -> Mapping[str, int]:
        return {axis.name: axis.size for axis in self.axes}

    @property
    def num_devices(self) -> int:
        """Devices on the spatial axes; time needs none."""
        return math.prod(axis.size for axis in self.axes if axis.name != TIME)

    def size(self, name: str) -> int:
        if name not in self._sizes:
            raise KeyError(f"no axis {name!r} in mesh ({self})")
        return self._sizes[name]

    def group_size(self, names: tuple[str, ...]) -> int:
        """Devices in one group of a collective over ``names``."""
        return math.prod(self.size(name) for name in names)

    def in_order(self, names: Iterator[str] | tuple[str, ...]) -> tuple[str, ...]:
        """``names`` without repeats, in the order of the mesh."""
        wanted = set(names)
        return tuple(name for name in self.names if name in wanted)

    def __str__(self) -> str:
        return ", ".join(f"{axis.name}={axis.size}" for axis in self.axes)
