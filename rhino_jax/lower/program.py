"""The lowered step: one jitted ``shard_map`` over flat leaves.

Inputs and outputs lie on the mesh as ordinary ``NamedSharding``s, so that arrays of
different plans, and of the user's own jits, mix. What lies strided inside the step is
moved there by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.layout import Dim, Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.lower.manual import run


def partition_spec(layout: Layout) -> PartitionSpec:
    """A contiguous, settled layout as JAX writes it.

    >>> partition_spec(Layout.of((("d", 4), ("t", 2)), ()))
    PartitionSpec(('d', 't'),)
    """
    assert not layout.partial, f"a partial value has no sharding: {layout}"
    entries: list[Any] = [_entry(dim) for dim in layout.dims]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _entry(dim: Dim) -> str | tuple[str, ...] | None:
    names = tuple(split.axis for split in dim)
    return None if not names else names[0] if len(names) == 1 else names


def as_function(
    program: Program, assignment: Assignment, mesh: Mesh, jax_mesh: Any
) -> Callable[..., tuple[jax.Array, ...]]:
    """The step on global flat arrays: one manual program over every axis."""

    def local_step(*args: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(run(program, assignment, mesh, args))

    if not mesh.axes:
        return local_step
    return jax.shard_map(
        local_step,
        mesh=jax_mesh,
        in_specs=tuple(partition_spec(x) for x in assignment.inputs),
        out_specs=tuple(partition_spec(y) for y in assignment.outputs),
        check_vma=False,
    )


def jit_step(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    jax_mesh: Any,
    donated: Sequence[int] = (),
) -> Any:
    """:func:`as_function`, jitted with its shardings and donated arguments."""
    function = as_function(program, assignment, mesh, jax_mesh)

    def shardings(layouts: Sequence[Layout]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(jax_mesh, partition_spec(x)) for x in layouts)

    function.__name__ = program.name
    return jax.jit(
        function,
        in_shardings=shardings(assignment.inputs),
        out_shardings=shardings(assignment.outputs),
        donate_argnums=tuple(donated),
    )
