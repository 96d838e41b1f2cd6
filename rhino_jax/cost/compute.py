"""Seconds of compute on one device: a roofline an op.

An op takes the longer of its arithmetic at the peak of the matrix units and its bytes
at the memory's bandwidth, each at a share of the data sheet's figure that real kernels
reach (:data:`EFFICIENCY`). Only matrix products and convolutions are priced by
arithmetic; all else is bound by memory. Bytes are those of real buffers: what is fused
away (:mod:`rhino_jax.cost.fusion`) is neither written nor read, and what it was made
of is read once, by the instruction that is fused away. A first version: no launch
times, no loss in small or odd shapes, no overlap.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rhino_jax.cluster.hardware import Device
from rhino_jax.cost.buffers import PARTIAL_READERS, Instruction, Unfolded
from rhino_jax.cost.fusion import Fusion, fusion
from rhino_jax.cost.reshard import local_bytes
from rhino_jax.ir.factors import Choice, Rule, layouts
from rhino_jax.ir.layout import local_size
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Value

PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general")
CONVOLUTION = "conv_general_dilated"
MEMORY = "memory"

EFFICIENCY: Mapping[str, float] = {
    # XLA's own price of a bf16 product of 69 GFLOP on an H100 is 76 % of peak.
    **dict.fromkeys(PRODUCTS, 0.75),
    # Assumed: implicit products with shorter inner loops.
    CONVOLUTION: 0.5,
    # Assumed: what a plain copy of large arrays reaches.
    MEMORY: 0.8,
}
"""Share of the data sheet's peak that kernels reach. A first version, not measured."""

_UPDATES = ("dynamic_update_slice",)


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
    """Floating-point operations of a product or convolution on one shard, else 0.

    Two for every point of the local iteration space. Padding of a convolution counts;
    the zeros between the elements of a dilated operand do not.
    """
    if op.kind not in (*PRODUCTS, CONVOLUTION):
        return 0
    points = 1
    for factor in rule.factors:
        # Where windows overlap, the operand's own dimension ("x") is no loop: the
        # window and the result's dimension are.
        if op.kind != CONVOLUTION or not factor.name.startswith("x"):
            points *= local_size(factor.size, choice.on(factor.name), mesh)
    if op.kind == CONVOLUTION:
        points //= math.prod(op.param["lhs_dilation"])
    return 2 * points


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
    num_bytes = _moved(op.kind, real[:count], real[count:], sum(sizes[count:]))
    flops = op_flops(op, rule, choice, mesh)
    dtypes = tuple(v.dtype for v in reads[:2])
    return _roofline(op.kind, flops, num_bytes, dtypes, device)


def work_of(unfolded: Unfolded, fused: Fusion, mesh: Mesh, device: Device) -> Work:
    """All work of one device, loops multiplied out.

    Of branches the dearest counts; a ``while`` counts as one trip. What collectives
    read and write is part of their own price.
    """
    total = Work()
    for instruction in unfolded.instructions:
        if instruction.bodies:
            inner = [work_of(b, fusion(b), mesh, device) for b in instruction.bodies]
            if instruction.kind == "cond":
                inner = [max(inner, key=lambda work: (work.seconds, work.flops))]
            for work in inner:
                total = total.plus(work, instruction.trips)
        elif not (instruction.step and instruction.step.wire_bytes):
            total = total.plus(
                instruction_work(instruction, unfolded, fused, mesh, device)
            )
    return total


def instruction_work(
    at: Instruction, unfolded: Unfolded, fused: Fusion, mesh: Mesh, device: Device
) -> Work:
    """The work of one instruction that is no collective and has no bodies."""
    buffers, written = unfolded.buffers, fused.written
    reads = [buffers[b].num_bytes if written[b] else 0 for b in at.reads]
    writes = [buffers[b].num_bytes if written[b] else 0 for b in at.writes]
    made = sum(buffers[b].num_bytes for b in at.writes)
    num_bytes = _moved(at.kind, reads, writes, made)
    if at.rule is None or at.op is None or at.step is not None:
        return _roofline(at.kind, 0, num_bytes, (), device)
    flops = op_flops(at.op, at.rule, at.plan.choice, mesh)
    return _roofline(at.kind, flops, num_bytes, _dtypes(at.program, at.op), device)


def _dtypes(program: Program, op: Op) -> tuple[str, ...]:
    return tuple(program.values[v].dtype for v in op.operands[:2])


def _moved(kind: str, reads: list[int], writes: list[int], made: int) -> int:
    """Bytes that an op moves, given those of the real buffers it reads and writes."""
    if kind in PARTIAL_READERS:
        return sum(min(read, made) for read in reads) + sum(writes)
    if kind in _UPDATES or kind.startswith("scatter"):
        # Written in place: what changes is read and written, the rest is left.
        rest = sum(reads[1:])
        return rest + min(rest, sum(writes))
    return sum(reads) + sum(writes)


def _roofline(
    kind: str, flops: int, num_bytes: int, dtypes: tuple[str, ...], device: Device
) -> Work:
    bandwidth = device.memory_bytes_per_second * EFFICIENCY[MEMORY]
    seconds = num_bytes / bandwidth
    if flops:
        peak = min(device.flops_per_second(dtype) for dtype in dtypes)
        seconds = max(seconds, flops / (peak * EFFICIENCY[kind]))
    return Work(flops, num_bytes, seconds)
