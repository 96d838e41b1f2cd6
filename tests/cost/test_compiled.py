"""What a compiler is expected to make of a plan: gaps, and what it recomputes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.cost.buffers import unfold
from rhino_jax.cost.compiled import Compiled, compiled
from rhino_jax.cost.fusion import fusion
from rhino_jax.cost.habits import HABITS, Habits
from rhino_jax.cost.memory import Held, memory_of
from rhino_jax.cost.placement import peak_bytes
from rhino_jax.cost.recompute import in_order, recomputed
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.rules import rule_of
from tests.cost.plans import (
    LAYERS,
    ONE,
    f32,
    planned,
    program,
    traced_whole,
    trained,
    whole,
)

VECTOR, KB = (256,), 1024
RECOMPUTES = replace(HABITS["cpu"], recomputes=(1.0, 1.0))


def held(of: Program, habits: Habits = RECOMPUTES) -> Held:
    unfolded = unfold(of, whole(of), ONE, rule_of, (), habits)
    return Held(unfolded, fusion(unfolded, habits), habits)


def expected(of: Program, device_bytes: int, habits: Habits = RECOMPUTES) -> Compiled:
    one = held(of, habits)
    return compiled(one, memory_of(one), habits, device_bytes)


def saved(count: int) -> Program:
    """``tanh`` of each of ``count`` results, read at once and again at the end.

    What each is made of stands all along, so that it can be made again.
    """
    ops: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    last, made = 0, []
    for _ in range(count):
        first = 1 + len(ops)
        ops += [
            ("mystery", (last,), (first,)),
            ("tanh", (first,), (first + 1,)),
            ("mystery", (first + 1,), (first + 2,)),
        ]
        made += [first, first + 1]
        last = first + 2
    for value in reversed(made):
        ops.append(("mystery", (last, value), (1 + len(ops),)))
        last = len(ops)
    return program([VECTOR] * (len(ops) + 1), (0,), ops, (last,))


def test_with_room_nothing_is_recomputed() -> None:
    of = saved(4)
    peak = memory_of(held(of)).peak_bytes
    found = expected(of, 10 * peak)
    assert (found.peak_bytes, found.recomputed) == (peak, 0)
    assert found.placed_bytes == found.needed_bytes >= peak


def test_above_the_limit_what_can_be_made_again_is() -> None:
    of = saved(4)
    written = memory_of(held(of)).peak_bytes
    found = expected(of, written - KB)
    assert found.recomputed >= 1
    assert found.peak_bytes <= written - KB
    assert found.placed_bytes >= written  # the program itself has not changed


def test_less_room_is_no_more_memory_and_no_fewer_repetitions() -> None:
    of = saved(6)
    written = memory_of(held(of)).peak_bytes
    found = [expected(of, written - n * KB) for n in range(8)]
    assert [one.recomputed for one in found] == sorted(one.recomputed for one in found)
    assert [-one.peak_bytes for one in found] == sorted(-x.peak_bytes for x in found)
    assert found[-1].recomputed == found[-2].recomputed  # all that can be made again
    assert found[-1].peak_bytes > written - 7 * KB


def test_a_compiler_that_never_recomputes_leaves_the_program() -> None:
    of = saved(4)
    found = expected(of, KB, HABITS["cpu"])
    assert found.peak_bytes == memory_of(held(of)).peak_bytes and not found.recomputed


def test_stays_of_one_buffer_do_not_overlap_and_serve_every_reader() -> None:
    one = held(saved(6))
    found = recomputed(one, one.peak_bytes - 4 * KB)
    assert found.count > 1
    for buffer in one.born:
        stays = sorted((s.first, s.last) for s in found.stands if s.buffer == buffer)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(stays))
        for use in one.lives.uses.get(buffer, ()):
            place = found.order.index(use)
            assert any(first <= place <= last for first, last in stays)
        for source in {
            s for x in found.stands if x.buffer == buffer for s in x.sources
        }:
            assert source in one.unfolded.inputs or source in one.born


def test_a_repetition_runs_before_what_next_reads_its_source() -> None:
    # 2 = tanh(1) is read at once and at the end, 1 last by op 4: 2 is made again there.
    ops = [
        ("mystery", (0,), (1,)),
        ("tanh", (1,), (2,)),
        ("mystery", (2,), (3,)),
        ("mystery", (3,), (4,)),
        ("mystery", (4, 1), (5,)),
        ("mystery", (5,), (6,)),
        ("mystery", (6, 2), (7,)),
    ]
    one = held(program([VECTOR] * 8, (0,), ops, (7,)))
    assert one.peak_bytes == 4 * KB  # 1, 2, 3 and 4, during op 3
    found = recomputed(one, 3 * KB)
    again = sorted((s.first, s.last) for s in found.stands if s.buffer == 2)
    assert again == [(1, 2), (4, 6)]
    assert [s.last for s in found.stands if s.buffer == 1] == [4]


@pytest.mark.parametrize(
    ("platform", "weight_shape", "repeated"),
    [
        ("tpu", (128, 512), 1),
        ("tpu", (8, 128, 512), 0),  # a matrix of its own for each
        ("cuda", (128, 512), 0),  # a library's
    ],
)
def test_a_tpu_repeats_products_of_two_matrices(
    platform: str, weight_shape: tuple[int, ...], repeated: int
) -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        wide = x @ w
        found = jnp.sort(wide)
        for _ in range(2):
            found = jnp.sort(-jnp.sort(found))
        return jnp.sort(found * wide)

    of, _ = traced_whole(step, f32(8, 16, 128), f32(*weight_shape))
    assert recomputed(held(of, HABITS[platform]), 1).count == repeated


def test_gradients_that_run_last_run_one_after_the_other() -> None:
    mesh, habits = Mesh.of(data=4), HABITS["cuda"]
    of, assignment = trained().program, planned("data_parallel", mesh)
    unfolded = unfold(of, assignment, mesh, rule_of, (), habits)
    one = Held(unfolded, fusion(unfolded, habits), habits)
    order = in_order(one)
    assert sorted(order) == list(range(len(unfolded.instructions)))
    products = [i for i in order if unfolded.instructions[i].kind == "dot_general"]
    assert products[-LAYERS:] == [i for i in products if i in one.lives.runs]


@pytest.mark.parametrize("recipe", ["data_parallel", "zero3"])
@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_spans_tell_the_same_peak(recipe: str, platform: str) -> None:
    mesh, habits = Mesh.of(data=4), HABITS[platform]
    assignment = planned(recipe, mesh)
    donated = tuple(trained().donated)
    of = trained().program
    unfolded = unfold(of, assignment, mesh, rule_of, donated, habits)
    one = Held(unfolded, fusion(unfolded, habits), habits)
    assert peak_bytes(list(one.spans())) == one.peak_bytes


def test_only_doubt_is_looked_into_for_a_limit() -> None:
    one = held(saved(4))
    memory = memory_of(one)
    top = memory.peak_bytes
    for limit in (top - 1, 10 * top):
        found = compiled(one, memory, RECOMPUTES, KB, limit)
        assert found == Compiled(top, top, top)
    assert compiled(one, memory, RECOMPUTES, KB, top).placed_bytes >= top
