"""Seconds of compute on one device: a roofline an op.

An op takes the longer of its arithmetic at the peak of the matrix units and its bytes
at the memory's bandwidth, each at the share of the data sheet's figure that kernels of
its kind and size reach by the device's profile (:mod:`rhino_jax.cluster.kernels`), and
the launch of its kernel. Only matrix products and convolutions are priced by
arithmetic; all else is bound by memory. Bytes are those of real buffers: what is fused
away (:mod:`rhino_jax.cost.fusion`) is neither written nor read
(:mod:`rhino_jax.cost.traffic`). No overlap.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from rhino_jax.cluster.hardware import Device, column
from rhino_jax.cluster.kernels import (
    BATCHED,
    COLUMNS,
    CONVOLUTION,
    ELEMENTWISE,
    FUSING,
    GATHER,
    OPERANDS,
    PRODUCT,
    REDUCTION,
    SCATTER,
)
from rhino_jax.cluster.profile import kernels_of
from rhino_jax.cost.attention import PRODUCTS as ATTENTION
from rhino_jax.cost.attention import attention_flops, attention_size, blocks
from rhino_jax.cost.buffers import Instruction, Unfolded
from rhino_jax.cost.fusion import Fusion, fusion
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.halo import extended_bytes
from rhino_jax.cost.reshard import local_bytes
from rhino_jax.cost.traffic import traffic, whole_bytes
from rhino_jax.ir.factors import Choice, Rule, layouts
from rhino_jax.ir.layout import local_size
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Value

PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general")
GROUPED = ("ragged_dot", "ragged_dot_general")
CONVOLVED = "conv_general_dilated"
TILED = frozenset((*PRODUCTS, CONVOLVED))
READS: Mapping[str, str] = {
    **dict.fromkeys(TILED, OPERANDS),
    **dict.fromkeys("reduce_sum reduce_max reduce_min reduce_prod".split(), REDUCTION),
    **dict.fromkeys("argmax argmin cumsum".split(), REDUCTION),
    "gather": GATHER,
    **dict.fromkeys("scatter scatter-add scatter_add".split(), SCATTER),
}
"""Kind of kernel by kind of op, of what is bound by memory; the rest: elementwise."""
PRODUCT_LETTERS = {letter: letter for letter in "bmkn"}
"""Factors by their first letter: batch, rows, contracted, columns. Others are rows."""
CONVOLVED_LETTERS = {"g": "b", "c": "k", "k": "k", "w": "k", "o": "n", "x": ""}
"""Of a convolution: groups, channels and window, features; where windows overlap, the
operand's own dimension is no loop."""


@dataclass(frozen=True)
class Work:
    """What one device does: arithmetic of products, bytes of memory, seconds."""

    flops: float = 0.0
    num_bytes: float = 0.0
    seconds: float = 0.0

    def plus(self, other: Work, times: int = 1) -> Work:
        return Work(
            self.flops + times * other.flops,
            self.num_bytes + times * other.num_bytes,
            self.seconds + times * other.seconds,
        )


def op_flops(op: Op, rule: Rule, choice: Choice, mesh: Mesh) -> int:
    """Operations of a product, convolution or attention on one shard, else 0.

    Two for every point of the local iteration space. Padding of a convolution counts;
    the zeros between the elements of a dilated operand do not.
    """
    if op.kind in ATTENTION:
        return attention_flops(op, rule, choice, mesh)
    if op.kind not in TILED:
        return 0
    points = 1
    for factor in rule.factors:
        # Where windows overlap, the operand's own dimension ("x") is no loop: the
        # window and the result's dimension are.
        if op.kind in GROUPED and factor.name in ("g", "c"):
            continue  # each row is multiplied with the matrix of one group
        if op.kind != CONVOLVED or not factor.name.startswith("x"):
            points *= local_size(factor.size, choice.on(factor.name), mesh)
    if op.kind == CONVOLVED:
        points //= math.prod(op.param["lhs_dilation"])
    return 2 * points


def product_size(
    rule: Rule,
    choice: Choice,
    mesh: Mesh,
    letters: Mapping[str, str] = PRODUCT_LETTERS,
) -> tuple[float, ...]:
    """Batch, rows, contracted dimension and columns of a product on one shard.

    A convolution's are those of the product that it is: a row an element of the result,
    contracted are channels and window.
    """
    sides = dict.fromkeys("bmkn", 1.0)
    for factor in rule.factors:
        if letter := letters.get(factor.name[0], "m"):
            sides[letter] *= local_size(factor.size, choice.on(factor.name), mesh)
    return tuple(sides.values())


def memory_seconds(num_bytes: float, device: Device, kind: str = ELEMENTWISE) -> float:
    """Seconds of a kernel of ``kind`` that only moves bytes; no launch."""
    if not num_bytes:
        return 0.0
    kernels = kernels_of(device)
    share = kernels.share(kind, "", (num_bytes,))
    moved = num_bytes * (kernels.traffic if kind in FUSING else 1.0)
    return moved / (device.memory_bytes_per_second * share)


def op_work(
    program: Program,
    op: Op,
    rule: Rule,
    choice: Choice,
    mesh: Mesh,
    device: Device,
    unwritten: Collection[int] = (),
) -> Work:
    """The work of one op under one choice.

    ``unwritten`` are values that are fused away: they cost no bytes.
    """
    seen: set[int] = set()
    fused = []
    for v in (*op.operands, *op.results):
        fused.append(v in unwritten or v in seen)
        seen.add(v)
    return kernel_work(
        op,
        program.operand_values(op),
        program.result_values(op),
        rule,
        choice,
        mesh,
        device,
        tuple(fused),
    )


def kernel_work(
    op: Op,
    reads: tuple[Value, ...],
    makes: tuple[Value, ...],
    rule: Rule,
    choice: Choice,
    mesh: Mesh,
    device: Device,
    fused: tuple[bool, ...],
) -> Work:
    """The work of one op under one choice, given the values it reads and makes.

    ``fused`` says of every operand, then of every result, that it is fused away: it
    costs no bytes.
    """
    wanted, given = layouts(rule, choice)
    sizes = [
        local_bytes(v.shape, v.dtype, layout, mesh)
        for v, layout in zip((*reads, *makes), (*wanted, *given), strict=True)
    ]
    real = [
        0 if gone or v.literal is not None else size
        for v, gone, size in zip((*reads, *makes), fused, sizes, strict=True)
    ]
    count = len(reads)
    num_bytes = whole_bytes(op.kind, real[:count], real[count:], sum(sizes[count:]))
    flops = op_flops(op, rule, choice, mesh)
    dtypes = tuple(v.dtype for v in reads[:2])
    size = _size(op.kind, flops, rule, choice, mesh)
    moved = memory_seconds(num_bytes, device, _reading(op, reads))
    work = _roofline(op.kind, flops, size, num_bytes, moved, dtypes, device)
    copied = _copied(extended_bytes(rule, choice, reads, mesh), device)
    return work.plus(copied).plus(_in_blocks(op, reads, rule, choice, mesh, device))


def work_of(unfolded: Unfolded, fused: Fusion, mesh: Mesh, device: Device) -> Work:
    """All work of one device, loops multiplied out.

    Of branches the dearest counts; a ``while`` counts as one trip. What collectives
    read and write is part of their own price.
    """
    total = Work()
    priced = kernel_works(unfolded, fused, mesh, device)
    for instruction, work in zip(unfolded.instructions, priced, strict=True):
        if instruction.bodies:
            habits = HABITS[device.platform]
            inner = [
                work_of(b, fusion(b, habits), mesh, device) for b in instruction.bodies
            ]
            if instruction.kind == "cond":
                inner = [max(inner, key=lambda work: (work.seconds, work.flops))]
            for work in inner:
                total = total.plus(work, instruction.trips)
        else:
            total = total.plus(work)
    return total


def kernel_works(
    unfolded: Unfolded, fused: Fusion, mesh: Mesh, device: Device
) -> tuple[Work, ...]:
    """The work of every instruction, loops and collectives aside (they are nothing).

    Guests of a product's kernel have their bytes; the seconds are all the product's:
    the longer of its arithmetic and of the bytes of all.
    """
    moved = traffic(unfolded, fused, HABITS[device.platform])
    guests: dict[int, float] = defaultdict(float)
    for number, one in enumerate(moved):
        if one.kernel != number:
            guests[one.kernel] += memory_seconds(one.num_bytes, device)
    found = []
    for number, at in enumerate(unfolded.instructions):
        num_bytes = moved[number].num_bytes
        if at.bodies or (at.step and at.step.wire_bytes):
            found.append(Work())
        elif moved[number].kernel != number:
            found.append(Work(num_bytes=num_bytes))
        else:
            found.append(
                instruction_work(at, num_bytes, mesh, device, guests.get(number, 0.0))
            )
    return tuple(found)


def instruction_work(
    at: Instruction,
    num_bytes: int,
    mesh: Mesh,
    device: Device,
    guest_seconds: float = 0.0,
) -> Work:
    """The work of one instruction that is no collective and has no bodies.

    ``num_bytes`` are those that it moves (:mod:`rhino_jax.cost.traffic`),
    ``guest_seconds`` what it takes to move those of the guests in its kernel.
    """
    flops = 0
    size: tuple[float, ...] = ()
    dtypes: tuple[str, ...] = ()
    beside = _copied(at.extended_bytes, device)
    kind = READS.get(at.kind, ELEMENTWISE)
    if at.op is not None and at.step is None:
        kind = _reading(at.op, at.program.operand_values(at.op))
    if at.rule is not None and at.op is not None and at.step is None:
        flops = op_flops(at.op, at.rule, at.plan.choice, mesh)
        dtypes = _dtypes(at.program, at.op)
        size = _size(at.kind, flops, at.rule, at.plan.choice, mesh)
        reads = at.program.operand_values(at.op)
        given = (at.op, reads, at.rule, at.plan.choice, mesh, device)
        beside = beside.plus(_in_blocks(*given))
    moved = memory_seconds(num_bytes, device, kind) + guest_seconds
    work = _roofline(at.kind, flops, size, num_bytes, moved, dtypes, device)
    launched = kernels_of(device).launch_seconds if num_bytes else 0.0
    return replace(work, seconds=work.seconds + launched).plus(beside)


def _copied(num_bytes: int, device: Device) -> Work:
    """What it takes to lay blocks beside their halos: read, and written."""
    return Work(0.0, 2 * num_bytes, memory_seconds(2 * num_bytes, device))


def parts_seconds(
    op: Op,
    reads: Sequence[Value],
    rule: Rule,
    choice: Choice,
    mesh: Mesh,
    device: Device,
    factor: str = "",
    count: int = 1,
) -> float:
    """The arithmetic of a product in ``count`` parts along ``factor``, launches too."""
    flops = op_flops(op, rule, choice, mesh)
    size = dict(zip("bmkn", product_size(rule, choice, mesh), strict=True))
    if factor:
        size[factor[0]] /= count
    dtypes = tuple(v.dtype for v in reads)
    part = _roofline(op.kind, flops // count, (*size.values(),), 0, 0.0, dtypes, device)
    return count * (part.seconds + kernels_of(device).launch_seconds)


def _in_blocks(
    op: Op,
    reads: Sequence[Value],
    rule: Rule,
    choice: Choice,
    mesh: Mesh,
    device: Device,
) -> Work:
    """What attention costs beside its products where no kernel does it: nothing is
    done at once with them."""
    if op.kind not in ATTENTION:
        return Work()
    found = blocks(op, reads[0], rule, choice, mesh, device)
    if found is None:
        return Work()
    launched = found.launches * kernels_of(device).launch_seconds
    seconds = memory_seconds(found.num_bytes, device) + launched
    return Work(num_bytes=found.num_bytes, seconds=seconds)


def _dtypes(program: Program, op: Op) -> tuple[str, ...]:
    return tuple(program.values[v].dtype for v in op.operands[:2])


def _reading(op: Op, reads: Sequence[Value]) -> str:
    """The kind of kernel by which an op's bytes are priced."""
    found = READS.get(op.kind, ELEMENTWISE)
    if found != REDUCTION or not reads or "axes" not in op.param:
        return found
    return found if len(reads[0].shape) - 1 in op.param["axes"] else COLUMNS


def _size(
    kind: str, flops: int, rule: Rule, choice: Choice, mesh: Mesh
) -> tuple[float, ...]:
    """The size by which a curve of arithmetic is looked up."""
    if not flops:
        return ()
    if kind in ATTENTION:
        return attention_size(rule, choice, mesh)
    letters = CONVOLVED_LETTERS if kind == CONVOLVED else PRODUCT_LETTERS
    return product_size(rule, choice, mesh, letters)


def _roofline(
    kind: str,
    flops: int,
    size: tuple[float, ...],
    num_bytes: int,
    moved_seconds: float,
    dtypes: tuple[str, ...],
    device: Device,
) -> Work:
    seconds = moved_seconds
    if flops:
        slowest = min(dtypes, key=device.flops_per_second)
        batched = BATCHED if size[0] > 1 else PRODUCT
        curve = CONVOLUTION if kind == CONVOLVED else batched
        share = kernels_of(device).share(curve, column(slowest), size)
        seconds = max(seconds, flops / (device.flops_per_second(slowest) * share))
    return Work(flops, num_bytes, seconds)
