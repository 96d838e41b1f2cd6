"""Layouts that the user fixes: tree paths and names to PartitionSpecs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rhino_jax.errors import PinError, nearest, problems
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.search.recipes import Placement
from rhino_jax.search.specs import Spec, spec_layout, spec_problems
from rhino_jax.search.subject import Subject

NEXT_STEP = "Fix or drop these pins."


def matches(pattern: str, path: str) -> bool:
    """Whether a pin's key means ``path``: whole, its end, or as a glob.

    >>> matches("mlp/kernel", "state/params/mlp/kernel"), matches("*/w?", "p/w1")
    (True, True)
    """
    return (
        path == pattern
        or path.endswith("/" + pattern)
        or fnmatch.fnmatchcase(path, pattern)
    )


def position_of(path: str, paths: Sequence[str]) -> int:
    """The one input that ``path`` means.

    Raises:
        PinError: it means none (nearest names) or several.
    """
    hits = [i for i, known in enumerate(paths) if matches(path, known)]
    if len(hits) == 1 or path in paths:
        return paths.index(path) if path in paths else hits[0]
    if hits:
        named = ", ".join(paths[i] for i in hits[:5])
        raise PinError(f"{path!r} means {len(hits)} inputs ({named}); name one")
    raise PinError(_unknown(path, paths))


def names_in(program: Program) -> frozenset[str]:
    """Every ``rhino.name`` given inside a Program."""
    return frozenset(op.param["name"] for _, op in program.walk() if op.kind == "name")


@dataclass(frozen=True)
class Pinned:
    """Pins found to fit: layouts of inputs by position, specs of named values.

    ``asked`` are the inputs that a pin means itself; the others follow one (a
    parameter's pin holds for its optimizer state too, unless that is pinned itself).
    """

    inputs: Mapping[int, Layout]
    named: Mapping[str, Spec]
    asked: frozenset[int] = frozenset()


def checked_pins(subject: Subject, mesh: Mesh, pins: Mapping[str, Spec]) -> Pinned:
    """What ``pins`` mean for ``subject``.

    Raises:
        PinError: unknown paths (nearest names), specs that do not divide; all at once.
    """
    paths = {path: i for i, path in enumerate(subject.input_paths)}
    names = names_in(subject.program) if pins else frozenset()
    found: list[str] = []
    direct: dict[int, Layout] = {}
    inner: dict[str, Spec] = {}
    for key, spec in pins.items():
        hits = [i for path, i in paths.items() if matches(key, path)]
        for i in hits:
            wrong = spec_problems(spec, subject.shape(i), mesh)
            found += [f"pin {subject.input_paths[i]!r}: {what}" for what in wrong]
            if not wrong:
                direct[i] = spec_layout(spec, subject.shape(i), mesh)
        if key in names:
            inner[key] = spec
            found += _named_problems(subject.program, key, spec, mesh)
        elif not hits:
            found.append(_unknown(key, (*paths, *names)))
    if found:
        raise PinError(problems("pins that do not fit:", found, NEXT_STEP))
    layouts = {i: direct[k] for i in subject.pairs if (k := subject.kin[i]) in direct}
    return Pinned({**layouts, **direct}, inner, frozenset(direct))


def pinned(
    placement: Placement, subject: Subject, mesh: Mesh, pins: Mapping[str, Spec]
) -> tuple[Placement, Mapping[str, Spec]]:
    """``placement`` with pins in place, and the pins of named interior values.

    Raises:
        PinError: unknown paths (nearest names), specs that do not divide; all at once.
    """
    found = checked_pins(subject, mesh, pins)
    layouts = list(placement.inputs)
    keep = dict(placement.keep)
    for i, layout in found.inputs.items():
        layouts[i] = layout
        if i in subject.pairs:
            direct = i in found.asked
            data = set(placement.data_axes) if direct else set()
            keep[i] = frozenset(layout.axes) - data
    used = {
        i: x for i, x in placement.used.items() if layouts[i] == placement.inputs[i]
    }
    return replace(placement, inputs=tuple(layouts), keep=keep, used=used), found.named


def _unknown(key: str, known: Iterable[str]) -> str:
    known = list(known)
    near = nearest(key, known)
    if not near:
        near = [p for p in known if p.rsplit("/", 1)[-1] == key.rsplit("/", 1)[-1]][:3]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"pin {key!r}: no such path or name{hint}"


def _named_problems(program: Program, name: str, spec: Spec, mesh: Mesh) -> list[str]:
    found = []
    for inner, op in program.walk():
        if op.kind == "name" and op.param["name"] == name:
            shape = inner.values[op.results[0]].shape
            found += [
                f"pin {name!r} ({op.where}): {what}"
                for what in spec_problems(spec, shape, mesh)
            ]
    return found
