"""Peak memory: by hand, and against the definition."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhino_jax.cost.buffers import unfold
from rhino_jax.cost.fusion import AGAIN, fusion
from rhino_jax.cost.habits import HABITS, Habits
from rhino_jax.cost.memory import Memory, memory
from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.factors import BLOCKED, PARALLEL, Choice, Factor, Rule
from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.ir.steps import ALL_GATHER, REDUCE_SCATTER, Move, Step
from rhino_jax.rules import rule_of
from tests.cost.plans import (
    EXAMPLES,
    LAYERS,
    ONE,
    WIDTH,
    by_role,
    f32,
    planned,
    program,
    traced_whole,
    trained,
    whole,
)

VECTOR = (256,)
KB = 1024  # bytes of a VECTOR of float32


def peak(
    of: Program, donated: tuple[int, ...] = (), habits: Habits = HABITS["cpu"]
) -> Memory:
    return memory(of, whole(of), ONE, rule_of, donated, habits)


def test_elementwise_values_with_one_reader_cost_nothing() -> None:
    # mystery -> sin -> cos -> mystery: of the two between only the second is there.
    ops = [("mystery", (0,), (1,)), ("sin", (1,), (2,)), ("cos", (2,), (3,))]
    found = peak(program([VECTOR] * 5, (0,), [*ops, ("mystery", (3,), (4,))], (4,)))
    # The input, and cos(sin(.)) in place of the first result; then it and the last.
    assert (found.peak_bytes, found.input_bytes) == (3 * KB, KB)
    assert (found.output_bytes, found.temp_bytes, found.op) == (KB, 2 * KB, 3)


def test_what_is_not_written_keeps_what_it_is_made_of() -> None:
    # sin(a) is read twice, far apart, but a can make it again: a is kept, not sin(a).
    ops = [
        ("mystery", (0,), (1,)),
        ("sin", (1,), (2,)),
        ("reduce_sum", (2,), (3,), (("axes", (0,)),)),
        ("mystery", (0,), (4,)),
        ("add", (2, 4), (5,)),
    ]
    of = program([VECTOR] * 3 + [()] + [VECTOR] * 2, (0,), ops, (3, 5))
    unfolded = unfold(of, whole(of), ONE, rule_of)
    fused = fusion(unfolded)
    assert not fused.written[unfolded.instructions[1].writes[0]]
    found = peak(of)
    assert found.peak_bytes == 3 * KB + 4  # input, a, the second mystery, the sum
    assert found.op == 3


def test_two_large_sources_are_written_once() -> None:
    # a + b has three readers: reading it is cheaper than reading a and b again.
    ops = [
        ("mystery", (0,), (1,)),
        ("mystery", (1,), (2,)),
        ("add", (1, 2), (3,)),
        ("mul", (3, 3), (4,)),
        ("mystery", (4,), (5,)),
        ("add", (3, 5), (6,)),
        ("sub", (3, 5), (7,)),
    ]
    of = program([VECTOR] * 8, (0,), ops, (6, 7))
    unfolded = unfold(of, whole(of), ONE, rule_of)
    written = fusion(unfolded).written
    assert [written[x.writes[0]] for x in unfolded.instructions] == [True] * 7
    ops = ops[:-2]
    of = program([VECTOR] * 8, (0,), ops, (5,))
    unfolded = unfold(of, whole(of), ONE, rule_of)
    assert not fusion(unfolded).written[unfolded.instructions[2].writes[0]]


def test_two_large_sources_of_two_readers_are_read_again() -> None:
    # As a residual sum and the mask of its relu: neither way moves less.
    ops = [
        ("mystery", (0,), (1,)),
        ("mystery", (1,), (2,)),
        ("add", (1, 2), (3,)),
        ("neg", (3,), (4,)),
        ("mystery", (4,), (5,)),
        ("add", (3, 5), (6,)),
    ]
    of = program([VECTOR] * 7, (0,), ops, (6,))
    unfolded = unfold(of, whole(of), ONE, rule_of)
    assert not fusion(unfolded).written[unfolded.instructions[2].writes[0]]


def test_what_one_kernel_reads_on_two_roads_is_not_written() -> None:
    # a * b is read twice, by what adds it to its own square: one kernel reads a and b.
    ops = [
        ("mystery", (0,), (1,)),
        ("mystery", (1,), (2,)),
        ("mul", (1, 2), (3,)),
        ("neg", (3,), (4,)),
        ("add", (3, 4), (5,)),
        ("sub", (3, 5), (6,)),
        ("mystery", (6,), (7,)),
    ]
    of = program([VECTOR] * 8, (0,), ops, (7,))
    unfolded = unfold(of, whole(of), ONE, rule_of)
    written = fusion(unfolded).written
    made = [written[x.writes[0]] for x in unfolded.instructions]
    assert made == [True, True, False, False, False, True, True]


def test_a_gpu_writes_over_nothing_in_a_kernel_that_also_sums() -> None:
    # The gradient of an activation, and of the bias below it.
    ops = [
        ("mystery", (0,), (1,)),
        ("mystery", (1,), (2,)),
        ("mul", (1, 2), (3,)),
        ("reduce_sum", (3,), (4,), (("axes", (0,)),)),
        ("mystery", (3,), (5,)),
    ]
    of = program([VECTOR] * 4 + [(), VECTOR], (0,), ops, (4, 5))
    plain = replace(HABITS["cuda"], workspace_bytes=0)
    apart = peak(of, (), plain).temp_bytes
    assert apart == 3 * KB  # both factors and the product
    assert peak(of, (), replace(plain, sums_beside=False)).temp_bytes < apart


def test_what_is_dear_is_made_once() -> None:
    # tanh(a) is read twice, and a is there: it is written all the same.
    ops = [
        ("mystery", (0,), (1,)),
        ("tanh", (1,), (2,)),
        ("neg", (2,), (3,)),
        ("mystery", (3,), (4,)),
        ("mul", (2, 4), (5,)),
    ]
    of = program([VECTOR] * 6, (0,), ops, (5,))
    unfolded = unfold(of, whole(of), ONE, rule_of)
    assert fusion(unfolded).written[unfolded.instructions[1].writes[0]]


@pytest.mark.parametrize(("donated", "vectors"), [((), 2), ((0,), 1)])
def test_an_output_takes_over_a_donated_input(
    donated: tuple[int, ...], vectors: int
) -> None:
    found = peak(program([VECTOR] * 2, (0,), [("sin", (0,), (1,))], (1,)), donated)
    assert found.peak_bytes == vectors * KB


def test_an_output_waits_for_the_last_reader_of_the_donated_input() -> None:
    largest = ("reduce_max", (2,), (3,), (("axes", (0,)),))
    ops = [("sin", (0,), (1,)), ("mystery", (0,), (2,)), largest]
    of = program([VECTOR] * 3 + [()], (0,), ops, (1, 3))
    # Input, its successor and the copy at once; without it they are one.
    assert peak(of, (0,)).peak_bytes == 3 * KB
    assert peak(of, (0,)).output_bytes == 4


ROWS = Layout.of((("d", 64),))
GATHERED = Layout.replicated(1)


def test_a_gathered_copy_lives_from_its_move_to_its_last_reader() -> None:
    mesh = Mesh.of(d=4)
    ops = [(1, 2), (0, 3), (3, 4), (2, 5)]
    made = [("mystery", (read,), (write,)) for read, write in ops]
    of = program([VECTOR] * 6, (0, 1), made, (4, 5))
    step = Step(ALL_GATHER, ("d",), ROWS, GATHERED, 768)
    gather = Move(0, ROWS, GATHERED, (step,))
    plain = whole(of)

    def placed(where: int) -> Assignment:
        plans = [OpPlan() for _ in of.ops]
        plans[where] = OpPlan(before=(gather,))
        return Assignment((ROWS, GATHERED), plain.outputs, tuple(plans))

    late = memory(of, placed(1), mesh, rule_of)
    early = memory(of, placed(0), mesh, rule_of)
    assert late.input_bytes == KB // 4 + KB
    # While it is read: the copy, the first op's result and its own; then without it
    # the same three. Two ops early it stands beside them all the way.
    assert (late.temp_bytes, late.op) == (3 * KB, 1)
    assert (early.temp_bytes, early.op) == (3 * KB, 1)
    plans = [OpPlan() for _ in of.ops]
    plans[0] = OpPlan(before=(gather,))
    ops = [Op("mystery", op.operands, op.results) for op in of.ops]
    ops[3] = Op("mystery", (0, 2), (5,))
    longer = Program(of.values, of.inputs, tuple(ops), of.outputs)
    held = Assignment((ROWS, GATHERED), plain.outputs, tuple(plans))
    assert memory(longer, held, mesh, rule_of).temp_bytes == 4 * KB


def test_full_gradients_wait_for_one_combined_reduce_scatter() -> None:
    mesh, count = Mesh.of(d=4), 5
    term = GATHERED.with_partial("d", "sum")
    scatter = Step(REDUCE_SCATTER, ("d",), term, ROWS, 768)
    grads, outs = range(1, 1 + count), range(1 + count, 1 + 2 * count)
    plans = [
        OpPlan(
            Choice.of({"k": [Split("d", 1)]}), (), (Move(g, term, ROWS, (scatter,)),)
        )
        for g in grads
    ]
    plans += [OpPlan(Choice.of({"x": [Split("d", 64)]}))] * count
    ops = [Op("made", (0,), (g,)) for g in grads]
    ops += [Op("kept", (g,), (o,)) for g, o in zip(grads, outs, strict=True)]
    values = tuple(Value(VECTOR, "float32") for _ in range(1 + 2 * count))
    of = Program(values, (0,), tuple(ops), tuple(outs))
    assignment = Assignment((GATHERED,), (ROWS,) * count, tuple(plans))

    def rules(program: Program, op: Op) -> Rule:
        loop = Factor("x", 256, PARALLEL if op.kind == "kept" else BLOCKED)
        terms = Factor("k", 4, "reduction", "sum")
        return Rule((terms, loop), ((("x",),),), ((("x",),),))

    def temp(shards: int) -> int:
        habits = Habits(combine_bytes=shards * KB // 4)
        return memory(of, assignment, mesh, rules, (), habits).temp_bytes

    shard = KB // 4
    assert temp(0) == KB + count * shard
    assert temp(2) == 2 * KB + 4 * shard  # two and two, the fifth alone
    assert temp(count) == count * KB + count * shard


def test_a_product_that_is_added_waits_for_the_other_term() -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        big = jnp.sort(x)  # what the product reads: 64 KiB
        made = big.T @ big  # 4 KiB
        return made + jnp.sort(jnp.sort(jnp.sort(w)))

    of, assignment = traced_whole(step, f32(512, 32), f32(32, 32))
    early = memory(of, assignment, ONE, rule_of)
    late = memory(of, assignment, ONE, rule_of, (), Habits(late_products=True))
    # The product beside what it read; then what it reads beside two sorts, or one and
    # the sum that is written over it.
    assert early.temp_bytes == 64 * KB + 4 * KB
    assert late.temp_bytes == 64 * KB + 2 * 4 * KB


def test_a_softmax_is_not_written_over_its_logits() -> None:
    def step(x: jax.Array) -> jax.Array:
        logits = jnp.sort(x)
        scaled = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
        return jnp.sort(scaled)

    of, assignment = traced_whole(step, f32(4, 64))
    row = 4 * 4  # the maxima
    # Logits, maxima and exponentials; a plain exp would be written over the logits.
    assert memory(of, assignment, ONE, rule_of).temp_bytes == 2 * KB + row
    plain, whole_plain = traced_whole(
        lambda x: jnp.sort(jnp.exp(jnp.sort(jnp.sort(x)))), f32(4, 64)
    )
    found = memory(plain, whole_plain, ONE, rule_of)
    assert (found.temp_bytes, plain.ops[found.op].kind) == (2 * KB, "sort")


def test_what_a_library_makes_is_not_written_over() -> None:
    # Compiled for an H100 with 8192 by 8192: 512 MiB of temporaries, not 256.
    def step(x: jax.Array, w: jax.Array, narrow: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w) @ narrow

    of, assignment = traced_whole(step, f32(16, 16), f32(16, 16), f32(16, 1))
    alone = memory(of, assignment, ONE, rule_of)
    pair = memory(of, assignment, ONE, rule_of, (), Habits(workspace_bytes=1))
    assert alone.temp_bytes == KB + 64  # tanh over its product; the result
    assert pair.temp_bytes == 2 * KB


# ---- loops and remat -------------------------------------------------------------


def test_a_scan_holds_its_stacks_and_what_its_body_holds() -> None:
    def step(carry: jax.Array, xs: jax.Array) -> object:
        def body(c: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            kept = jnp.sort(c)
            return jnp.sort(kept) + x, kept

        return jax.lax.scan(body, carry, xs)

    of, assignment = traced_whole(step, f32(256), f32(5, 256))
    found = memory(of, assignment, ONE, rule_of)
    # Inputs; the stack of results and the carry's successor; in the body two sorts,
    # the new carry being written over the old one.
    assert found.input_bytes == 6 * KB
    assert found.temp_bytes == 5 * KB + KB + 2 * KB
    assert of.ops[found.op].kind == "scan"


def test_a_stack_is_not_written_over_the_donated_one_it_is_made_of() -> None:
    # A cache by layer, as a decoding step has it: XLA keeps both while the scan runs.
    def step(cache: jax.Array, x: jax.Array) -> object:
        def body(x: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
            return x, jnp.sort(old) + x

        return jax.lax.scan(body, x, cache)

    of, assignment = traced_whole(step, f32(5, 256), f32(256))
    apart, taken = (
        memory(of, assignment, ONE, rule_of, donated) for donated in ((), (0,))
    )
    assert apart.temp_bytes == taken.temp_bytes >= 5 * KB


def test_a_remat_body_frees_what_it_makes() -> None:
    def step(x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jax.checkpoint(lambda x: jnp.sort(jnp.sort(x)))(x)
        return x

    of, assignment = traced_whole(step, f32(256))
    found = memory(of, assignment, ONE, rule_of)
    assert found.temp_bytes == 2 * KB
    assert memory(of, assignment, ONE, rule_of, (0,)).temp_bytes == 2 * KB


def test_a_while_loop_writes_its_carry_in_place() -> None:
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c[0] < 3.0, lambda c: jnp.sin(c), x)

    of, assignment = traced_whole(step, f32(256))
    assert memory(of, assignment, ONE, rule_of, (0,)).peak_bytes <= KB + 64


# ---- plans -------------------------------------------------------------------------


def test_zero_shards_the_state_and_more_devices_need_less() -> None:
    of, donated = trained().program, tuple(trained().donated)
    state = 2 * LAYERS * WIDTH * WIDTH * 4
    batch = 2 * EXAMPLES * WIDTH * 4
    peaks = []
    for devices in (2, 4, 8):
        mesh = Mesh.of(data=devices)
        found = memory(of, planned("zero3", mesh), mesh, rule_of, donated)
        assert found.input_bytes == (state + batch) // devices
        peaks.append(found.peak_bytes)
        more = memory(of, planned("data_parallel", mesh), mesh, rule_of, donated)
        assert more.input_bytes == state + batch // devices
        assert more.peak_bytes > found.peak_bytes
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3


def test_workspace_stands_beside_a_product() -> None:
    of = trained().program
    mesh = Mesh.of(data=2)
    plan = planned("data_parallel", mesh)
    plain = memory(of, plan, mesh, rule_of)
    more = memory(of, plan, mesh, rule_of, (), Habits(workspace_bytes=10**9))
    assert 10**9 < more.peak_bytes <= plain.peak_bytes + 10**9


def test_pads_of_ragged_shards_count() -> None:
    mesh = Mesh.of(d=4)
    of = program([(10,)] * 3, (0,), [("made", (0,), (1,)), ("sort", (1,), (2,))], (2,))
    split = Choice.of({"x": [Split("d", 3)]})
    ragged = Layout.of((("d", 3),))

    def rules(program: Program, op: Op) -> Rule:
        kind = PARALLEL if op.kind == "made" else BLOCKED
        return Rule((Factor("x", 10, kind),), ((("x",),),), ((("x",),),))

    cut = Step("slice", ("d",), Layout.replicated(1), ragged, 0)
    whole_again = Step(ALL_GATHER, ("d",), ragged, Layout.replicated(1), 36)
    plans = (
        OpPlan(
            split,
            (Move(0, Layout.replicated(1), ragged, (cut,)),),
            (Move(1, ragged, Layout.replicated(1), (whole_again,)),),
        ),
        OpPlan(),
    )
    found = memory(of, Assignment((GATHERED,), (GATHERED,), plans), mesh, rules)
    assert found.input_bytes == 40
    assert found.temp_bytes == max(3 * 4 + 40, 40 + 40)


# ---- against the definition ----------------------------------------------------------


@st.composite
def fused_and_opaque(draw: st.DrawFn) -> tuple[Program, tuple[int, ...]]:
    """Values of sizes that are all different, so that nothing is written in place."""
    count = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from(["fused", "tanh", "opaque"]), max_size=9))
    total = count + len(kinds)
    sizes = draw(
        st.lists(st.integers(1, 60), min_size=total, max_size=total, unique=True)
    )
    ops = []
    for n, kind in enumerate(kinds):
        known = st.integers(0, count + n - 1)
        reads = draw(st.lists(known, min_size=1, max_size=3))
        ops.append((kind, tuple(reads), (count + n,)))
    outputs = tuple(draw(st.lists(st.integers(0, total - 1), max_size=3)))
    shapes = [(size,) for size in sizes]
    return program(shapes, tuple(range(count)), ops, outputs), tuple(sizes)


def definition(of: Program, sizes: tuple[int, ...]) -> int:
    """The peak of temporaries, value by value and op by op."""
    maker = {op.results[0]: op for op in of.ops}

    def readers(value: int) -> list[Op]:
        return [op for op in of.ops if value in op.operands]

    def sources(value: int) -> set[int]:
        return {value} if written(value) else made_of(value)

    def made_of(value: int) -> set[int]:
        return {s for read in maker[value].operands for s in sources(read)}

    def demanded(value: int) -> bool:
        opaque = any(op.kind == "opaque" for op in readers(value))
        return value in of.outputs or opaque

    def kernels(value: int) -> set[int]:
        """What reads a value in the end, where all that read it are made on the way."""
        return {end(op.results[0]) for op in readers(value)}

    def end(value: int) -> int:
        on_the_way = maker[value].kind != "opaque" and not demanded(value)
        ends = kernels(value) if on_the_way else set()
        return ends.pop() if len(ends) == 1 else value

    def written(value: int) -> bool:
        if value not in maker or maker[value].kind == "opaque" or demanded(value):
            return True
        again, count = sum(sizes[s] for s in made_of(value)), len(kernels(value))
        most = AGAIN * sizes[value] * count
        dear = maker[value].kind == "tanh"
        return count > 1 and (dear or again * (count - 1) > most)

    def needed(index: int) -> set[int]:
        op = of.ops[index]
        if not written(op.results[0]):
            return set()
        return {s for read in op.operands for s in sources(read)}

    best = 0
    for index in range(len(of.ops)):
        made = {op.results[0] for op in of.ops[: index + 1]}
        later = set(of.outputs) | {of.ops[index].results[0]}
        for after in range(index, len(of.ops)):
            later |= needed(after)
        held = {v for v in made & later if written(v)}
        best = max(best, sum(sizes[v] for v in held))
    return 4 * best


@given(fused_and_opaque())
def test_the_peak_is_that_of_the_definition(
    drawn: tuple[Program, tuple[int, ...]],
) -> None:
    of, sizes = drawn
    found = memory(of, whole(of), ONE, by_role)
    assert found.temp_bytes == definition(of, sizes)
    assert found.peak_bytes == found.input_bytes + found.temp_bytes
