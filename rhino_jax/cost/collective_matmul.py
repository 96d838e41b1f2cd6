"""What is still waited for where a product gathers or scatters by itself.

Shards go around a ring while the product works on those that are here already: "Overlap
Communication with Dependent Computation via Decomposition" (Wang et al., ASPLOS 2023).
Of ``n`` parts of the product the first needs nothing of the others, so as many seconds
of the collective are hidden as the other ``n - 1`` take. The same shards cross the same
links, so a ring is priced as the collective that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rhino_jax.cluster.hardware import Device
from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.compute import Work, parts_seconds
from rhino_jax.cost.instructions import Instruction, Unfolded
from rhino_jax.ir.factors import Rule
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op
from rhino_jax.ir.steps import ALL_GATHER, Step, changed_dim


def exposed_seconds(sent_seconds: float, product_seconds: float, count: int) -> float:
    """Of a collective among ``count`` devices, what its product does not hide.

    >>> exposed_seconds(3.0, 2.0, 4), exposed_seconds(1.0, 2.0, 4)
    (1.5, 0.0)
    """
    return max(0.0, sent_seconds - product_seconds * (count - 1) / count)


def divided(op: Op, rule: Rule, value: int, step: Step) -> str:
    """The factor of a product that is worked on part by part."""
    dims = rule.results[0]
    if step.kind == ALL_GATHER:
        dims = rule.operands[op.operands.index(value)]
    (name,) = dims[changed_dim(step)]
    return name


def within_seconds(
    unfolded: Unfolded, works: Sequence[Work], mesh: Mesh, cluster: Cluster
) -> Iterator[tuple[int, float]]:
    """Of every step that a product does by itself, by its instruction: the seconds that
    are seen of it, and what the product loses because it is done in parts."""
    for number, at in enumerate(unfolded.instructions):
        if at.within is None:
            continue
        assert at.step is not None
        product = _product(unfolded, number)
        one = unfolded.instructions[product]
        sent = step_seconds(at.step, mesh, cluster)
        count = mesh.group_size(at.step.axes)
        seen = exposed_seconds(sent, works[product].seconds, count)
        yield number, seen + lost_seconds(one, at.within, at.step, mesh, cluster.device)


def lost_seconds(
    one: Instruction, value: int, step: Step, mesh: Mesh, device: Device
) -> float:
    """What a product of smaller parts takes longer."""
    assert one.op is not None and one.rule is not None
    name, count = divided(one.op, one.rule, value, step), mesh.group_size(step.axes)
    reads = one.program.operand_values(one.op)
    given = (one.op, reads, one.rule, one.plan.choice, mesh, device)
    return parts_seconds(*given, name, count) - parts_seconds(*given)


def _product(unfolded: Unfolded, number: int) -> int:
    """The instruction of the product that does step ``number`` by itself."""
    at = unfolded.instructions[number]
    assert at.step is not None
    behind = at.step.kind != ALL_GATHER
    places = (
        range(number, -1, -1) if behind else range(number, len(unfolded.instructions))
    )
    for place in places:
        one = unfolded.instructions[place]
        if one.op is at.op and one.step is None:
            return place
    raise AssertionError(f"no product beside {at.kind}")
