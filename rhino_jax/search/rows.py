"""How a pipelined loop limits what devices may do inside it.

The axis of the stages does nothing there, and of the examples every device keeps a row
of every microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rhino_jax.ir.analysis.batch import BatchDims
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import STAGE, Mesh
from rhino_jax.ir.staged import Staged


@dataclass(frozen=True)
class Rows:
    """Examples along dimension ``dim`` of a value, ``stride`` elements apart; devices
    may split them in any number of parts that divides ``most``."""

    dim: int
    stride: int
    most: int

    def left(self, layout: Layout, mesh: Mesh) -> bool:
        """Whether ``layout`` leaves every device a row of every microbatch."""
        parts = 1
        for split in layout.dims[self.dim]:
            span = split.stride * mesh.size(split.axis)
            parts *= max(1, span // max(split.stride, self.stride))
        return self.most % parts == 0


@dataclass(frozen=True)
class Limits:
    """Of a variable of the search: axes that do nothing, and the rows of every operand,
    then every result (of a port: of itself)."""

    barred: tuple[str, ...] = ()
    rows: tuple[Rows | None, ...] = ()

    def allow(self, layouts: Sequence[Layout], mesh: Mesh) -> bool:
        """Whether operands and results may lie so."""
        return not self.rows or all(
            rows is None or rows.left(layout, mesh)
            for rows, layout in zip(self.rows, layouts, strict=True)
        )


@dataclass(frozen=True)
class Fed:
    """A body inside a pipelined loop, and where its values hold examples."""

    staged: Staged
    dims: BatchDims | None

    def limits(self, values: Sequence[int | None]) -> Limits:
        return Limits((STAGE,), tuple(map(self._rows, values)))

    def inside(self, op: int, body: int) -> Fed:
        """A body of one of its ops."""
        found = self.dims.inner.get(op) if self.dims else None
        return Fed(self.staged, found[body] if found else None)

    def _rows(self, value: int | None) -> Rows | None:
        place = (
            self.dims.places.get(value, ()) if self.dims and value is not None else ()
        )
        if not place:
            return None
        outer = place[0]
        most = max(1, outer.size // self.staged.microbatches)
        return Rows(outer.dim, outer.stride, most)


NO_LIMITS = Limits()
