"""One plan for all processes of a run: the first plans, the others load what it found.

Every process traces the step itself, for a Program holds equations that can not be
sent. What must be equal before a plan may be shared is compared first.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from rhino_jax import compat
from rhino_jax.api.cache import asked, sources
from rhino_jax.api.planned import Planned
from rhino_jax.api.planning import bind, plan_traced
from rhino_jax.api.where import cluster_of
from rhino_jax.cluster.topology import part
from rhino_jax.options import Options
from rhino_jax.plan import Plan
from rhino_jax.runtime.publish import Facts, Group, agreed, group_of
from rhino_jax.trace import Traced

PACKAGES = ("rhino-jax", "jax", "jaxlib")
"""Packages that decide which program a step and its plan become."""
_MEND = "Start all of them from the same sources, packages and options."


def plan_for_all(
    name: str, traced: Traced, options: Options, given: Plan | None
) -> Planned:
    """The plan of a traced step: ``given`` bound, or planned; one for all processes.

    On one process it is planned here. On several every process must call this, and all
    get the plan of the first.

    Raises:
        ProcessError: a process has another program, package or option, or did not come.
    """
    group = group_here(options)
    if group is None:
        return _planned(traced, options, given)
    here: list[Planned] = []

    def lead() -> str:
        here.append(_planned(traced, options, given))
        return here[0].plan.to_json()

    answer = agreed(
        group, f"planning {name}", facts_of(traced, options, given), lead, _MEND
    )
    if here:
        return here[0]
    planned = bind(Plan.from_json(answer, "the published plan"), traced, options)
    searched = given is None and not options.recipe
    share = part(cluster_of(options), planned.plan.num_workers) if searched else None
    return replace(planned, cluster=share)


def group_here(options: Options) -> Group | None:
    """The processes that a step with these options runs on; None for this one alone."""
    if compat.key_values() is None:
        return None
    mesh = options.mesh
    own = isinstance(mesh, jax.sharding.Mesh)
    return group_of(list(mesh.devices.flat) if own else jax.devices())


def _planned(traced: Traced, options: Options, given: Plan | None) -> Planned:
    if given is not None:
        return bind(given, traced, options)
    return plan_traced(traced, options)


def facts_of(traced: Traced, options: Options, given: Plan | None) -> Facts:
    """What must be equal in all processes that share a plan."""
    program = traced.program
    mesh = options.mesh
    order = mesh.devices.flat if isinstance(mesh, jax.sharding.Mesh) else jax.devices()
    return {
        "package": {name: _version(name) for name in PACKAGES},
        "package sources": {"rhino-jax": sources((".",))[:12]},
        "option": asked(options),
        "step": program.name,
        "input": {
            path: f"{aval.dtype}{list(aval.shape)}"
            for path, aval in zip(traced.input_paths, traced.avals, strict=True)
        },
        "number of ops": len(program.ops),
        "program": program.digest[:12],
        "donated and state": _digest((traced.donated, traced.state_pairs)),
        "arrays that the step closes over": _digest(map(_content, traced.constants)),
        "saved plan": given and _digest([given.to_json()]),
        "device order": _digest([device.id for device in order]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _content(x: Any) -> bytes:
    """A hash of an array's values; one that lies on all processes is one for all."""
    if not getattr(x, "is_fully_addressable", True):
        return b""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).digest()


def _digest(parts: Any) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:12]
