"""A plan over devices and one over time made one: lawful, counted, priced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cost.ahead import CONVERT, LAY_OUT
from rhino_jax.cost.buffers import ACCUMULATE, FUSED, OPAQUE, Unfolded, unfold
from rhino_jax.cost.habits import HABITS
from rhino_jax.cost.memory import memory
from rhino_jax.cost.model import predict
from rhino_jax.cost.order import gradients_at_end
from rhino_jax.cost.reshard import route
from rhino_jax.ir.assignment import Assignment, OpPlan, boundary, live_ops, phases
from rhino_jax.ir.factors import choice_problems
from rhino_jax.ir.layout import Layout, parse_layout
from rhino_jax.ir.mesh import TIME, Mesh
from rhino_jax.ir.program import Program
from rhino_jax.ir.steps import ALL_GATHER, ALL_REDUCE, FREE, SLICE
from rhino_jax.plan import Plan, make_plan
from rhino_jax.rules import rule_of
from rhino_jax.search.choose import plan_recipe
from rhino_jax.search.collective_matmul import interleaved
from rhino_jax.search.microbatch import (
    Refusal,
    Timing,
    microbatched,
    rows_together,
    timed,
    timing,
)
from rhino_jax.search.subject import Subject
from tests.search.steps import (
    ATTENTION,
    BATCH,
    MLP,
    MLP_BATCH,
    MLP_PARAMS,
    WIDTH,
    f32,
    state_of,
    subject_of,
    with_momentum,
)

DATA = Mesh.of(data=8)
PAIR = Mesh.of(data=2, tensor=4)


def cut(
    step: tuple[Callable[..., Any], Any, Any],
    recipe: str = "data_parallel",
    mesh: Mesh = DATA,
    microbatches: int = 2,
) -> tuple[Subject, Assignment, Assignment, Mesh]:
    """A step's plan as a recipe makes it, and the same over microbatches."""
    subject = subject_of(*step)
    _, plain = plan_recipe(subject, mesh, recipe, {})
    found = microbatched(subject, plain, mesh, microbatches)
    assert not isinstance(found, Refusal), str(found)
    return subject, plain, *found


# ---- what leaves the loop -----------------------------------------------------------


def test_rows_that_do_not_divide_are_refused_with_both_numbers() -> None:
    subject = subject_of(*MLP)
    _, plain = plan_recipe(subject, DATA, "data_parallel", {})
    assert rows_together(subject, plain, DATA) == 2
    found = microbatched(subject, plain, DATA, 3)
    assert isinstance(found, Refusal)
    assert "3 microbatches" in str(found) and "the 2 examples" in str(found)


def test_tied_gradients_are_added_in_the_loop() -> None:
    """One accumulator for both gradients of a matrix that is used twice."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["w"].T) ** 2)

    subject, _, new, _ = cut(
        (with_momentum(loss), state_of({"w": f32(WIDTH, WIDTH)}), MLP_BATCH)
    )
    assert new.loop is not None
    summed = [m.value for m in new.loop.leave if m.steps and TIME in m.steps[0].axes]
    shapes = [subject.program.values[v].shape for v in summed]
    assert shapes.count((WIDTH, WIDTH)) == 1, shapes


def test_a_narrow_gradient_that_is_widened_is_accumulated_wide() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        w = params["w"].astype(jnp.bfloat16)
        y = batch["x"].astype(jnp.bfloat16) @ w
        return jnp.mean(y.astype(jnp.float32) ** 2)

    subject, _, new, _ = cut(
        (with_momentum(loss), state_of({"w": f32(WIDTH, WIDTH)}), MLP_BATCH)
    )
    assert new.loop is not None
    dtypes = {
        subject.program.values[m.value].dtype
        for m in new.loop.leave
        if subject.program.values[m.value].shape
    }
    assert dtypes == {"float32"}


def test_what_nothing_depends_on_is_neither_judged_nor_run() -> None:
    """The derivative of a metric that nobody differentiates compares with its max."""

    def loss(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        h = batch["x"] @ params["w"]
        return jnp.mean(h**2), jnp.max(h)

    def step(params: Any, batch: Any) -> Any:
        (_, largest), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return jax.tree.map(lambda p, g: p - g, params, grads), largest

    subject, _, new, _ = cut((step, {"w": f32(WIDTH, WIDTH)}, MLP_BATCH))
    program = subject.program
    assert new.loop is not None
    dead = [i for i, op in enumerate(program.ops) if op.kind == "eq"]
    assert dead and live_ops(program).isdisjoint(dead)
    assert set(dead).isdisjoint(chain(*phases(program, new.loop.ops)))
    assert all(new.ops[i] == OpPlan() for i in dead)


TIMED = Mesh.of(data=4, time=4)


@pytest.mark.parametrize(
    ("source", "target", "steps"),
    [
        # A sum is accumulated first, whatever is done with it next.
        (
            "[-]+sum(data)+sum(time)",
            "[data/4]",
            [("all-reduce", ("time",), 0), ("reduce-scatter", ("data",), 48)],
        ),
        (
            "[-]+sum(data)+sum(time)",
            "[-]",
            [("all-reduce", ("time",), 0), ("all-reduce", ("data",), 96)],
        ),
        # Rows: kept, put together again, never traded for others.
        ("[-]", "[time/4]", [("slice", ("time",), 0)]),
        ("[data/4.time/1]", "[data/4]", [("all-gather", ("time",), 0)]),
        (
            "[data/4]",
            "[time/4]",
            [("all-gather", ("data",), 48), ("slice", ("time",), 0)],
        ),
    ],
)
def test_steps_over_time_are_alone_and_free_and_sums_end_first(
    source: str, target: str, steps: list[tuple[str, tuple[str, ...], int]]
) -> None:
    found = route((16,), "float32", parse_layout(source), parse_layout(target), TIMED)
    assert [(s.kind, s.axes, s.wire_bytes) for s in found] == steps


# ---- the plan -----------------------------------------------------------------------


def lawful(program: Program, assignment: Assignment, mesh: Mesh, inside: bool) -> None:
    """Layouts fit, choices can be carried out, and between turns nothing moves."""
    for layout, v in zip(
        (*assignment.inputs, *assignment.outputs),
        (*program.inputs, *program.outputs),
        strict=True,
    ):
        assert not layout.problems(program.values[v].shape, mesh)
    loop = set(assignment.loop.ops) if assignment.loop else set()
    for index, (op, plan) in enumerate(zip(program.ops, assignment.ops, strict=True)):
        rule = None if op.programs else rule_of(program, op)
        if rule is not None:
            assert not choice_problems(rule, plan.choice, mesh), op
        turning = inside or index in loop
        wanted, given = boundary(program, op, plan, rule)
        for move in (*plan.before, *plan.after):
            for step in move.steps:
                if TIME in step.axes:
                    assert turning and step.axes == (TIME,) and step.kind in FREE
        if not turning:
            assert all(TIME not in x.axes for x in (*wanted, *given))
        for body, inner in zip(op.programs, plan.inner, strict=True):
            lawful(body, inner, mesh, turning)


@pytest.mark.parametrize("step", [MLP, ATTENTION], ids=["mlp", "attention"])
@pytest.mark.parametrize(
    ("recipe", "mesh", "microbatches"),
    [("data_parallel", DATA, 2), ("zero3", DATA, 2), ("megatron", PAIR, 4)],
)
def test_plans_are_lawful(
    step: Any, recipe: str, mesh: Mesh, microbatches: int
) -> None:
    subject, plain, new, wide = cut(step, recipe, mesh, microbatches)
    assert wide.names == (*mesh.names, TIME) and wide.size(TIME) == microbatches
    assert new.over(mesh) == wide == new.over(wide)
    assert (new.inputs, new.outputs) == (plain.inputs, plain.outputs)
    lawful(subject.program, new, wide, False)


def test_values_leave_the_loop_for_nothing() -> None:
    _, _, new, _ = cut(MLP, "zero1")
    assert new.loop is not None
    over_time = [s for m in new.loop.leave for s in m.steps if TIME in s.axes]
    assert over_time and all(
        s.axes == (TIME,) and s.kind in (ALL_REDUCE, ALL_GATHER) and not s.wire_bytes
        for s in over_time
    )


def sent(
    recipe: str, microbatches: int, mesh: Mesh = DATA
) -> dict[str, tuple[int, int]]:
    """kind -> (bytes in a step as planned, and over microbatches)."""
    subject, plain, new, wide = cut(MLP, recipe, mesh, microbatches)
    total: dict[str, list[int]] = {}
    for n, (assignment, grid) in enumerate(((plain, mesh), (new, wide))):
        plan = make_plan(
            subject.program, assignment, grid, subject.input_paths, subject.output_paths
        )
        for c in plan.collectives:
            total.setdefault(c.kind, [0, 0])[n] += c.total_bytes
    return {kind: (a, b) for kind, (a, b) in total.items()}


def test_gradients_are_reduced_once_a_step() -> None:
    for recipe, kind in (("data_parallel", "all-reduce"), ("zero1", "reduce-scatter")):
        before, after = sent(recipe, 2)[kind]
        assert before == after, recipe


def test_weights_are_gathered_once_a_microbatch() -> None:
    found = sent("zero3", 2)
    before, after = found["reduce-scatter"]
    assert before == after
    before, after = found["all-gather"]
    assert after == 2 * before


def test_activations_are_reduced_once_a_microbatch_at_its_size() -> None:
    """Megatron's all-reduces: as many bytes in all, in more messages."""
    mesh = Mesh.of(data=2, tensor=4)
    subject, plain, new, wide = cut(MLP, "megatron", mesh, 4)
    counts, sizes = [], []
    for assignment, grid in ((plain, mesh), (new, wide)):
        plan = make_plan(
            subject.program, assignment, grid, subject.input_paths, subject.output_paths
        )
        found = [c for c in plan.collectives if c.axes == ("tensor",)]
        counts.append(sum(c.count for c in found if c.shape == (BATCH, WIDTH)))
        sizes.append(sum(c.total_bytes for c in found if c.shape == (BATCH, WIDTH)))
    assert counts[1] == 4 * counts[0] > 0
    assert sizes[1] == sizes[0]


def test_one_microbatch_is_no_change_of_bytes() -> None:
    before, after = sent("data_parallel", 1)["all-reduce"]
    assert before == after


def test_smaller_blocks_where_ops_split_examples_further() -> None:
    """Rows that another axis takes inside the step lie outside the time digit."""
    mesh = Mesh.of(data=4, more=2)
    subject = subject_of(*MLP)
    rows = {p: (("data",),) for p in subject.input_paths if p.startswith("batch")}
    pins = {**rows, "hidden": (("data", "more"),)}
    _, plain = plan_recipe(subject, mesh, "data_parallel", pins)
    assert rows_together(subject, plain, mesh) == 4
    coarse = timing(subject, 4, 2)
    assert isinstance(coarse, Timing)
    clash = timed(subject, plain, mesh, coarse)
    assert isinstance(clash, Refusal) and "microbatches do not fit" in str(clash)
    found = microbatched(subject, plain, mesh, 2)
    assert not isinstance(found, Refusal)
    lawful(subject.program, *found, False)
    # Of four rows a device, two a turn, but only one to a device on both axes.
    assert isinstance(microbatched(subject, plain, mesh, 4), Refusal)


def test_plans_go_through_json() -> None:
    subject, _, new, _ = cut(MLP, "zero3")
    plan = make_plan(
        subject.program,
        new,
        DATA,
        subject.input_paths,
        subject.output_paths,
        microbatches=2,
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.assignment.loop == new.loop
    dropped = replace(plan, assignment=replace(new, loop=None))
    assert Plan.from_json(dropped.to_json()) == dropped != plan


# ---- what it costs ------------------------------------------------------------------


def wide_step() -> tuple[Callable[..., Any], Any, Any]:
    """Activations that are many times the parameters."""

    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.mean((x - batch["y"]) ** 2)

    params = {f"w{i}": f32(32, 32) for i in range(4)}
    batch = {"x": f32(1024, 32), "y": f32(1024, 32)}
    return with_momentum(loss), state_of(params), batch


def test_the_loop_holds_the_activations_of_one_microbatch() -> None:
    mesh = Mesh.of(data=2)
    peaks = {}
    for m in (1, 2, 4, 8):
        subject, plain, new, wide = cut(wide_step(), "data_parallel", mesh, m)
        assignment = plain if m == 1 else new
        peaks[m] = memory(subject.program, assignment, wide, rule_of).temp_bytes
    accumulators = 4 * 32 * 32 * 4
    assert peaks[1] > peaks[2] > peaks[4] > peaks[8] > accumulators
    # Halved but for the accumulators and what else does not grow with the batch.
    assert peaks[8] - accumulators < peaks[1] / 4


def test_the_arithmetic_is_the_same_and_collectives_are_counted_alike() -> None:
    cluster = parse_cluster("h100:1x8")
    subject, plain, new, wide = cut(MLP, "zero3")
    before = predict(subject.program, plain, DATA, cluster, rule_of)
    after = predict(subject.program, new, wide, cluster, rule_of)
    assert before.flops == after.flops > 0
    plan = make_plan(
        subject.program, new, wide, subject.input_paths, subject.output_paths
    )
    assert after.wire_bytes == plan.wire_bytes
    assert predict(subject.program, new, DATA, cluster, rule_of) == after


def test_accumulators_of_narrow_gradients_are_wide() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    def narrow(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    step = (
        with_momentum(loss),
        state_of({"w": narrow(256, 256)}),
        {"x": narrow(16, 256)},
    )
    subject, _, new, wide = cut(step)
    found = memory(subject.program, new, wide, rule_of)
    held = dict(found.at_peak)
    assert 256 * 256 * 4 in held.values(), held


def layouts_of(assignment: Assignment) -> list[Layout]:
    return [*assignment.inputs, *assignment.outputs]


def test_a_step_of_momentum_leaves_state_where_it_was() -> None:
    """The rewritten plan takes and gives what the plain one does: no time digit."""
    _, plain, new, _ = cut(
        (with_momentum(normal_loss), state_of(MLP_PARAMS), MLP_BATCH), "zero1"
    )
    assert layouts_of(new) == layouts_of(plain)
    assert all(TIME not in x.axes for x in layouts_of(new))


def normal_loss(params: Any, batch: Any) -> jax.Array:
    h = jnp.tanh(batch["x"] @ params["layers"]["up"][0])
    return jnp.mean((h @ params["layers"]["down"][0] @ params["head"]) ** 2)


def looked_up() -> tuple[Callable[..., Any], Any, Any]:
    """A float32 table whose rows are converted once they are looked up."""
    table = jax.ShapeDtypeStruct((1024, WIDTH), jnp.float32)
    weight = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)

    def loss(params: Any, batch: Any) -> jax.Array:
        rows = params["table"][batch["ids"]].astype(jnp.bfloat16)
        return jnp.sum(jnp.square(rows @ params["w"]).astype(jnp.float32))

    params = {"table": table, "w": weight}
    return with_momentum(loss), state_of(params), {"ids": ids}


def unfolded_loop(
    step: tuple[Callable[..., Any], Any, Any], platform: str, recipe: str
) -> Unfolded:
    subject, _, assignment, mesh = cut(step, recipe)
    return unfold(subject.program, assignment, mesh, rule_of, (), HABITS[platform])


@pytest.mark.parametrize(("platform", "ahead"), [("tpu", True), ("cuda", False)])
def test_a_tpu_converts_tables_ahead_of_the_loop(platform: str, ahead: bool) -> None:
    found = unfolded_loop(looked_up(), platform, "data_parallel")
    (loop,) = [x for x in found.instructions if x.kind == ACCUMULATE]
    copies = [
        found.buffers[buffer]
        for buffer in loop.reads
        if found.writer[buffer] >= 0
        and found.instructions[found.writer[buffer]].kind == CONVERT
    ]
    assert [x.num_bytes for x in copies] == [1024 * WIDTH * 2] * ahead


def looked_at() -> tuple[Callable[..., Any], Any, Any]:
    """Rows of a few features, converted for a product."""
    weight = jax.ShapeDtypeStruct((6, WIDTH), jnp.bfloat16)

    def loss(params: Any, batch: Any) -> jax.Array:
        made = batch["features"].astype(jnp.bfloat16) @ params["w"]
        return jnp.sum(jnp.square(made).astype(jnp.float32))

    batch = {"features": jax.ShapeDtypeStruct((8192, 6), jnp.float32)}
    return with_momentum(loss), state_of({"w": weight}), batch


@pytest.mark.parametrize(("platform", "ahead"), [("tpu", True), ("cuda", False)])
def test_a_tpu_converts_a_batch_ahead_of_the_loop(platform: str, ahead: bool) -> None:
    # 1,024 rows a device in two turns: tiles have them as lanes and their 6 features as
    # 8 rows. Laid out anew, those of a turn lie in a row of each tile.
    found = unfolded_loop(looked_at(), platform, "data_parallel")
    (loop,) = [x for x in found.instructions if x.kind == ACCUMULATE]
    copies = [
        (found.instructions[found.writer[buffer]].kind, found.buffers[buffer].num_bytes)
        for buffer in loop.reads
        if found.writer[buffer] >= 0
    ]
    made = [x for x in copies if x[0] in (CONVERT, LAY_OUT)]
    narrow_bytes = 1024 * 8 * 2
    wanted = [(CONVERT, narrow_bytes), (LAY_OUT, narrow_bytes)]
    assert made == wanted * ahead
    (body,) = loop.bodies
    parts = [x for x in body.instructions if x.kind == SLICE and x.step]
    assert [x.role for x in parts] == [OPAQUE if ahead else FUSED]
    if ahead:  # one row of bfloat16 is stored as a pair
        (part,) = parts[0].writes
        assert body.buffers[part].num_bytes == 2 * narrow_bytes // 2


def test_products_that_are_added_up_wait_where_the_loop_moves_anything() -> None:
    late = {}
    for recipe in ("data_parallel", "zero3"):
        found = unfolded_loop(wide_step(), "cuda", recipe)
        (loop,) = [x for x in found.instructions if x.kind == ACCUMULATE]
        (body,) = loop.bodies
        moves = any(x.step and x.step.kind not in FREE for x in body.instructions)
        late[recipe] = moves, bool(gradients_at_end(body))
    assert late["data_parallel"] == (False, False)
    assert late["zero3"] == (True, True)


def test_collective_matmul_looks_into_the_loop() -> None:
    subject, _, assignment, _ = cut(wide_step(), "zero3")
    found = interleaved(subject.program, assignment, DATA, parse_cluster("h100:1x8"))
    assert found.loop == assignment.loop
