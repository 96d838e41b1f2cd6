"""What is still waited for where a product gathers or scatters by itself.

Shards go around a ring while the product works on those that are here already: "Overlap
Communication with Dependent Computation via Decomposition" (Wang et al., ASPLOS 2023).
Of ``n`` parts of the product the first needs nothing of the others, so as many seconds
of the collective are hidden as the other ``n - 1`` take. The same shards cross the same
links, so a ring is priced as the collective that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rhino_jax.cluster.topology import Cluster
from rhino_jax.cost.collectives import step_seconds
from rhino_jax.cost.compute import Work, memory_seconds, parts_seconds
from rhino_jax.cost.instructions import Unfolded
from rhino_jax.cost.reshard import local_bytes
from rhino_jax.ir.factors import Choice, Rule, layouts
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, accumulator_dtype
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


def seen_seconds(
    program: Program,
    op: Op,
    rule: Rule,
    choice: Choice,
    value: int,
    step: Step,
    product_seconds: float,
    mesh: Mesh,
    cluster: Cluster,
) -> float:
    """What is seen of ``step``, a move of ``value``, where the product ``op``, of so
    many seconds, does it by itself: what it does not hide, and what it loses.

    Smaller products reach less of the peak. And nothing is made of a result in the
    kernel that makes it any more: it is written part by part, or added up in float32,
    and read again.
    """
    factor, count = divided(op, rule, value, step), mesh.group_size(step.axes)
    sent = step_seconds(step, mesh, cluster)
    given = (op, program.operand_values(op), rule, choice, mesh, cluster.device)
    slower = parts_seconds(*given, factor, count) - parts_seconds(*given)
    (made,), (layout,) = program.result_values(op), layouts(rule, choice)[1]
    moved = 2 * local_bytes(made.shape, made.dtype, layout, mesh)
    if not any(factor in dim for dim in rule.results[0]):
        terms = accumulator_dtype(made.dtype)
        moved = 2 * count * local_bytes(made.shape, terms, layout, mesh)
    lost = slower + memory_seconds(moved, cluster.device)
    return exposed_seconds(sent, product_seconds, count) + lost


def within_seconds(
    unfolded: Unfolded, works: Sequence[Work], mesh: Mesh, cluster: Cluster
) -> Iterator[tuple[int, float]]:
    """What is seen of every step that a product does by itself, by its instruction."""
    for number, at in enumerate(unfolded.instructions):
        if at.within is None:
            continue
        product = _product(unfolded, number)
        one, seconds = unfolded.instructions[product], works[product].seconds
        assert at.step is not None and one.op is not None and one.rule is not None
        given = (one.program, one.op, one.rule, one.plan.choice, at.within, at.step)
        yield number, seen_seconds(*given, seconds, mesh, cluster)


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
