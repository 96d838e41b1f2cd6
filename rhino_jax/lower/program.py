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

from rhino_jax import compat
from rhino_jax.errors import OptionsError
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.layout import Dim, Layout
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.program import Program
from rhino_jax.lower import accumulate, manual
from rhino_jax.lower.auto import replay


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


class SignatureChanged(Exception):
    """The arrays given are not of the shapes that the Program was traced for."""


def as_function(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    jax_mesh: Any,
    lowering: str = "manual",
) -> Callable[..., tuple[jax.Array, ...]]:
    """The step on global flat arrays: one manual program over every axis.

    With ``lowering="auto"`` a replay under constraints. Traced with other shapes or
    dtypes than the Program's it raises :class:`SignatureChanged`.
    """

    run = accumulate.run if assignment.loop else manual.run
    if assignment.loop and lowering == "auto":
        raise OptionsError(
            "microbatches are run by the manual lowering; drop lowering='auto', or "
            "plan without microbatches"
        )

    wide = assignment.over(mesh)

    def local_step(*args: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(run(program, assignment, wide, args))

    if lowering == "auto":

        def inner(*args: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(replay(program, assignment, mesh, jax_mesh, args))

    elif on_devices(mesh):
        inner = jax.shard_map(
            local_step,
            mesh=jax_mesh,
            in_specs=tuple(partition_spec(x) for x in assignment.inputs),
            out_specs=tuple(partition_spec(y) for y in assignment.outputs),
            check_vma=False,
        )
    else:
        inner = local_step

    def step(*args: jax.Array) -> tuple[jax.Array, ...]:
        for value, x in zip(program.inputs, args, strict=True):
            planned = program.values[value]
            if planned.shape != x.shape or planned.dtype != str(x.dtype):
                raise SignatureChanged
        with compat.under_mesh(jax_mesh):
            return inner(*args)

    step.__name__ = program.name
    return step


def on_devices(mesh: Mesh) -> bool:
    """Whether there is an axis of devices: the time axis is none."""
    return any(axis.name != TIME for axis in mesh.axes)


def jit_step(
    program: Program,
    assignment: Assignment,
    mesh: Mesh,
    jax_mesh: Any,
    donated: Sequence[int] = (),
    lowering: str = "manual",
) -> Any:
    """:func:`as_function`, jitted with its shardings and donated arguments."""
    step = as_function(program, assignment, mesh, jax_mesh, lowering)
    donate = tuple(donated)
    if not on_devices(mesh):
        return jax.jit(step, donate_argnums=donate)
    return jax.jit(
        step,
        in_shardings=shardings(assignment.inputs, jax_mesh),
        out_shardings=shardings(assignment.outputs, jax_mesh),
        donate_argnums=donate,
    )


def shardings(layouts: Sequence[Layout], jax_mesh: Any) -> tuple[NamedSharding, ...]:
    """Layouts as JAX's shardings on a mesh."""
    return tuple(NamedSharding(jax_mesh, partition_spec(x)) for x in layouts)
