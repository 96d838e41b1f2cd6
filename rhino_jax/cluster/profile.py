"""Profiles: what kernels and collectives of one kind of device were found to take.

A profile is measured on devices, or told by their compiler with no device. It is merged
over the catalogue: a Cluster with a profile has its curves in the device and its fits
in the links, so that a plan stays a function of Program, Cluster and Options. Profiles
are JSON files with a version; those of :data:`SHIPPED` come with Rhino.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from rhino_jax.cluster.hardware import COLUMNS, GPUS, Device
from rhino_jax.cluster.kernels import (
    ARITHMETIC,
    AXES,
    ELEMENTWISE,
    KINDS,
    PRODUCT,
    Curve,
    Kernels,
)
from rhino_jax.cluster.topology import Cluster, Fit, Link
from rhino_jax.errors import ProfileError, nearest, problems
from rhino_jax.ir.mesh import TORUS
from rhino_jax.ir.steps import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
)

FORMAT, VERSION = "rhino-profile", 1
MEASURED, COMPILE_ONLY = "measured", "compile-only"
MADE = (MEASURED, COMPILE_ONLY)
COLLECTIVES = (ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, PERMUTE, REDUCE_SCATTER)
SHIPPED = ("a100-80", "b200", "h100", "h200", "v5e", "v5p", "v6e")
"""Devices whose compile-only profile comes with Rhino."""
REFERENCE = "h100"
"""The card whose measured shares devices without a profile of their own have."""


@dataclass(frozen=True)
class LinkFit:
    """A :class:`Fit` and the kind of link it is of; ``error`` as a curve's."""

    link: str
    fit: Fit
    error: float = 0.0


@dataclass(frozen=True)
class Profile:
    """What one kind of device was found to take, and how.

    ``device`` is the catalogue's name (or ``jax.Device.device_kind`` of one that it
    does not know), ``made`` one of :data:`MADE`, ``machine`` what it was made on,
    ``made_with`` the versions of software.
    """

    device: str
    made: str
    machine: str
    date: str
    made_with: tuple[tuple[str, str], ...]
    launch_seconds: float
    curves: tuple[Curve, ...]
    collectives: tuple[LinkFit, ...] = ()
    figures: tuple[tuple[str, float], ...] = ()
    """Peaks that shares are of, by field of Device, where the catalogue has no true
    ones."""
    traffic: float = 1.0
    """As in :class:`~rhino_jax.cluster.kernels.Kernels`."""

    def __str__(self) -> str:
        return f"{self.made} ({self.machine}, {self.date})"

    @property
    def kernels(self) -> Kernels:
        return Kernels(self.curves, self.launch_seconds, str(self), self.traffic)

    def merged(self, cluster: Cluster) -> Cluster:
        """``cluster`` with what this profile knows in place of the catalogue's.

        Raises:
            ProfileError: it is of other hardware.
        """
        if self.device not in (cluster.device.name, cluster.device.kind):
            raise ProfileError(
                f"the profile is of {self.device}, {cluster.name} has "
                f"{cluster.device.name} ({cluster.device.kind}); make one there: "
                "rhino profile"
            )
        figures: dict[str, Any] = dict(self.figures)
        device = replace(cluster.device, kernels=self.kernels, **figures)
        levels = tuple((self._link(link), size) for link, size in cluster.levels)
        return replace(cluster, device=device, levels=levels)

    def _link(self, link: Link) -> Link:
        fits = tuple(one.fit for one in self.collectives if one.link == link.kind)
        # A torus dimension's price depends on whether it closes; fits do not say.
        return link if link.kind == TORUS or not fits else replace(link, fits=fits)

    # ---- JSON ------------------------------------------------------------------------

    def to_json(self) -> str:
        """As text, a line a curve; the same bytes for the same profile."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self),
            "made_with": dict(self.made_with),
            "figures": dict(self.figures),
            "collectives": [
                {"link": one.link, **asdict(one.fit), "error": one.error}
                for one in self.collectives
            ],
        }
        long = {"curves": body.pop("curves"), "collectives": body.pop("collectives")}
        lines = [
            f" {json.dumps(key)}: {json.dumps(value)}" for key, value in body.items()
        ]
        for key, entries in long.items():
            listed = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
            lines.append(f" {json.dumps(key)}: [\n{listed}\n ]")
        return "{\n" + ",\n".join(lines) + "\n}"

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; :meth:`load` takes it back."""
        Path(path).write_text(self.to_json() + "\n")

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: no such file, no profile, one of another version, or one with
                figures that can not be: all that is wrong at once.
        """
        try:
            text = Path(path).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path}: {error}; next: rhino profile") from error
        return Profile.from_json(text, str(path))

    @staticmethod
    def from_json(text: str, name: str = "profile") -> Profile:
        """The inverse of :meth:`to_json`. Raises :class:`ProfileError`."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ProfileError(f"{name}: not JSON ({error})") from error
        found = list(_faults(data))
        if found:
            title = f"{name} is no profile that can be used:"
            raise ProfileError(problems(title, found, "Make it again: rhino profile."))
        return Profile(
            data["device"],
            data["made"],
            data["machine"],
            data["date"],
            tuple(data["made_with"].items()),
            float(data["launch_seconds"]),
            tuple(_curve(one) for one in data["curves"]),
            tuple(_link_fit(one) for one in data["collectives"]),
            tuple((name, float(at)) for name, at in data["figures"].items()),
            float(data["traffic"]),
        )


def _curve(data: Mapping[str, Any]) -> Curve:
    axes = tuple(tuple(map(float, axis)) for axis in data["axes"])
    shares = tuple(map(float, data["shares"]))
    return Curve(data["kind"], data["dtype"], axes, shares, float(data["error"]))


def _link_fit(data: Mapping[str, Any]) -> LinkFit:
    points = tuple((float(sent), float(took)) for sent, took in data["points"])
    fit = Fit(data["kind"], data["count"], points)
    return LinkFit(data["link"], fit, float(data["error"]))


# ---- what can be wrong ---------------------------------------------------------------

_TEXTS = ("device", "made", "machine", "date")
_REST = ("made_with", "launch_seconds", "curves", "collectives", "figures", "traffic")
PEAKS = (*(f"{name}_flops_per_second" for name in COLUMNS), "memory_bytes_per_second")


def _faults(data: Any) -> Iterator[str]:
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        yield f"no format {FORMAT!r}"
        return
    if data.get("version") != VERSION:
        yield f"version {data.get('version')!r}, this Rhino reads {VERSION}"
    missing = [key for key in (*_TEXTS, *_REST) if key not in data]
    if missing:
        yield f"missing: {', '.join(missing)}"
    for key in _TEXTS:
        if key in data and not isinstance(data[key], str):
            yield f"{key}: {data[key]!r} is no text"
    if isinstance(data.get("made"), str) and data["made"] not in MADE:
        near = nearest(data["made"], MADE) or MADE
        yield f"made: {data['made']!r}; did you mean {near[0]!r}?"
    if not isinstance(data.get("made_with", {}), Mapping):
        yield "made_with is no mapping"
    figures = data.get("figures", {})
    if not isinstance(figures, Mapping):
        yield "figures is no mapping"
        figures = {}
    for name, at in figures.items():
        if name not in PEAKS or not _is_share(at, 1.0, 1e18):
            yield f"figures: {name!r}: {at!r}; peaks above 1: {', '.join(PEAKS)}"
    if "launch_seconds" in data and not _is_share(data["launch_seconds"], 0.0):
        yield f"launch_seconds {data['launch_seconds']!r}: from 0 up to 1"
    if "traffic" in data and not _is_share(data["traffic"], 1e-3):
        yield f"traffic {data['traffic']!r}: above 0 up to 1"
    for key, faults in (("curves", _curve_faults), ("collectives", _fit_faults)):
        entries = data.get(key, [])
        if not isinstance(entries, list):
            yield f"{key} is no list"
            continue
        for place, one in enumerate(entries):
            told = faults(one) if isinstance(one, Mapping) else ["no mapping"]
            yield from (f"{key}[{place}]: {what}" for what in told)
    curves = data.get("curves")
    if isinstance(curves, list) and all(isinstance(one, Mapping) for one in curves):
        kinds = [one.get("kind") for one in curves]
        needed = (PRODUCT, ELEMENTWISE)
        lacking = [kind for kind in needed if kind not in kinds]
        if lacking:
            yield f"no curve of {' and of '.join(lacking)}"


def _curve_faults(one: Mapping[str, Any]) -> Iterator[str]:
    kind, dtype = one.get("kind"), one.get("dtype")
    if kind not in KINDS:
        yield f"kind {kind!r}; known: {', '.join(KINDS)}"
    if dtype not in ("", *COLUMNS) or (dtype and kind not in ARITHMETIC):
        yield f"dtype {dtype!r} of {kind!r}"
    if not _is_share(one.get("error"), 0.0, math.inf):
        yield f"error {one.get('error')!r}"
    axes, shares = one.get("axes"), one.get("shares")
    if not isinstance(axes, list) or not all(map(_ascends, axes)):
        yield f"axes {axes!r}: lists of sizes above 0, ascending"
        return
    if axes and kind in KINDS and len(axes) != AXES.get(str(kind), 1):
        yield f"{len(axes)} axes, a {kind} has {AXES.get(str(kind), 1)}"
    if not isinstance(shares, list) or not all(_is_share(x, 1e-12) for x in shares):
        wrong = [x for x in shares if not _is_share(x, 1e-12)] if shares else shares
        yield f"shares above 0 up to 1, not {wrong!r}"
    elif len(shares) != math.prod(map(len, axes)):
        yield f"{len(shares)} shares on a grid of {math.prod(map(len, axes))}"


def _fit_faults(one: Mapping[str, Any]) -> Iterator[str]:
    if one.get("kind") not in COLLECTIVES:
        yield f"kind {one.get('kind')!r}; known: {', '.join(COLLECTIVES)}"
    if not isinstance(one.get("link"), str):
        yield f"link {one.get('link')!r} is no kind of link"
    count = one.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        yield f"count {count!r}: at least 2 devices"
    points = one.get("points")
    pairs = isinstance(points, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in points
    )
    if not pairs or not points:
        yield f"points {points!r}: pairs of bytes and seconds"
        return
    if not _ascends([sent for sent, _ in points]):
        yield "bytes of points above 0, ascending"
    seconds = [took for _, took in points]
    if not all(_is_share(took, 1e-12, 1e6) for took in seconds):
        yield f"seconds of points above 0: {seconds!r}"
    elif sorted(seconds) != seconds:
        yield "more bytes take less: seconds must not fall"
    if not _is_share(one.get("error"), 0.0, math.inf):
        yield f"error {one.get('error')!r}"


def _is_share(figure: Any, least: float, most: float = 1.0) -> bool:
    number = isinstance(figure, int | float) and not isinstance(figure, bool)
    return number and least <= figure <= most


def _ascends(axis: Any) -> bool:
    return (
        isinstance(axis, list)
        and bool(axis)
        and all(_is_share(at, 1e-12, 1e30) for at in axis)
        and all(a < b for a, b in itertools.pairwise(axis))
    )


# ---- those that come with Rhino ------------------------------------------------------


@functools.cache
def shipped(device: str, made: str) -> Profile | None:
    """The profile that comes with Rhino; None where there is none of this kind.

    >>> shipped("h100", MEASURED).device, shipped("t4", MEASURED)
    ('h100', None)
    """
    name = f"{device}.{made}.json"
    place = resources.files(__package__) / "profiles" / name
    if not place.is_file():
        return None
    return Profile.from_json(place.read_text(), name)


def kernels_of(device: Device) -> Kernels:
    """What is known of a device's kernels: by the profile merged over it, else by the
    one shipped for it (a measured one before a compile-only one), else as measured on
    the reference card."""
    return device.kernels or _shipped_kernels(device.name, device.platform)


@functools.cache
def _shipped_kernels(name: str, platform: str) -> Kernels:
    for made in MADE:
        if found := shipped(name, made):
            return found.kernels
    reference = shipped(REFERENCE, MEASURED)
    assert reference is not None, "it comes with Rhino"
    launch_seconds = reference.launch_seconds if platform in GPUS else 0.0
    source = f"assumed as of {REFERENCE}: {reference}"
    return replace(reference.kernels, launch_seconds=launch_seconds, source=source)
