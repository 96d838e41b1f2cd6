"""PartitionSpecs: what one means for a value, whether it fits, and where one holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.errors import nearest
from rhino_jax.ir.layout import Layout, contiguous
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.rules.placing import CONSTRAINTS, OPEN

Spec = tuple[tuple[str, ...], ...]
"""Per dimension the axes that split it, outermost first; or that it is open."""


def spec_layout(spec: Spec, shape: Sequence[int], mesh: Mesh) -> Layout:
    """The layout that a spec means for a value of ``shape``; what is open is whole."""
    dims = [
        contiguous(n, () if axes == OPEN else axes, mesh)
        for n, axes in zip(shape, spec, strict=False)
    ]
    return Layout((*dims, *((),) * (len(shape) - len(dims))))


def spec_beside(spec: Spec, shape: Sequence[int], mesh: Mesh, here: Layout) -> Layout:
    """The same, with the dimensions that are open as they lie ``here``, but over axes
    that the spec names."""
    asked = spec_layout(spec, shape, mesh)
    free = here.without(asked.axes).settled()
    dims = list(asked.dims)
    for d, axes in enumerate(spec):
        if axes == OPEN:
            dims[d] = free.dims[d]
    return Layout(tuple(dims))


def spec_problems(spec: Spec, shape: Sequence[int], mesh: Mesh) -> list[str]:
    """Everything that keeps a spec from being stored for a value of ``shape``."""
    if len(spec) > len(shape):
        return [f"{len(spec)} entries for {len(shape)} dimensions {tuple(shape)}"]
    found = []
    spec = tuple(() if axes == OPEN else axes for axes in spec)
    names = [axis for axes in spec for axis in axes]
    for axis in names:
        if axis not in mesh.names:
            near = nearest(axis, mesh.names) or list(mesh.names)
            found.append(
                f"no axis {axis!r} in mesh ({mesh}); did you mean {near[0]!r}?"
            )
    if len(set(names)) != len(names):
        found.append("an axis is used twice")
    if found:
        return found
    for d, (n, axes) in enumerate(zip(shape, spec, strict=False)):
        parts = mesh.group_size(axes)
        if n % parts:
            found.append(
                f"dimension {d} of size {n} does not divide into {parts} "
                f"({'×'.join(axes)})"
            )
    return found


def pin_of(
    op: Op, shape: Sequence[int], named: Mapping[str, Spec], mesh: Mesh
) -> Spec | None:
    """What is fixed for the result of ``op``: by a pin's name, or in the step itself.

    A sharding constraint of the user's holds where it fits ``mesh``.
    """
    if op.kind == "name":
        return named.get(op.param["name"])
    if op.kind not in CONSTRAINTS or op.param["spec"] is None:
        return None
    spec: Spec = op.param["spec"]
    return None if spec_problems(spec, shape, mesh) else spec


def ignored_constraints(program: Program, mesh: Mesh) -> list[str]:
    """Sharding constraints in the step that do not fit ``mesh``, and why not."""
    found = []
    for inner, op in program.walk():
        if op.kind not in CONSTRAINTS:
            continue
        shape = inner.values[op.results[0]].shape
        wrong = (
            ["it names no axes"]
            if op.param["spec"] is None
            else spec_problems(op.param["spec"], shape, mesh)
        )
        found += [f"sharding constraint at {op.where}: {w}: ignored" for w in wrong[:1]]
    return list(dict.fromkeys(found))
