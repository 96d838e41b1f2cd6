"""What a ``shard_map`` of the user's sends: collectives that nobody has planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rhino_jax.cost.reshard import sent_bytes
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Value
from rhino_jax.ir.steps import ALL_GATHER, COLLECTIVES, Step, named_axes


def sent_by(
    op: Op, reads: Sequence[Value], makes: Sequence[Value], mesh: Mesh
) -> Iterator[tuple[Value, Step]]:
    """What an op sends, if it is a collective; ``mesh`` has all axes that it names.

    What it reads is as one device has it; of what is ragged, all is taken to be sent.
    """
    kind = COLLECTIVES.get(op.kind)
    if kind is None:
        return
    axes = mesh.in_order(named_axes(op))
    groups = op.param.get("axis_index_groups")
    size = len(groups[0]) if groups else mesh.group_size(axes)
    for value in makes if kind == ALL_GATHER else reads[:1]:
        sent = sent_bytes(kind, value.num_bytes, size) if size > 1 else 0
        if sent:
            whole = Layout.replicated(len(value.shape))
            yield value, Step(kind, axes, whole, whole, sent)
