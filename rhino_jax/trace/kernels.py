"""Which blocks of its arrays a Pallas kernel works on, as its grid's maps say."""

from __future__ import annotations

from typing import Any

from rhino_jax import compat

_ASKS = ("program_id", "num_programs")

Blocks = tuple[tuple[tuple[int, int], ...], ...]
"""For each operand and result, for each dimension: an axis of the grid and a size."""


def kernel_blocks(eqn: Any) -> Blocks | None:
    """Which axes of a kernel's grid dimensions follow block by block; -1 for none.

    Named are only axes that are parallel loops: nothing uses them but to tell one
    block from another, and all results follow them. None where the grid or its maps are
    known at run time only, or results are written over operands.
    """
    grid = eqn.params["grid_mapping"]
    at_run_time = grid.num_index_operands or grid.num_dynamic_grid_bounds
    if at_run_time or eqn.params["input_output_aliases"]:
        return None
    kernel = eqn.params["jaxpr"]
    taken = {
        e.params["axis"] for e in compat.equations(kernel) if e.primitive.name in _ASKS
    }
    followed: list[list[tuple[int, int]]] = []
    for mapping in grid.block_mappings:
        index = mapping.index_map_jaxpr.jaxpr
        axes = {var: axis for axis, var in enumerate(index.invars[: len(grid.grid)])}
        taken |= {
            axes[v]
            for e in index.eqns
            for v in e.invars
            if isinstance(v, compat.Var) and v in axes
        }
        dims = []
        for n, block, out in zip(
            mapping.array_aval.shape, mapping.block_shape, index.outvars, strict=True
        ):
            size = _block_size(block)
            axis = axes.get(out, -1) if isinstance(out, compat.Var) else -1
            even = size and isinstance(grid.grid[axis], int)
            if axis >= 0 and not (even and size * grid.grid[axis] == n):
                taken.add(axis)
            dims.append((axis, size or n))
        named = [axis for axis, _ in dims if axis >= 0]
        taken |= {axis for axis in named if named.count(axis) > 1}
        followed.append(dims)
    made = followed[grid.num_inputs :]
    free = set.intersection(*({axis for axis, _ in dims} for dims in made)) - taken
    return tuple(
        tuple((axis if axis in free else -1, size) for axis, size in dims)
        for dims in followed
    )


def _block_size(block: Any) -> int:
    """Elements of a block along one dimension; 0 where blocks may overlap."""
    if isinstance(block, int):
        return block
    kind = type(block).__name__
    return {"Squeezed": 1, "Blocked": getattr(block, "block_size", 0)}.get(kind, 0)
