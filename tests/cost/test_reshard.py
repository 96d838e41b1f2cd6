"""Routes between layouts: lawful, complete, counted right, the cheapest there are."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhino_jax.cost.reshard import local_bytes, route, wire_bytes
from rhino_jax.ir.layout import Layout, parse_layout
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.ir.program import itemsize
from rhino_jax.ir.steps import ALL_GATHER, FREE, REDUCE_SCATTER, Step
from tests.layouts import random_layout, random_mesh, random_shape

RANDOM = st.randoms(use_true_random=False)
BYTES = {
    # kind: bytes sent by each of n devices, of what it holds before and after
    "all-reduce": lambda n, before, after: 2 * before * (n - 1) / n,
    "reduce-scatter": lambda n, before, after: before * (n - 1) / n,
    "all-gather": lambda n, before, after: after * (n - 1) / n,
    "all-to-all": lambda n, before, after: before * (n - 1) / n,
    "collective-permute": lambda n, before, after: before,
    "slice": lambda n, before, after: 0,
    "mask": lambda n, before, after: 0,
    "embed": lambda n, before, after: 0,
}
Pair = tuple[tuple[int, ...], Layout, Layout, Mesh]


def drawn(rng: random.Random) -> Pair:
    mesh, shape = random_mesh(rng), random_shape(rng)
    source = random_layout(rng, shape, mesh, ("sum", "max"))
    return shape, source, random_layout(rng, shape, mesh, ("sum", "max")), mesh


def steps_of(mesh: Mesh, shape: tuple[int, ...], source: str, target: str) -> list[str]:
    found = route(shape, "float32", parse_layout(source), parse_layout(target), mesh)
    return [f"{step.kind} {','.join(step.axes)}" for step in found]


@given(RANDOM)
@settings(max_examples=300, deadline=None)
def test_a_route_goes_from_source_to_target_lawfully(rng: random.Random) -> None:
    shape, source, target, mesh = drawn(rng)
    now = source
    for step in route(shape, "float32", source, target, mesh):
        assert step.source == now
        assert step.axes
        assert step.source.without(step.axes) == step.target.without(step.axes)
        assert all(step.source.only(a) != step.target.only(a) for a in step.axes)
        assert not step.target.problems(shape, mesh)
        operators = {op for _, op in (*source.partial, *target.partial)}
        if len(operators) > 1:
            assert len({op for _, op in step.target.partial}) <= 1
        now = step.target
    assert now == target


@given(RANDOM, st.sampled_from(["float32", "bfloat16", "bool", "key<fry>"]))
@settings(max_examples=150, deadline=None)
def test_bytes_are_those_of_the_one_counter(rng: random.Random, dtype: str) -> None:
    shape, source, target, mesh = drawn(rng)
    steps = route(shape, dtype, source, target, mesh)
    for step in steps:
        n = mesh.group_size(step.axes)
        before, after = (
            math.prod(x.local_shape(shape, mesh)) * itemsize(dtype)
            for x in (step.source, step.target)
        )
        exact = BYTES[step.kind](n, before, after) if n > 1 else 0
        assert exact - 2 < step.wire_bytes <= exact
        assert (step.kind in FREE) == (BYTES[step.kind](2, 8, 8) == 0)
    total = sum(step.wire_bytes for step in steps)
    assert wire_bytes(shape, dtype, source, target, mesh) == total


def one_by_one(pair: Pair) -> float:
    """Bytes of the cheapest sequence that changes one axis at a time, all tried."""
    shape, source, target, mesh = pair
    best: dict[Layout, float] = {source: 0.0}
    waiting = [source]
    while waiting:
        now = waiting.pop()
        for axis in mesh.names:
            goals = [now.without((axis,))]
            where, operator = target.find(axis), target.operator(axis)
            if where:
                goals.append(goals[0].with_split(*where))
            if operator:
                goals.append(goals[0].with_partial(axis, operator))
            for after in goals:
                kind = _kind(now, after, axis)
                if not kind or after.problems(shape, mesh):
                    continue
                held = [local_bytes(shape, "float32", x, mesh) for x in (now, after)]
                sent = best[now] + BYTES[kind](mesh.size(axis), *held)
                if sent < best.get(after, math.inf):
                    best[after] = sent
                    waiting.append(after)
    return best.get(target, math.inf)


def _kind(now: Layout, after: Layout, axis: str) -> str:
    """The step between two layouts that differ on one axis; "" for none, or for an
    all-to-all within a dimension, whose digits may overlap."""

    def state(layout: Layout) -> str:
        return layout.operator(axis) or ("split" if layout.find(axis) else "whole")

    if len({op for _, op in after.partial}) > 1 or now == after:
        return ""
    if now.find(axis) and after.find(axis):
        return "all-to-all" if now.find(axis)[0] != after.find(axis)[0] else ""
    return {
        ("whole", "split"): "slice",
        ("whole", "sum"): "mask",
        ("whole", "max"): "mask",
        ("split", "whole"): "all-gather",
        ("split", "sum"): "embed",
        ("split", "max"): "embed",
        ("sum", "split"): "reduce-scatter",
        ("sum", "whole"): "all-reduce",
        ("max", "whole"): "all-reduce",
    }.get((state(now), state(after)), "")


@given(RANDOM)
@settings(max_examples=200, deadline=None)
def test_no_sequence_of_one_axis_steps_is_cheaper(rng: random.Random) -> None:
    shape, source, target, mesh = pair = drawn(rng)
    sent = wire_bytes(shape, "float32", source, target, mesh)
    if len({op for _, op in (*source.partial, *target.partial)}) <= 1:
        assert sent <= one_by_one(pair)


CHEAPEST = {
    "nothing": ("[x/4,-]", "[x/4,-]", []),
    "gather": ("[x/4,-]", "[-,-]", ["all-gather x"]),
    "gather both at once": ("[x/4,y/2]", "[-,-]", ["all-gather x,y"]),
    "slice": ("[-,-]", "[x/4,y/2]", ["slice x,y"]),
    "slice before gather": ("[x/4,-]", "[-,y/2]", ["slice y", "all-gather x"]),
    "reduce": ("[-,-]+sum(x)+sum(y)", "[-,-]", ["all-reduce x,y"]),
    "scatter": ("[-,-]+sum(x)", "[x/4,-]", ["reduce-scatter x"]),
    "scatter both at once": (
        "[-,-]+sum(x)+sum(y)",
        "[x/4,y/2]",
        ["reduce-scatter x,y"],
    ),
    "scatter, then reduce less": (
        "[-,-]+sum(x)+sum(y)",
        "[x/4,-]",
        ["reduce-scatter x", "all-reduce y"],
    ),
    "scatter before gather": (
        "[-,y/2]+sum(x)",
        "[x/4,-]",
        ["reduce-scatter x", "all-gather y"],
    ),
    "a maximum has no scatter": (
        "[-,-]+max(x)",
        "[x/4,-]",
        ["all-reduce x", "slice x"],
    ),
    "a maximum shrinks before it moves": (
        "[-,y/1]+max(x)",
        "[y/2,x/4]",
        ["all-reduce x", "slice x", "all-to-all y"],
    ),
    "another dimension": ("[x/4,-]", "[-,x/4]", ["all-to-all x"]),
    "another stride": ("[x/4,-]", "[x/1,-]", ["all-to-all x"]),
    "axes change places": ("[x/4,z/4]", "[z/4,x/4]", ["collective-permute x,z"]),
    "one axis for another": ("[x/4,-]", "[z/4,-]", ["collective-permute x,z"]),
    "slice before a permute": (
        "[x/4,-]",
        "[z/4,y/2]",
        ["slice y", "collective-permute x,z"],
    ),
    "a term": ("[-,-]", "[-,-]+sum(x)", ["mask x"]),
    "a part as a term": ("[x/4,-]", "[-,-]+sum(x)", ["embed x"]),
    "gather what is small": (
        "[x/4,y/2]",
        "[-,-]+sum(x)",
        ["all-gather y", "embed x"],
    ),
    "only what blocks is gathered first": (
        "[z/4,y/2]+sum(x)",
        "[-,x/4]",
        ["all-reduce x", "all-gather y", "slice x", "all-gather z"],
    ),
    "another operator": (
        "[-,-]+max(x)",
        "[-,-]+sum(x)",
        ["all-reduce x", "mask x"],
    ),
}


@pytest.mark.parametrize("name", CHEAPEST)
def test_known_cheapest(name: str) -> None:
    source, target, expected = CHEAPEST[name]
    assert steps_of(Mesh.of(x=2, y=4, z=2), (8, 8), source, target) == expected


def test_on_a_torus_axes_are_scattered_and_gathered_one_by_one() -> None:
    """With as many bytes as at once; all else stays together."""
    mesh = Mesh.of(x=2, y=4)
    torus = mesh.linked(TORUS)
    term, split = "[-,-]+sum(x)+sum(y)", "[x/4,y/2]"
    assert steps_of(torus, (8, 8), term, split) == [
        "reduce-scatter x",
        "reduce-scatter y",
    ]
    gathered = ["all-gather y", "all-gather x"]
    assert steps_of(torus, (8, 8), "[x/4.y/1,-]", "[-,-]") == gathered
    assert steps_of(torus, (8, 8), "[y/2.x/1,-]", "[-,-]") == gathered[::-1]
    for source, target in ((term, split), ("[x/4.y/1,-]", "[-,-]")):
        one, other = (
            wire_bytes((8, 8), "float32", parse_layout(source), parse_layout(target), m)
            for m in (mesh, torus)
        )
        assert one == other
    assert steps_of(torus, (8, 8), term, "[-,-]") == ["all-reduce x,y"]


@given(RANDOM)
@settings(max_examples=60, deadline=None)
def test_no_scatter_or_gather_on_a_torus_takes_two_axes(rng: random.Random) -> None:
    shape, source, target, mesh = drawn(rng)
    steps = route(shape, "float32", source, target, mesh.linked(TORUS))
    singly = (ALL_GATHER, REDUCE_SCATTER)
    assert all(len(s.axes) == 1 for s in steps if s.kind in singly)


def test_axes_of_one_device_cost_nothing() -> None:
    mesh = Mesh.of(x=1, y=2)
    source, target = parse_layout("[x/8,-]+sum(y)"), parse_layout("[y/4,x/8]")
    steps = route((8, 8), "float32", source, target, mesh)
    assert sum(step.wire_bytes for step in steps) == 8 * 8 * 4 // 2
    assert {s.kind for s in steps if s.wire_bytes} == {REDUCE_SCATTER}


def test_a_route_is_the_same_every_time() -> None:
    pair = drawn(random.Random(3))
    found: list[tuple[Step, ...]] = []
    for _ in range(2):
        route.cache_clear()
        found.append(route(pair[0], "float32", *pair[1:]))
    assert found[0] == found[1]
