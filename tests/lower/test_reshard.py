"""Moves carried out on eight devices: the value that comes out is the one that went in.

Shards are cut by the oracle of tests/layouts.py, which knows no reshapes. Pads hold
garbage, terms are random: neither may be seen in what comes out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rhino_jax.cost.reshard import route
from rhino_jax.ir.layout import Layout, parse_layout
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.ir.steps import Move, Step
from rhino_jax.lower.reshard import neutral, run_move
from tests.layouts import COMBINE, random_layout, random_shape, recombined, shards

OPERATORS = {
    "float32": ("sum", "max", "min"),
    "bfloat16": ("sum", "max"),
    "int32": ("sum", "max", "min"),
    "uint8": ("sum",),
    "bool": ("and", "or"),
    "key<fry>": (),
}
MESHES = {
    "one axis": Mesh.of(x=8),
    "two axes": Mesh.of(x=2, y=4),
    "three axes": Mesh.of(x=2, y=2, z=2),
    "torus": Mesh.of(x=4, y=2).linked(TORUS),
}
GARBAGE = 77
COUNT = 40


@dataclass(frozen=True)
class Case:
    """One value that goes from one layout to another."""

    dtype: str
    shape: tuple[int, ...]
    source: Layout
    target: Layout

    def move(self, mesh: Mesh) -> Move:
        steps = route(self.shape, self.dtype, self.source, self.target, mesh)
        return Move(0, self.source, self.target, steps)

    def terms(self, mesh: Mesh, seed: int) -> np.ndarray:
        """[devices along the partial axes, *shape] small whole numbers."""
        shape = (mesh.group_size(self.source.partial_axes), *self.shape)
        low = -9 if self.dtype in ("float32", "bfloat16", "int32") else 0
        drawn = np.random.default_rng(seed).integers(low, 10, shape)
        if self.dtype == "bool":
            return drawn > 4
        kind = "uint32" if self.dtype.startswith("key") else self.dtype
        return drawn.astype(jnp.dtype(kind))


def drawn_cases(mesh: Mesh, count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        dtype = list(OPERATORS)[number % len(OPERATORS)]
        shape = random_shape(rng)
        layouts = [random_layout(rng, shape, mesh, OPERATORS[dtype]) for _ in range(2)]
        found.append(Case(dtype, shape, *layouts))
    return found


def moved(
    cases: Sequence[Case], mesh: Mesh, jax_mesh: jax.sharding.Mesh
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each case the terms that went in and the shards that came out."""
    terms = [case.terms(mesh, seed) for seed, case in enumerate(cases)]
    ins = [
        shards(t, case.source, mesh, t.dtype.type(GARBAGE))
        for t, case in zip(terms, cases, strict=True)
    ]

    def local(*args: jax.Array) -> list[jax.Array]:
        outs = []
        for case, (x,) in zip(cases, args, strict=True):
            is_key = case.dtype.startswith("key")
            x = _keys(x) if is_key else x
            x = run_move(x, case.shape, case.move(mesh), mesh)
            assert x.shape == case.target.local_shape(case.shape, mesh), case
            outs.append((_seeds(x) if is_key else x)[None])
        return outs

    spec = PartitionSpec(mesh.names)
    body = jax.shard_map(
        local, mesh=jax_mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    outs = jax.jit(body)(*ins)
    return [(t, np.asarray(out)) for t, out in zip(terms, outs, strict=True)]


def _keys(seeds: jax.Array) -> jax.Array:
    words = jnp.stack([jnp.zeros_like(seeds), seeds], axis=-1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _seeds(keys: jax.Array) -> jax.Array:
    return jax.random.key_data(keys)[..., 1]


def check(cases: Sequence[Case], mesh: Mesh, jax_mesh: jax.sharding.Mesh) -> None:
    """Every replica of every target holds the combined terms of its source."""
    results = moved(cases, mesh, jax_mesh)
    for case, (terms, out) in zip(cases, results, strict=True):
        operator = case.source.partial[0][1] if case.source.partial else "sum"
        value = reduce(COMBINE[operator], terms)
        for seen in recombined(out, case.shape, case.target, mesh):
            np.testing.assert_array_equal(seen, value, err_msg=f"{case} on ({mesh})")


@pytest.mark.parametrize("name", MESHES)
def test_what_is_moved_stays_the_same(
    name: str, device_mesh: Callable[[Mesh], Any]
) -> None:
    mesh = MESHES[name]
    cases = drawn_cases(mesh, COUNT, list(MESHES).index(name))
    check(cases, mesh, device_mesh(mesh))


def test_the_random_moves_take_every_kind_of_step() -> None:
    steps = [
        (step, case, mesh)
        for seed, mesh in enumerate(MESHES.values())
        for case in drawn_cases(mesh, COUNT, seed)
        for step in case.move(mesh).steps
    ]
    kinds = Counter(step.kind for step, _, _ in steps)
    assert len(kinds) == 8, kinds
    ragged = {
        step.kind
        for step, case, mesh in steps
        if step.source.ragged_dims(case.shape, mesh)
    }
    assert {"all-gather", "all-to-all", "all-reduce", "slice", "embed"} <= ragged


CUBE, WIDE = Mesh.of(x=2, y=2, z=2), Mesh.of(x=2, y=4)
NAMED = {
    "fused projection": (WIDE, "float32", (4, 24), "[-,x/12]", "[-,x/4]"),
    "ragged to ragged": (WIDE, "float32", (7, 5), "[y/2,-]", "[-,y/2]"),
    "ragged with a digit inside": (WIDE, "float32", (6,), "[x/1]", "[y/2.x/1]"),
    "ragged scattered": (WIDE, "int32", (5,), "[-]+sum(y)", "[y/2]"),
    "pads are no maximum": (WIDE, "int32", (5,), "[y/2]+max(x)", "[-]"),
    "two operators": (CUBE, "int32", (6,), "[z/3]+sum(x)+sum(y)", "[y/3]+max(x)"),
    "sums to minima": (CUBE, "int32", (3, 8), "[-,z/4]+sum(x)", "[-,z/4]+min(y)"),
    "fewer elements than devices": (WIDE, "float32", (3,), "[-]", "[y/1]"),
    "axes change places": (CUBE, "float32", (4, 4), "[x/2,z/2]", "[z/2,x/2]"),
    "keys": (WIDE, "key<fry>", (4, 6), "[y/1,x/3]", "[x/2,-]"),
    "ragged keys": (WIDE, "key<fry>", (6,), "[x/1]", "[y/2.x/1]"),
    "bools looked up": (WIDE, "bool", (8,), "[-]+or(y)", "[y/2]"),
}


@pytest.mark.parametrize("mesh", [CUBE, WIDE], ids=str)
def test_moves_that_are_easily_wrong(
    mesh: Mesh, device_mesh: Callable[[Mesh], Any]
) -> None:
    cases = [
        Case(dtype, shape, parse_layout(source), parse_layout(target))
        for on, dtype, shape, source, target in NAMED.values()
        if on == mesh
    ]
    check(cases, mesh, device_mesh(mesh))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
def test_a_neutral_element_changes_nothing(dtype: str) -> None:
    values = jnp.array([0, 1] if dtype == "bool" else [0, 1, 100], dtype)
    operators = ("and", "or") if dtype == "bool" else ("sum", "max", "min")
    for operator in operators:
        unit = neutral(operator, values.dtype)
        assert unit.dtype == values.dtype
        np.testing.assert_array_equal(COMBINE[operator](values, unit), values)


def test_an_empty_route_is_the_shard_itself() -> None:
    x = jnp.arange(4.0)
    same = parse_layout("[x/4]")
    assert run_move(x, (8,), Move(0, same, same, ()), Mesh.of(x=2)) is x


def test_axes_of_one_device_leave_the_shard_alone() -> None:
    """No collective is written for them, so no shard_map is needed."""
    mesh = Mesh.of(x=1)
    x = jnp.arange(8.0)
    for source, target in (("[x/8]", "[-]"), ("[-]", "[x/8]"), ("[-]+sum(x)", "[-]")):
        steps: tuple[Step, ...] = route(
            (8,), "float32", parse_layout(source), parse_layout(target), mesh
        )
        move = Move(0, parse_layout(source), parse_layout(target), steps)
        assert steps
        np.testing.assert_array_equal(run_move(x, (8,), move, mesh), x)
