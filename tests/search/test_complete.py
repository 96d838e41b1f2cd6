"""The collectives of the plans that everyone knows, counted one by one."""

from __future__ import annotations

from collections import Counter

import pytest

from rhino_jax.search.recipes import RECIPES, applies
from tests.search import steps
from tests.search.steps import (
    ATTENTION,
    BATCH,
    EXPERTS,
    HIDDEN,
    LAYERS,
    MICROBATCHES,
    MLP,
    MLP_BATCH,
    MLP_PARAMS,
    MOE,
    PLAIN_PARAMS,
    WIDTH,
    Made,
    accumulated,
    f32,
    made,
    mlp_loss,
    plain_loss,
    rows_inside,
    rows_outside,
    state_of,
)

UP, DOWN, HEAD = (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, WIDTH)
ACTIVATION = (BATCH, WIDTH)
PER_MATRIX = {UP: LAYERS, DOWN: LAYERS, HEAD: 1}


def each(kind: str, times: int = 1) -> Counter[tuple[str, tuple[int, ...]]]:
    """``kind`` for every matrix of the MLP, per layer of the scan."""
    return Counter({(kind, shape): n * times for shape, n in PER_MATRIX.items()})


LOSS: Counter[tuple[str, tuple[int, ...]]] = Counter({("all-reduce", ()): 1})


def test_data_parallel_is_one_all_reduce_a_parameter_and_the_loss() -> None:
    plan = made(MLP, "data_parallel", data=4)
    assert plan.written() == each("all-reduce") + LOSS
    assert plan.input("batch/x") == f"[data/{BATCH // 4},-]"
    gradients = sum(c.total_bytes for c in plan.sent if c.shape)
    count = LAYERS * 2 * WIDTH * HIDDEN + WIDTH * WIDTH
    assert gradients == 2 * 4 * count * 3 // 4


def test_two_data_axes_are_reduced_at_once() -> None:
    plan = made(MLP, "data_parallel", pod=2, data=2)
    assert plan.written() == each("all-reduce") + LOSS
    assert {c.axes for c in plan.sent} == {("pod", "data")}


def test_zero1_scatters_gradients_and_gathers_parameters_once() -> None:
    """The updated stack of layers is gathered as one."""
    plan = made(MLP, "zero1", data=4)
    gathers = {(LAYERS, *UP): 1, (LAYERS, *DOWN): 1, HEAD: 1}
    assert plan.written() == each("reduce-scatter") + LOSS + Counter(
        {("all-gather", shape): n for shape, n in gathers.items()}
    )
    assert plan.input("state/params/head") == "[-,-]"
    assert plan.input("state/slots/head") == "[data/2,-]"


def test_zero3_gathers_in_both_passes_and_scatters_once() -> None:
    plan = made(MLP, "zero3", data=4)
    assert plan.written() == each("all-gather", 2) + each("reduce-scatter") + LOSS
    again = [
        move.again for move in _all_moves(plan) if move.steps[0].kind == "all-gather"
    ]
    # The head; the matrices of a layer are read once in each of the loops' bodies.
    assert Counter(again) == {False: 5, True: 1}
    assert plan.input("state/params/layers/up") == plan.input("state/slots/layers/up")
    assert plan.input("state/params/layers/up").startswith("[-,")


def _all_moves(plan: Made) -> list:
    found = []

    def walk(assignment) -> None:
        found.extend(assignment.moves())
        for op in assignment.ops:
            for inner in op.inner:
                walk(inner)

    walk(plan.assignment)
    return [move for move in found if move.steps]


def test_megatron_reduces_once_per_pair_in_each_pass() -> None:
    plan = made(MLP, "megatron", data=2, tensor=4)
    assert plan.input("state/params/layers/up") == f"[-,-,tensor/{HIDDEN // 4}]"
    assert plan.input("state/params/layers/down") == f"[-,tensor/{HIDDEN // 4},-]"
    tensor = Counter(
        {
            c.shape: sum(o.count for o in plan.sent if _same(o, c))
            for c in plan.sent
            if c.axes == ("tensor",)
        }
    )
    # Forward and backward of each pair, and the backward of the head.
    assert tensor == {ACTIVATION: 2 * LAYERS + 1}
    data = {c.shape: c.count for c in plan.sent if c.axes == ("data",)}
    assert data == PER_MATRIX
    assert set(plan.counts()) == {"all-reduce"}


def _same(a, b) -> bool:
    return (a.shape, a.axes) == (b.shape, b.axes)


def test_zero3_over_data_and_megatron_over_tensor_do_not_meet() -> None:
    plan = made(MLP, "zero3 x megatron", data=2, tensor=4)
    by_kind = {(c.kind, c.axes) for c in plan.sent if c.shape}
    assert by_kind == {
        ("all-gather", ("data",)),
        ("reduce-scatter", ("data",)),
        ("all-reduce", ("tensor",)),
    }
    written = plan.written()
    del written["all-reduce", ()]
    assert written == each("all-gather", 2) + each("reduce-scatter") + Counter(
        {("all-reduce", ACTIVATION): 2 * LAYERS + 1}
    )


def test_a_fused_projection_is_used_strided() -> None:
    """Stored in blocks and moved once there, its gradient once back; the activations
    between the column and the row never move."""
    plan = made(ATTENTION, "megatron", data=2, tensor=4)
    fused = (WIDTH, 3 * WIDTH)
    moved = [c for c in plan.sent if c.kind == "all-to-all"]
    assert [(c.shape, c.axes) for c in moved] == [(fused, ("tensor",))] * 2
    uses = {str(m.target) for m in _all_moves(plan) if m.steps[0].kind == "all-to-all"}
    assert "[-,tensor/2]" in uses  # a head of each third: 3 × 4 heads × 2
    tensor = [c for c in plan.sent if c.kind == "all-reduce" and "tensor" in c.axes]
    assert [c.shape for c in tensor] == [(BATCH, 6, WIDTH)]


def test_experts_exchange_tokens_and_nothing_else() -> None:
    plan = made(MOE, "expert", data=4)
    assert plan.input("state/params/up") == "[data/1,-,-]"
    assert plan.input("state/slots/down") == "[data/1,-,-]"
    assert plan.input("state/params/router") == "[-,-]"
    forward = [c for c in plan.sent if c.phase and "transpose(" not in c.phase]
    assert [c.kind for c in forward] == ["all-to-all", "all-to-all", "all-reduce"]
    assert forward[0].shape == (EXPERTS, BATCH, steps.CAPACITY, WIDTH)
    rest = Counter(c.kind for c in plan.sent) - Counter(c.kind for c in forward)
    # Two for the cotangents; the tokens and the results go again for the gradients
    # of weights and gates.
    assert set(rest) == {"all-to-all", "all-reduce"}
    assert 2 <= rest["all-to-all"] <= 4
    assert rest["all-reduce"] == 1  # the router's gradient


BATCHES = {"x": f32(32, WIDTH), "y": f32(32, WIDTH)}


@pytest.mark.parametrize("recipe", ["zero1", "zero3", "data_parallel"])
def test_accumulated_gradients_are_reduced_once_after_the_loop(recipe: str) -> None:
    step = accumulated(plain_loss, rows_inside)
    plan = made((step, state_of(PLAIN_PARAMS), BATCHES), recipe, data=4)
    kind = "all-reduce" if recipe == "data_parallel" else "reduce-scatter"
    written = plan.written()
    assert written[kind, UP] == written[kind, DOWN] == 1
    inside = {c.kind for c in plan.sent if c.count == MICROBATCHES and c.shape}
    assert inside <= ({"all-gather"} if recipe == "zero3" else set())
    assert plan.input("batch/x") == "[data/8,-]"


@pytest.mark.parametrize("recipe", ["zero1", "zero3", "data_parallel"])
def test_accumulated_gradients_of_stacked_layers_are_reduced_once(recipe: str) -> None:
    step = accumulated(mlp_loss, rows_inside)
    plan = made((step, state_of(MLP_PARAMS), BATCHES), recipe, data=4)
    reduced = [c for c in plan.sent if c.kind != "all-gather" and c.shape]
    assert reduced and max(c.count for c in reduced) <= LAYERS


@pytest.mark.xfail(strict=True, reason="a scanned dimension leaves its axes: no split")
def test_blocks_of_rows_keep_the_batch_split() -> None:
    """One exchange of rows before the loop, then every device has its part of each."""
    step = accumulated(plain_loss, rows_outside)
    plan = made((step, state_of(PLAIN_PARAMS), BATCHES), "data_parallel", data=4)
    assert plan.written()["all-reduce", UP] == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_device_sends_nothing(recipe: str) -> None:
    plan = made(MLP, recipe, data=1, tensor=1)
    assert plan.sent == ()


def test_a_batch_that_does_not_divide_stays_whole() -> None:
    fun, state, _ = MLP
    odd = {"x": f32(9, WIDTH), "y": f32(9, WIDTH)}
    plan = made((fun, state, odd), "data_parallel", data=4)
    assert plan.input("batch/x") == "[-,-]"
    assert plan.sent == ()
    part = made((fun, state, MLP_BATCH), "data_parallel", pod=3, data=4)
    assert part.input("batch/x") == "[data/4,-]"


def test_recipes_apply_where_they_find_something() -> None:
    found = made(MLP, "data_parallel", data=2, tensor=2)
    names = {n for n, r in RECIPES.items() if applies(r, found.subject, found.mesh)}
    assert names == set(RECIPES) - {"expert"}
    experts = made(MOE, "expert", data=4)
    assert applies(RECIPES["expert"], experts.subject, experts.mesh)
    assert not applies(RECIPES["zero3 x megatron"], experts.subject, experts.mesh)
