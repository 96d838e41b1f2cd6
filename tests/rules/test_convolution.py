"""Rules of convolutions and pooling: groups, blocks, and what stays blocked."""

from __future__ import annotations

from typing import Any

import pytest

from rhino_jax.ir.factors import WINDOW, Flow, Halo, Rule
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of

Shape = tuple[int, ...]


def rule(kind: str, reads: list[Shape], makes: list[Shape], **params: Any) -> Rule:
    values = tuple(Value(shape, "float32") for shape in (*reads, *makes))
    ins = tuple(range(len(reads)))
    outs = tuple(range(len(reads), len(values)))
    op = Op(kind, ins, outs, tuple(sorted(params.items())))
    return rule_of(Program(values, ins, (op,), outs), op)


def conv(
    lhs: Shape,
    rhs: Shape,
    out: Shape,
    pad: tuple[tuple[int, int], ...] = ((0, 0),),
    strides: Shape = (1,),
    lhs_dilation: Shape = (1,),
    rhs_dilation: Shape = (1,),
    groups: int = 1,
    batch_groups: int = 1,
    specs: tuple[Shape, Shape, Shape] = ((0, 2, 1), (2, 1, 0), (0, 2, 1)),
) -> Rule:
    """Over one spatial dimension, NWC by WIO unless ``specs`` say otherwise."""
    return rule(
        "conv_general_dilated",
        [lhs, rhs],
        [out],
        dimension_numbers=tuple(
            zip(("lhs_spec", "rhs_spec", "out_spec"), specs, strict=True)
        ),
        padding=pad,
        window_strides=strides,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_group_count=groups,
        batch_group_count=batch_groups,
    )


# JAX's own dimension numbers for the gradient of a weight.
FOR_WEIGHT = ((2, 0, 1), (2, 0, 1), (1, 2, 0))

CONVOLUTIONS = {
    "overlapping windows": (
        conv((4, 6, 8), (3, 8, 5), (4, 6, 5), pad=((1, 1),)),
        "adb,ebc->adc {b:reduction=sum, d:window, e:blocked}",
    ),
    "by stride 2": (
        conv((4, 6, 8), (3, 8, 5), (4, 3, 5), pad=((0, 1),), strides=(2,)),
        "a(de)b,fbc->adc {b:reduction=sum, d:window, e:blocked, f:blocked}",
    ),
    "gradient of stride 2": (
        conv((4, 3, 5), (3, 5, 8), (4, 6, 8), pad=((2, 1),), lhs_dilation=(2,)),
        "adb,fbc->a(de)c {b:reduction=sum, d:window, e:blocked, f:blocked}",
    ),
    "gradient for the weight of overlapping windows": (
        conv((4, 6, 8), (4, 6, 5), (3, 8, 5), pad=((1, 1),), specs=FOR_WEIGHT),
        "bda,bdc->eac {b:reduction=sum, d:window=sum, e:blocked}",
    ),
    "gradient for the weight of stride 2": (
        conv(
            (4, 6, 8),
            (4, 3, 5),
            (3, 8, 5),
            pad=((0, 1),),
            rhs_dilation=(2,),
            specs=FOR_WEIGHT,
        ),
        "b(de)a,bdc->fac {b:reduction=sum, d:window=sum, e:blocked, f:blocked}",
    ),
    "channels first": (
        conv(
            (4, 8, 6),
            (5, 8, 3),
            (4, 5, 4),
            specs=((0, 1, 2), (0, 1, 2), (0, 1, 2)),
        ),
        "abd,cbe->acf {b:reduction=sum, d:blocked, e:blocked, f:blocked}",
    ),
    "window of one": (
        conv((4, 6, 8), (1, 8, 5), (4, 6, 5)),
        "adb,()bc->adc {b:reduction=sum}",
    ),
    "window of one, padded": (
        conv((4, 6, 8), (1, 8, 5), (4, 8, 5), pad=((1, 1),)),
        "adb,()bc->aec {b:reduction=sum, d:blocked, e:blocked}",
    ),
    "every other": (
        conv((4, 6, 8), (1, 8, 5), (4, 3, 5), strides=(2,)),
        "a(de)b,()bc->adc {b:reduction=sum, e:blocked}",
    ),
    "every other of an odd number": (
        conv((4, 7, 8), (1, 8, 5), (4, 4, 5), strides=(2,)),
        "adb,()bc->aec {b:reduction=sum, d:blocked, e:blocked}",
    ),
    "patches": (
        conv((4, 6, 8), (2, 8, 5), (4, 3, 5), strides=(2,)),
        "a(de)b,ebc->adc {b:reduction=sum, e:reduction=sum}",
    ),
    "patches and a rest": (
        conv((4, 7, 8), (2, 8, 5), (4, 3, 5), strides=(2,)),
        "adb,ebc->afc {b:reduction=sum, d:blocked, e:blocked, f:blocked}",
    ),
    "dilated patches": (
        conv((4, 8, 8), (2, 8, 5), (4, 2, 5), strides=(4,), rhs_dilation=(3,)),
        "a(de)b,fbc->adc {b:reduction=sum, e:blocked, f:blocked}",
    ),
    "the whole dimension": (
        conv((4, 6, 8), (6, 8, 5), (4, 1, 5)),
        "adb,dbc->a()c {b:reduction=sum, d:reduction=sum}",
    ),
    "gradient of patches": (
        conv((4, 3, 5), (2, 5, 8), (4, 6, 8), pad=((1, 1),), lhs_dilation=(2,)),
        "adb,fbc->a(de)c {b:reduction=sum, e:blocked, f:blocked}",
    ),
    "spread into one another": (
        conv((4, 3, 5), (3, 5, 8), (4, 7, 8), pad=((2, 2),), lhs_dilation=(2,)),
        "adb,ebc->afc {b:reduction=sum, d:blocked, e:blocked, f:blocked}",
    ),
    "gradient for the patches' weight": (
        conv((4, 6, 8), (4, 3, 5), (2, 8, 5), rhs_dilation=(2,), specs=FOR_WEIGHT),
        "b(de)a,bdc->eac {b:reduction=sum, d:reduction=sum}",
    ),
    "gradient for every other's weight": (
        conv(
            (4, 6, 8),
            (4, 3, 5),
            (1, 8, 5),
            pad=((0, -1),),
            rhs_dilation=(2,),
            specs=FOR_WEIGHT,
        ),
        "b(de)a,bdc->()ac {b:reduction=sum, d:reduction=sum, e:blocked}",
    ),
    "groups": (
        conv((4, 6, 8), (1, 2, 12), (4, 6, 12), groups=4),
        "be(ac),()c(ad)->be(ad) {c:reduction=sum}",
    ),
    "depthwise": (
        conv((4, 6, 8), (1, 1, 8), (4, 6, 8), groups=8),
        "bca,()()a->bca",
    ),
    "depthwise, two of each": (
        conv((4, 6, 8), (1, 1, 16), (4, 6, 16), groups=8),
        "bda,()()(ac)->bd(ac)",
    ),
    "gradient for a grouped weight": (
        conv((4, 6, 8), (4, 6, 12), (1, 2, 12), batch_groups=4, specs=FOR_WEIGHT),
        "ce(ab),ce(ad)->()b(ad) {c:reduction=sum, e:reduction=sum}",
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    found, text = CONVOLUTIONS[name]
    assert found.text == text
    assert found.flows == (Flow("sum", (0,)), Flow("sum", (1,)))


def pool(
    kind: str,
    reads: list[Shape],
    makes: list[Shape],
    window: Shape,
    strides: Shape,
    pad: tuple[tuple[int, int], ...] = ((0, 0), (0, 0)),
    **params: Any,
) -> Rule:
    return rule(
        kind,
        reads,
        makes,
        window_dimensions=window,
        window_strides=strides,
        padding=pad,
        **params,
    )


LARGE, SMALL, TWO = (4, 6), (4, 3), ((1, 2), (1, 2))
POOLS = {
    "sum": (
        pool("reduce_window_sum", [LARGE], [SMALL], *TWO),
        "a(bc)->ab {c:reduction=sum}",
        (Flow("sum", (0,)),),
    ),
    "max": (
        pool("reduce_window_max", [LARGE], [SMALL], *TWO),
        "a(bc)->ab {c:reduction=max}",
        (Flow("max", (0,)),),
    ),
    "min of the whole dimension": (
        pool("reduce_window_min", [LARGE], [(4, 1)], (1, 6), (1, 1)),
        "ab->a() {b:reduction=min}",
        (Flow("min", (0,)),),
    ),
    "overlap": (
        pool("reduce_window_max", [LARGE], [SMALL], (1, 3), (1, 2), ((0, 0), (0, 1))),
        "a(bc)->ab {b:window, c:blocked}",
        (Flow("max", (0,)),),
    ),
    "base dilated": (
        pool(
            "reduce_window_sum",
            [LARGE],
            [(4, 11)],
            (1, 1),
            (1, 1),
            base_dilation=(1, 2),
            window_dilation=(1, 1),
        ),
        "ab->ac {b:blocked, c:blocked}",
        (Flow("sum", (0,)),),
    ),
    "window dilated": (
        pool(
            "reduce_window_sum",
            [LARGE],
            [(4, 2)],
            (1, 2),
            (1, 3),
            base_dilation=(1, 1),
            window_dilation=(1, 2),
        ),
        "a(bc)->ab {c:blocked}",
        (Flow("sum", (0,)),),
    ),
    "any function": (
        pool("reduce_window", [LARGE, LARGE, (), ()], [SMALL, SMALL], *TWO),
        "a(bc),a(bc),,->ab,ab {c:blocked}",
        (),
    ),
    "tangent": (
        pool("select_and_gather_add", [LARGE, LARGE], [SMALL], *TWO),
        "a(bc),a(bc)->ab {c:blocked}",
        (Flow("sum", (0,)),),
    ),
    "cotangent": (
        pool("select_and_scatter_add", [SMALL, LARGE], [LARGE], *TWO),
        "ab,a(bc)->a(bc) {c:blocked}",
        (Flow("sum", (0,)),),
    ),
    "cotangent of overlap": (
        pool(
            "select_and_scatter_add",
            [SMALL, LARGE],
            [LARGE],
            (1, 3),
            (1, 2),
            ((0, 0), (0, 1)),
        ),
        "ab,a(bc)->a(bc) {b:window, c:blocked}",
        (Flow("sum", (0,)),),
    ),
    "scatter by any function": (
        pool("select_and_scatter", [LARGE, SMALL, ()], [LARGE], *TWO),
        "a(bc),ab,->a(bc) {c:blocked}",
        (),
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_pool(name):
    found, text, flows = POOLS[name]
    assert found.text == text
    assert found.flows == flows


HALOS = {
    "overlapping windows": (Halo(0, 1, 1),),
    "by stride 2": (Halo(0, 0, 1),),
    "gradient of stride 2": (Halo(0, 1, 0),),
    "gradient for the weight of overlapping windows": (Halo(0, 1, 1),),
    "gradient for the weight of stride 2": (Halo(0, 0, 1),),
    "overlap": (Halo(0, 0, 1),),
    "cotangent of overlap": (Halo(0, 1, 0), Halo(1, 2, 1)),
}


@pytest.mark.parametrize("name", HALOS)
def test_what_a_block_reads_of_its_neighbours(name):
    found = {**CONVOLUTIONS, **POOLS}[name][0]
    (factor,) = (f for f in found.factors if f.kind == WINDOW)
    assert factor.halos == HALOS[name]


def test_only_what_overlaps_has_a_halo():
    split = {**CONVOLUTIONS, **POOLS}
    others = [split[name][0] for name in split if name not in HALOS]
    assert not any(f.halos or f.kind == WINDOW for rule in others for f in rule.factors)
