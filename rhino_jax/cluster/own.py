"""One's own cluster, from a YAML file.

A file names a device of the catalogue and the links between devices, level by level,
the outermost first; figures written beside a device's name replace the catalogue's::

    device: h100
    memory_bytes: 80.0e+9
    levels:
      - {size: 4, kind: network, gigabytes_per_second: 25, latency_microseconds: 5}
      - {size: 8, kind: nvlink, gigabytes_per_second: 450, latency_microseconds: 2}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rhino_jax.cluster.hardware import CATALOGUE, GIGA, Device
from rhino_jax.cluster.topology import (
    CHIP,
    MEMORY,
    NETWORK,
    NVLINK,
    PCIE,
    Cluster,
    Link,
)
from rhino_jax.errors import ClusterError, nearest, problems
from rhino_jax.ir.mesh import TORUS

SUFFIXES = (".yaml", ".yml")
KINDS = (NVLINK, PCIE, NETWORK, TORUS, CHIP, MEMORY)
SPEED, LATENCY = "gigabytes_per_second", "latency_microseconds"
_FIGURES = tuple(f.name for f in fields(Device) if f.type in ("float", "int"))
_OF_FILE = ("device", "levels", *_FIGURES)
_OF_LEVEL = {"size", "kind", SPEED, LATENCY, "name", "wraps"}
_LINE = "{size: 4, kind: network, gigabytes_per_second: 25, latency_microseconds: 5}"
EXAMPLE = f"device: h100\nlevels:\n  - {_LINE}\n" + (
    "  - {size: 8, kind: nvlink, gigabytes_per_second: 450, latency_microseconds: 2}"
)


def read_cluster(path: str | Path) -> Cluster:
    """The cluster that a YAML file describes; its name is the path.

    Raises:
        ClusterError: no such file, no YAML, or a description that lacks something:
            everything that is wrong, and an example.
    """
    import yaml

    place = Path(path).expanduser()
    try:
        data = yaml.safe_load(place.read_text())
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(f"{path} is no YAML: {error}") from error
    found = list(_faults(data))
    if found:
        title = f"{path} describes no cluster:"
        raise ClusterError(problems(title, found, f"An example:\n{EXAMPLE}"))
    source = f"{place.name}, by its author"
    return Cluster(
        str(path),
        _device(data, source),
        tuple((_link(level, source), level["size"]) for level in data["levels"]),
    )


def _faults(data: Any) -> Iterator[str]:
    if not isinstance(data, Mapping):
        yield "it must be a mapping with 'device' and 'levels'"
        return
    yield from _unknown("", data, _OF_FILE)
    name = data.get("device")
    if name not in CATALOGUE:
        near = nearest(str(name), CATALOGUE) or CATALOGUE
        what = f"no device is named {name!r}" if name else "'device' is missing"
        yield f"{what}: {', '.join(near)}"
    for figure in _FIGURES:
        if figure in data and not _positive(data[figure]):
            yield f"{figure}: {data[figure]!r} is no figure above 0"
    levels = data.get("levels")
    if not isinstance(levels, list) or not levels:
        yield "'levels' is missing: the links between devices, the outermost first"
        return
    for place, level in enumerate(levels):
        yield from _level_faults(f"level {place + 1} of {len(levels)}", level)


def _level_faults(where: str, level: Any) -> Iterator[str]:
    if not isinstance(level, Mapping):
        yield f"{where} is no mapping: {level!r}"
        return
    yield from _unknown(f"{where}: ", level, _OF_LEVEL)
    size = level.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        yield f"{where}: size {size!r} is no whole number of at least 1"
    missing = [key for key in ("kind", SPEED, LATENCY) if key not in level]
    if missing:
        where_from = f"{where} (of size {size})"
        yield f"{where_from} lacks a link: {', '.join(missing)}; such as {_LINE}"
    if "kind" in level and level["kind"] not in KINDS:
        near = nearest(str(level["kind"]), KINDS) or KINDS
        yield f"{where}: kind {level['kind']!r}; did you mean {', '.join(near)}?"
    for key in (SPEED, LATENCY):
        if key in level and not _positive(level[key]):
            yield f"{where}: {key} {level[key]!r} is no figure above 0"
    if level.get("wraps") and level.get("kind") != TORUS:
        yield f"{where}: only a torus wraps"


def _unknown(where: str, given: Mapping[Any, Any], known: Any) -> Iterator[str]:
    for key in given:
        if key not in known:
            near = nearest(str(key), known) or known
            yield f"{where}{key!r} is unknown; did you mean {', '.join(near)}?"


def _positive(figure: Any) -> bool:
    number = isinstance(figure, int | float) and not isinstance(figure, bool)
    return number and 0 < figure < float("inf")


def _device(data: Mapping[str, Any], source: str) -> Device:
    device = CATALOGUE[data["device"]]
    given = {figure: data[figure] for figure in _FIGURES if figure in data}
    if "memory_bytes" in given:
        given["memory_bytes"] = int(given["memory_bytes"])
    if not given:
        return device
    groups = {"flops_per_second" if "flops" in name else name for name in given}
    sources = tuple(
        (figure, source if figure in groups else old) for figure, old in device.sources
    )
    return replace(device, **given, sources=sources)


def _link(level: Mapping[str, Any], source: str) -> Link:
    return Link(
        str(level.get("name", level["kind"])),
        level["kind"],
        level[SPEED] * GIGA,
        level[LATENCY] * 1e-6,
        source,
        source,
        bool(level.get("wraps", False)),
    )
