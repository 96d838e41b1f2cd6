"""Plans kept on disk, by the content of everything that a plan depends on.

The key holds the Program's digest, its paths and its state, the cluster's figures, the
options and the sources of the rooms that plan: another Rhino never reads this one's
plans. Files are whole plans with their checksums, written once and renamed into place;
what is damaged is planned again. Folders may be shared between users and machines.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from rhino_jax.api.attending import constants_of
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import OptionsError, PlanFileError
from rhino_jax.options import WRITTEN, Options
from rhino_jax.plan import Plan
from rhino_jax.trace import Traced

DEFAULT_FOLDER = Path("~/.cache/rhino_jax/plans")
PACKAGE = Path(__file__).parents[1]
PLANNING = ("ir", "rules", "cluster", "cost", "search", "schedule", "plan.py")
"""Rooms whose sources decide what a plan is."""


def folder_of(options: Options) -> Path | None:
    """Where plans are kept; None where none are."""
    if options.cache_dir == "":
        return None
    return Path(options.cache_dir or DEFAULT_FOLDER).expanduser()


def key_of(traced: Traced, cluster: Cluster, options: Options) -> str:
    """A hash of all that the plan depends on."""
    parts = (
        traced.program.digest,
        masks(traced) if options.attention != WRITTEN else "",
        traced.input_paths,
        traced.state_pairs,
        traced.donated,
        cluster,
        asked(options),
        sources(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def masks(traced: Traced) -> str:
    """A hash of constants of the trace that decide whether attention is recognized."""
    hasher = hashlib.sha256()
    for array in constants_of(traced).values():
        hasher.update(np.asarray(array).tobytes())
    return hasher.hexdigest()


def asked(options: Options) -> dict[str, str]:
    """The options that a plan depends on, in words; equal words are equal options.

    >>> asked(Options(mesh={"data": 8}))["mesh"]
    "(('data', 8),)"
    """
    said = {
        name: repr(getattr(options, name))
        for name in options.__dataclass_fields__
        if name not in ("cache_dir", "mesh", "pins", "rules", "static_argnums")
    }
    mesh = getattr(options.mesh, "shape", options.mesh)
    pins = sorted((str(key), str(spec)) for key, spec in options.pins.items())
    return {**said, "mesh": repr(tuple(dict(mesh or {}).items())), "pins": repr(pins)}


@cache
def sources(rooms: tuple[str, ...] = PLANNING) -> str:
    """A hash of the sources and profiles in ``rooms``: those that plan, or others."""
    hasher = hashlib.sha256()
    for room in rooms:
        place = PACKAGE / room
        inside = (*place.rglob("*.py"), *place.rglob("*.json"))
        for file in sorted(inside) if place.is_dir() else [place]:
            hasher.update(file.relative_to(PACKAGE).as_posix().encode())
            hasher.update(file.read_bytes())
    return hasher.hexdigest()


def read_plan(folder: Path, key: str) -> Plan | None:
    """The plan under ``key``; None where there is none, or a damaged one."""
    try:
        return Plan.load(_place(folder, key))
    except PlanFileError:
        return None


def write_plan(folder: Path, key: str, plan: Plan) -> None:
    """Keep ``plan``.

    Raises:
        OptionsError: ``folder`` is no place to write to.
    """
    write_whole(folder, _place(folder, key), plan.to_json())


def write_whole(folder: Path, place: Path, text: str) -> None:
    """A file in ``folder``; of several writers each renames one of its own.

    Raises:
        OptionsError: ``folder`` is no place to write to.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, suffix=".part")
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        Path(name).replace(place)
    except OSError as error:
        raise OptionsError(
            f"cache_dir: {folder} can not be written ({error}); name another "
            'cache_dir, or cache_dir="" to keep no plans'
        ) from error


def _place(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.json"
