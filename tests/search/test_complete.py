"""The collectives of the plans that everyone knows, counted one by one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import pytest

from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program, Value
from rhino_jax.search.recipes import RECIPES, applies, completed, place
from rhino_jax.search.state import Marks, State
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
    subject_of,
    updated,
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
    # Two for the cotangents, and the router's gradient: exchanged tokens and results
    # are still there for the gradients of weights and gates.
    assert rest == {"all-to-all": 2, "all-reduce": 1}


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


def followed(step: Callable[..., Any], params: Any, recipe: str, **mesh: int) -> Made:
    """What following op by op makes of an accumulating step, without the search."""
    subject, grid = subject_of(step, state_of(params), BATCHES), Mesh.of(**mesh)
    placement = place(RECIPES[recipe], subject, grid)
    return Made(subject, grid, placement, completed(placement, subject, grid))


def whole_step(recipe: str) -> Counter[tuple[str, tuple[int, ...]]]:
    """What a step that accumulates the MLP's gradients may send, whatever the loop:
    each stack of gradients is reduced as one, behind it."""
    stacks = [(LAYERS, *UP), (LAYERS, *DOWN), HEAD]
    kind = "all-reduce" if recipe == "data_parallel" else "reduce-scatter"
    found = LOSS + Counter({(kind, shape): 1 for shape in stacks})
    if recipe == "zero1":
        found += Counter({("all-gather", shape): 1 for shape in stacks})
    if recipe == "zero3":  # layer by layer, in both passes of every microbatch
        turns = 2 * LAYERS * MICROBATCHES
        found += Counter({("all-gather", shape): turns for shape in (UP, DOWN)})
        found += Counter({("all-gather", HEAD): 1})
    return found


@pytest.mark.parametrize("recipe", ["zero1", "zero3", "data_parallel"])
def test_accumulated_gradients_of_stacked_layers_are_reduced_once(recipe: str) -> None:
    plan = followed(accumulated(mlp_loss, rows_inside), MLP_PARAMS, recipe, data=4)
    assert plan.written() == whole_step(recipe)


def test_stacked_gradients_that_are_not_added_up_are_scattered_one_by_one() -> None:
    """A loop without an accumulator around it holds no whole gradients."""

    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(mlp_loss)(state["params"], batch)
        return updated(state, jax.tree.map(lambda g: g / 2, grads)), {"loss": value}

    plan = made((step, state_of(MLP_PARAMS), MLP_BATCH), "zero1", data=4)
    written = plan.written()
    assert written["reduce-scatter", UP] == written["reduce-scatter", DOWN] == LAYERS


@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "more": 4}])
@pytest.mark.parametrize("recipe", ["zero1", "zero3", "data_parallel"])
def test_blocks_of_rows_keep_the_batch_split(recipe: str, mesh: dict[str, int]) -> None:
    """One exchange of rows (an axis) before the loop; then every device has its part of
    each microbatch.

    A split that falls on the microbatches (4 of 4), or across microbatches and rows.
    """
    plan = followed(accumulated(mlp_loss, rows_outside), MLP_PARAMS, recipe, **mesh)
    exchanged = Counter({("all-to-all", (32, WIDTH)): 2 * len(mesh)})  # of x and of y
    assert plan.written() == whole_step(recipe) + exchanged
    (loop,) = (p for p in plan.assignment.ops if p.inner)
    devices = math.prod(mesh.values())
    rows = loop.inner[0].inputs[-1]
    assert rows.local_shape((8, WIDTH), plan.mesh) == (8 // devices, WIDTH)


def test_rows_are_split_over_as_many_axes_as_divide_them() -> None:
    """24 rows divide by four devices, the 6 of a microbatch by two."""
    batch = {"x": f32(24, WIDTH), "y": f32(24, WIDTH)}
    step = accumulated(plain_loss, rows_outside)
    plan = made((step, state_of(PLAIN_PARAMS), batch), "data_parallel", data=2, more=2)
    (loop,) = (p for p in plan.assignment.ops if p.inner)
    assert str(loop.inner[0].inputs[-1]) == "[more/3,-]"
    assert {c.axes for c in plan.sent if c.kind == "all-reduce"} == {("more",)}


def test_microbatches_that_come_cut_are_split_by_rows() -> None:
    """``[microbatches, rows, ...]`` from outside: the recipe splits the first."""
    batch = {name: f32(MICROBATCHES, 8, WIDTH) for name in ("x", "y")}
    step = accumulated(plain_loss, lambda x: x)
    plan = made((step, state_of(PLAIN_PARAMS), batch), "data_parallel", data=4)
    assert plan.input("batch/x") == "[data/1,-,-]"
    exchanged = Counter({("all-to-all", (MICROBATCHES, 8, WIDTH)): 2})
    reduced = Counter({("all-reduce", shape): 1 for shape in (UP, DOWN)})
    assert plan.written() == exchanged + reduced + LOSS


def read_back(value: Layout, moved: Layout, *, batch: bool) -> list[tuple[str, ...]]:
    """The steps of reading one value as ``moved`` in the forward, then the backward
    pass."""
    program = Program((Value((8, 8), "float32"),), (0,), (), (0,))
    state = State(program, Mesh.of(data=4), {0: Marks(batch=batch)}, {})
    state.put(0, value)
    return [
        tuple(step.kind for move in state.read(0, moved, region) for step in move.steps)
        for region in ("forward", "backward")
    ]


def test_moved_activations_are_read_where_they_are() -> None:
    rows, columns = Layout.of([("data", 2)], ()), Layout.of((), [("data", 2)])
    assert read_back(rows, columns, batch=True) == [("all-to-all",), ()]


def test_what_was_gathered_is_gathered_again() -> None:
    """Kept for the backward pass, whole values would cost what the split saved."""
    rows, whole = Layout.of([("data", 2)], ()), Layout.replicated(2)
    twice = [("all-gather",)] * 2
    assert read_back(rows, whole, batch=True) == twice
    assert read_back(rows, whole, batch=False) == twice
    columns = Layout.of((), [("data", 2)])
    assert read_back(rows, columns, batch=False) == [("all-to-all",)] * 2


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
