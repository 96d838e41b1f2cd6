"""What a ``shard_map`` of the user's says: mesh and specs, and what it may not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rhino_jax import compat
from rhino_jax.ir.program import Plain, Program
from rhino_jax.ir.steps import COLLECTIVES
from rhino_jax.rules.manual import (
    AXES,
    IN_SPECS,
    MANUAL_AXES,
    OUT_SPECS,
    REFUSED,
    SHARD_MAP,
    SILENT,
)


def manual_params(eqn: Any, local: Program, consts: int) -> dict[str, Plain]:
    """The plain parameters of a ``shard_map`` whose body is ``local``.

    ``consts`` of its last inputs are the same on every device: what the body closes
    over. What keeps it from being part of one manual program is among them.
    """
    ins = tuple(compat.partitions(spec) for spec in eqn.params["in_specs"])
    return {
        AXES: tuple(eqn.params["mesh"].shape.items()),
        MANUAL_AXES: tuple(sorted(eqn.params["newly_manual_axes"])),
        IN_SPECS: (*ins, *((),) * consts),
        OUT_SPECS: tuple(compat.partitions(spec) for spec in eqn.params["out_specs"]),
        REFUSED: tuple(dict.fromkeys((*_specs_unknown(eqn), *_ops_unknown(local)))),
    }


def _specs_unknown(eqn: Any) -> Iterator[str]:
    for spec in (*eqn.params["in_specs"], *eqn.params["out_specs"]):
        if spec.unreduced or spec.reduced:
            yield f"{spec} names axes that are not reduced yet: reduce them inside"


def _ops_unknown(local: Program) -> Iterator[str]:
    known = {*COLLECTIVES, *SILENT}
    for _, op in local.walk():
        if op.kind == SHARD_MAP:
            yield f"{op.where}: a shard_map inside a shard_map: name all axes outside"
        elif not op.programs and _COLLECTIVE in op.effects and op.kind not in known:
            yield f"{op.where}: {op.kind} sends what can not be counted"


_COLLECTIVE = "NamedAxisEffect"
"""JAX's effect of an op that names a mesh axis."""
