"""Arithmetic, bytes and seconds of ops on their shards, by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rhino_jax.cluster import kernels
from rhino_jax.cluster.hardware import CATALOGUE
from rhino_jax.cluster.profile import kernels_of
from rhino_jax.cost.buffers import unfold
from rhino_jax.cost.compute import (
    CONVOLVED_LETTERS,
    Work,
    op_flops,
    op_work,
    product_size,
    work_of,
)
from rhino_jax.cost.fusion import fusion
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.rules import rule_of
from tests.cost.plans import ONE, f32, planned, program, traced_whole, trained

SHARE = {curve.kind: curve.shares[0] for curve in kernels_of(CATALOGUE["cpu"]).curves}
# A device of round numbers: 4 flops, or 2 bytes of a product's, take a second.
SLOW = replace(
    CATALOGUE["cpu"],
    f32_flops_per_second=4.0 / SHARE[kernels.PRODUCT],
    bf16_flops_per_second=8.0 / SHARE[kernels.PRODUCT],
    memory_bytes_per_second=2.0 / SHARE[kernels.OPERANDS],
)
DIMS = (("dimension_numbers", (((1,), (0,)), ((), ()))),)
PRODUCT = program(
    [(8, 4), (4, 6), (8, 6)], (0, 1), [("dot_general", (0, 1), (2,), DIMS)], (2,)
)


def work(of: Program, assignment: Assignment, mesh: Mesh = ONE) -> Work:
    unfolded = unfold(of, assignment, mesh, rule_of)
    return work_of(unfolded, fusion(unfolded), mesh, SLOW)


@pytest.mark.parametrize(
    ("choice", "flops", "num_bytes"),
    [
        ({}, 2 * 8 * 4 * 6, 4 * (8 * 4 + 4 * 6 + 8 * 6)),
        ({"m0": [Split("d", 4)]}, 2 * 4 * 4 * 6, 4 * (4 * 4 + 4 * 6 + 4 * 6)),
        ({"k0": [Split("d", 2)]}, 2 * 8 * 2 * 6, 4 * (8 * 2 + 2 * 6 + 8 * 6)),
        # Ragged: 8 over 3 devices is 3 rows each.
        ({"m0": [Split("e", 3)]}, 2 * 3 * 4 * 6, 4 * (3 * 4 + 4 * 6 + 3 * 6)),
    ],
)
def test_a_product_on_its_shard(
    choice: dict[str, list[Split]], flops: int, num_bytes: int
) -> None:
    (op,), mesh = PRODUCT.ops, Mesh.of(d=2, e=3)
    names = {f.name[0] + "0": f.name for f in rule_of(PRODUCT, op).factors}
    chosen = Choice.of({names[n]: splits for n, splits in choice.items()})
    rule = rule_of(PRODUCT, op)
    assert op_flops(op, rule, chosen, mesh) == flops
    found = op_work(PRODUCT, op, rule, chosen, mesh, SLOW)
    assert (found.flops, found.num_bytes) == (flops, num_bytes)
    assert found.seconds == pytest.approx(max(flops / 4, num_bytes / 2))


def test_the_roofline_takes_the_longer_of_the_two() -> None:
    (op,) = PRODUCT.ops
    rule = rule_of(PRODUCT, op)

    def seconds(flops_per_second: float, bytes_per_second: float) -> float:
        device = replace(
            SLOW,
            f32_flops_per_second=flops_per_second / SHARE[kernels.PRODUCT],
            memory_bytes_per_second=bytes_per_second / SHARE[kernels.OPERANDS],
        )
        return op_work(PRODUCT, op, rule, Choice(), ONE, device).seconds

    assert seconds(1.0, 1e9) == pytest.approx(384)
    assert seconds(1e9, 1.0) == pytest.approx(416)


def test_what_is_fused_away_costs_nothing() -> None:
    (op,) = PRODUCT.ops
    rule = rule_of(PRODUCT, op)
    found = op_work(PRODUCT, op, rule, Choice(), ONE, SLOW, {0, 2})
    assert found.num_bytes == 4 * 4 * 6


def brute_flops(lhs: int, rhs: int, stride: int, ldil: int, rdil: int) -> int:
    """Twice the pairs (element that is no inserted zero, tap), without padding."""
    span = np.zeros((lhs - 1) * ldil + 1)
    span[::ldil] = 1
    taps = (rhs - 1) * rdil + 1
    return 2 * int(
        sum(
            span[at + tap]
            for at in range(0, len(span) - taps + 1, stride)
            for tap in range(0, taps, rdil)
        )
    )


@pytest.mark.parametrize(
    ("lhs", "rhs", "stride", "ldil", "rdil", "tolerance"),
    [
        (12, 3, 1, 1, 1, 0.0),  # windows that overlap
        (12, 3, 2, 1, 1, 0.0),
        (12, 4, 4, 1, 1, 0.0),  # windows side by side
        (12, 1, 2, 1, 1, 0.0),
        (12, 3, 1, 1, 2, 0.0),  # the gradient for a strided kernel
        (12, 4, 1, 2, 1, 0.05),  # a transposed convolution: but for its edges
    ],
)
def test_a_convolution(
    lhs: int, rhs: int, stride: int, ldil: int, rdil: int, tolerance: float
) -> None:
    batch, taken, made = 2, 3, 5

    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, (stride,), ((0, 0),), (ldil,), (rdil,)
        )

    of, _ = traced_whole(step, f32(batch, taken, lhs), f32(made, taken, rhs))
    (op,) = (op for op in of.ops if op.kind == "conv_general_dilated")
    found = op_flops(op, rule_of(of, op), Choice(), ONE)
    wanted = batch * taken * made * brute_flops(lhs, rhs, stride, ldil, rdil)
    assert found == pytest.approx(wanted, rel=tolerance)


def test_the_gradients_of_a_convolution_cost_as_much() -> None:
    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=dims
        )

    def both(x: jax.Array, w: jax.Array, g: jax.Array) -> object:
        return jax.vjp(forward, x, w)[1](g)

    x, w, g = f32(4, 32, 32, 8), f32(3, 3, 8, 16), f32(4, 16, 16, 16)
    of, _ = traced_whole(both, x, w, g)
    convs = [op for op in of.ops if op.kind == "conv_general_dilated"]
    flops = [op_flops(op, rule_of(of, op), Choice(), ONE) for op in convs]
    once = 2 * 4 * 16 * 16 * 16 * 8 * 9
    assert flops == [once] * 3


def test_a_scan_counts_every_trip() -> None:
    def once(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x, w)

    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, w: (once(c, w), None), x, w)[0]

    single = work(*traced_whole(once, f32(8, 8), f32(8, 8)))
    scanned = work(*traced_whole(step, f32(8, 8), f32(7, 8, 8)))
    assert scanned.flops == 7 * single.flops == 7 * 2 * 8**3
    # The slice of the stack is copied before the product reads it: read and written.
    assert scanned.num_bytes == 7 * (single.num_bytes + 2 * 4 * 64)


def test_of_branches_the_dearest_counts() -> None:
    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(i, lambda x: x @ x @ x, lambda x: x @ x, x)

    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    assert work(*traced_whole(step, flag, f32(8, 8))).flops == 2 * 2 * 8**3


def test_elementwise_chains_read_and_write_once() -> None:
    of, assignment = traced_whole(
        lambda x: jnp.sin(jnp.cos(jnp.tanh(x))) * 2.0, f32(100)
    )
    assert work(of, assignment).num_bytes == 2 * 400


def test_a_scatter_moves_what_changes() -> None:
    def step(table: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
        return table.at[at].add(rows, mode="promise_in_bounds")

    at = jax.ShapeDtypeStruct((3,), jnp.int32)
    of, assignment = traced_whole(step, f32(1000, 16), f32(3, 16), at)
    assert work(of, assignment).num_bytes < 6 * 3 * 16 * 4


def test_a_step_is_divided_among_devices() -> None:
    of = trained().program
    counts = (1, 2, 4, 8)
    found = [
        work(of, planned("data_parallel", Mesh.of(data=n)), Mesh.of(data=n))
        for n in counts
    ]
    flops = [one.flops for one in found]
    assert flops == [flops[0] / n for n in counts]
    assert all(a.num_bytes > b.num_bytes for a, b in itertools.pairwise(found))
    products = [op for op in of.ops if op.kind == "dot_general"]
    whole = sum(op_flops(op, rule_of(of, op), Choice(), ONE) for op in products)
    assert flops[0] == whole == 8 * 2 * 32 * 64 * 64


def test_an_op_without_a_table_entry_is_bound_by_memory() -> None:
    of = program([(10,), (10,)], (0,), [("mystery", (0,), (1,))], (1,))
    op = of.ops[0]
    found = op_work(of, op, rule_of(of, op), Choice(), ONE, SLOW)
    assert found == Work(
        0, 80, pytest.approx(40 * SHARE[kernels.OPERANDS] / SHARE[kernels.ELEMENTWISE])
    )


def test_kinds_of_kernels_have_curves_of_their_own() -> None:
    shares = {
        kernels.PRODUCT: 0.5,
        kernels.CONVOLUTION: 0.5,
        kernels.ELEMENTWISE: 0.8,
        kernels.REDUCTION: 0.4,
        kernels.COLUMNS: 0.2,
        kernels.GATHER: 0.1,
    }
    curves = tuple(kernels.Curve(kind, "", (), (x,)) for kind, x in shares.items())
    known = kernels.Kernels(curves, 0.0, "made up", traffic=0.5)
    device = replace(SLOW, memory_bytes_per_second=1.0, kernels=known)

    def seconds(step: object, *args: jax.ShapeDtypeStruct) -> float:
        of, assignment = traced_whole(step, *args)
        unfolded = unfold(of, assignment, ONE, rule_of)
        return work_of(unfolded, fusion(unfolded), ONE, device).seconds

    x, at = f32(10, 20), jax.ShapeDtypeStruct((3,), jnp.int32)
    assert seconds(jnp.tanh, x) == pytest.approx(0.5 * 1600 / 0.8)
    assert seconds(lambda x: x.sum(1), x) == pytest.approx(0.5 * 840 / 0.4)
    assert seconds(lambda x: x.sum(0), x) == pytest.approx(0.5 * 880 / 0.2)
    rows = seconds(lambda x, at: x.at[at].get(mode="promise_in_bounds"), x, at)
    assert rows > 2 * 3 * 20 * 4 / 0.1, "all its bytes, at the share of gathers"


def test_a_products_share_is_that_of_its_size() -> None:
    (op,) = PRODUCT.ops
    rule = rule_of(PRODUCT, op)
    axes = ((8.0, 16.0), (4.0, 8.0), (6.0, 12.0))
    curve = kernels.Curve(kernels.PRODUCT, "f32", axes, (0.1, *(0.9,) * 7))
    others = (kernels.CONVOLUTION, kernels.ELEMENTWISE)
    rest = (kernels.Curve(kind, "", (), (1.0,)) for kind in others)
    known = kernels.Kernels((curve, *rest), 0.0, "made up")
    device = replace(
        SLOW, f32_flops_per_second=1.0, memory_bytes_per_second=1e9, kernels=known
    )
    found = op_work(PRODUCT, op, rule, Choice(), ONE, device)
    assert found.seconds == pytest.approx(2 * 8 * 4 * 6 / 0.1)


def test_a_convolution_is_a_product() -> None:
    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers
        )

    of, _ = traced_whole(conv, f32(4, 16, 16, 8), f32(3, 3, 8, 32))
    op = next(op for op in of.ops if op.kind == "conv_general_dilated")
    rule = rule_of(of, op)
    size = product_size(rule, Choice(), ONE, CONVOLVED_LETTERS)
    assert size == (1, 4 * 16 * 16, 3 * 3 * 8, 32)
    assert op_flops(op, rule, Choice(), ONE) == 2 * math.prod(size)
