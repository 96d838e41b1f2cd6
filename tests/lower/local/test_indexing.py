"""Gather, scatter and dynamic slices, shard by shard."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rhino_jax import compat
from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.lower.manual import run
from rhino_jax.rules import rule_of
from rhino_jax.trace.reader import read_jaxpr
from tests.lower.local.harness import (
    check,
    evaluate,
    every_choice,
    one_op,
    recombine,
    recombine_all,
)

MESH = Mesh.of(x=2, y=2, z=2)
SMALL = Mesh.of(x=2)
MODES = ("fill", "clip", "promise_in_bounds")


def rand(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*shape, low=0, high=8, dtype=np.int32, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def wild(*shape, seed=0):
    """Indices for 8 places, of which some are negative or past the end."""
    return ints(*shape, low=-30, high=30, seed=seed) // 2


def operands(fun, args, kind):
    """What the op of ``kind`` in ``fun`` reads: everything before it is run."""
    program, _ = read_jaxpr(jax.make_jaxpr(fun)(*args))
    at = max(i for i, op in enumerate(program.ops) if op.kind == kind)
    wanted = one_op(fun, *args, kind=kind)[0].inputs
    head = Program(program.values, program.inputs, program.ops[:at], wanted)
    whole = [
        tuple(Layout.replicated(len(shape)) for shape in program.shapes(values))
        for values in (program.inputs, wanted)
    ]
    plan = Assignment(whole[0], whole[1], (OpPlan(),) * at)
    return run(head, plan, Mesh.of(x=1), args)


def cover(fun, args, kind, device_mesh, choices=2, seed=0):
    """Splits of each factor that is not parallel, and random choices over three axes.

    Returns the kinds of the factors that were split.
    """
    program, op = one_op(fun, *args, kind=kind)
    given = operands(fun, args, kind)
    rule = rule_of(program, op)
    (want,) = evaluate(program, given)
    tried = {}
    for choice in every_choice(rule, SMALL):
        for name, (split,) in choice.splits:
            block = 2 * split.stride == rule.factor(name).size
            if rule.factor(name).kind != "parallel":
                tried.setdefault((name, block), choice)
    unique = list(tried.values())
    found = recombine_all(program, unique, SMALL, device_mesh(SMALL), given)
    for choice, (have,) in zip(unique, found, strict=True):
        np.testing.assert_allclose(
            have, want, 1e-5, 1e-5, err_msg=f"{choice} of {rule.text}"
        )
    mixed = check(
        fun, args, MESH, device_mesh(MESH), kind, choices, seed, args_of_op=given
    )
    split = [choice.splits for choice in (*tried.values(), *mixed)]
    return {rule.factor(name).kind for splits in split for name, _ in splits}


def taken(numbers, sizes, mode):
    numbers = lax.GatherDimensionNumbers(*numbers)
    return lambda x, i: lax.gather(x, i, numbers, sizes, mode=mode)


def put(numbers, mode):
    numbers = lax.ScatterDimensionNumbers(*numbers)
    return lambda x, i, u: lax.scatter_add(x, i, u, numbers, mode=mode)


TABLE = rand(8, 6)
GATHERS = {
    "embedding": (lambda t, i: t[i], (TABLE, ints(4, 3))),
    "one column": (lambda t, i: t.at[:, i].get(mode="fill"),
                   (rand(6, 8), np.int32(5))),
    "two lookups": (lambda t, i, j: t[i, :, j],
                    (rand(8, 3, 4), ints(4), ints(4, high=4))),
    "bytes": (taken(((1,), (0,), (0,), (), ()), (1, 2), "clip"),
              (rand(298, 2), ints(4, 1, high=256, dtype=np.uint8))),
    "pointed at, whole": (taken(((1,), (0,), (0, 1), (), ()), (1, 3), "fill"),
                          (rand(8, 3), wild(8, 2) // 4)),
    "bools": (lambda t, i: t.at[i].get(mode="fill"), (TABLE > 0, wild(6))),
    "ints": (lambda t, i: t.at[i].get(mode="fill"), (ints(8, 4), wild(6))),
    "filled by 3": (lambda t, i: t.at[i].get(mode="fill", fill_value=3),
                    (TABLE, wild(6))),
    "along axis": (lambda t, i: jnp.take_along_axis(t, i, 1),
                   (rand(4, 8), wild(4, 6))),
    "batched windows": (
        jax.vmap(lambda t, i: lax.dynamic_slice(t, (i, 0), (3, 4))),
        (rand(4, 8, 4), wild(4))),
    "windows of one": (
        jax.vmap(lambda t, i: lax.dynamic_slice(t, (i, 0), (1, 4)), (None, 0)),
        (rand(8, 4), wild(6))),
    "sorted": (lambda t, i: t.at[i].get(indices_are_sorted=True),
               (TABLE, np.sort(ints(6)))),
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERS)
def test_gather(name, device_mesh):
    fun, args = GATHERS[name]
    kinds = cover(fun, args, "gather", device_mesh)
    assert "parallel" in kinds if name == "batched windows" else "indexed" in kinds


@pytest.mark.parametrize("mode", MODES)
def test_gather_out_of_bounds(mode, device_mesh):
    def fun(t, i, j):
        return t.at[i, j].get(mode=mode)

    args = (rand(8, 4, 3), wild(4, 3), wild(4, 3, seed=1) // 2)
    assert "indexed" in cover(fun, args, "gather", device_mesh)


def at(operation, mode, **promises):
    def fun(t, i, u):
        return getattr(t.at[i], operation)(u, mode=mode, **promises)

    return fun


KINDS = {
    "add": "scatter-add",
    "subtract": "scatter-sub",
    "multiply": "scatter-mul",
    "max": "scatter-max",
    "min": "scatter-min",
}


@pytest.mark.parametrize(
    "operation, mode",
    [*(("add", mode) for mode in MODES), ("subtract", "clip"), ("multiply", "drop"),
     ("max", "promise_in_bounds"), ("min", "clip")],
)  # fmt: skip
def test_scatter(operation, mode, device_mesh):
    args = (rand(8, 2), wild(5), rand(5, 2, seed=2))
    kinds = cover(at(operation, mode), args, KINDS[operation], device_mesh)
    assert "indexed" in kinds
    assert ("reduction" in kinds) == (operation != "multiply")


def gradient(t, i):
    return jax.grad(lambda t: (jnp.take(t, i, axis=0) ** 2).sum())(t)


ONE_EACH = np.array([3, 9, 0, -40, 6, 5], np.int32)
SCATTERS = {
    "set": ("scatter", at("set", "clip"), (TABLE, wild(4), rand(4, 6, seed=1))),
    "set once each": ("scatter", at("set", "drop", unique_indices=True),
                      (TABLE, ONE_EACH, rand(6, 6, seed=1))),
    "apply": ("scatter", lambda t, i: t.at[i].apply(jnp.sin),
              (TABLE, np.array([3, 1, 6], np.int32))),
    "gradient of embedding": ("scatter-add", gradient, (TABLE, ints(4, 3))),
    "ints": ("scatter-add", at("add", "drop"), (ints(8), wild(4, 3), ints(4, 3))),
    "int maximum": ("scatter-max", at("max", "clip"), (ints(8), wild(7), ints(7))),
    "batched": ("scatter-add", jax.vmap(at("add", "drop")),
                (rand(4, 8), wild(4, 3), rand(4, 3))),
    "sorted once each": (
        "scatter-add", at("add", "drop", indices_are_sorted=True, unique_indices=True),
        (TABLE, np.array([0, 2, 3, 5, 9], np.int32), rand(5, 6, seed=1))),
    "two lookups": ("scatter-add", lambda t, i, j, u: t.at[i, :, j].add(u),
                    (rand(8, 2, 4), wild(4), wild(4) // 2, rand(4, 2))),
    "bytes": ("scatter-add", put(((), (0,), (0,), (), ()), "clip"),
              (rand(298), ints(9, 1, high=256, dtype=np.uint8), rand(9))),
    "pointed at, whole": (
        "scatter-add", put(((1,), (0,), (0, 1), (), ()), "clip"),
        (rand(8, 3), wild(4, 2), rand(4, 3))),
    "windows": ("scatter",
                lambda t, i, u: jax.vmap(
                    lambda t, i, u: lax.dynamic_update_slice(t, u, (i, 0)))(t, i, u),
                (rand(4, 8, 4), wild(4), rand(4, 3, 4))),
}  # fmt: skip


@pytest.mark.parametrize("name", SCATTERS)
def test_scatters(name, device_mesh):
    kind, fun, args = SCATTERS[name]
    kinds = cover(fun, args, kind, device_mesh)
    assert "parallel" in kinds if name == "windows" else "indexed" in kinds
    assert ("reduction" in kinds) == (kind != "scatter")


def slices(*sizes):
    return lambda x, *starts: lax.dynamic_slice_p.bind(x, *starts, slice_sizes=sizes)


SLICES = {
    "one row": (slices(1, 6), (TABLE, 3, 2)),
    "past the end": (slices(1, 4), (TABLE, 99, 5)),
    "before the start": (slices(4, 6), (TABLE, -3, 0)),
    "bools": (slices(1, 4), (TABLE > 0, 7, 1)),
    "ints": (slices(6, 4), (ints(8, 8), 1, 3)),
    "bytes": (slices(4,), (rand(298), np.uint8(250))),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICES)
def test_dynamic_slice(name, device_mesh):
    fun, (x, *starts) = SLICES[name]
    args = (x, *(np.asarray(s, getattr(s, "dtype", np.int32)) for s in starts))
    kinds = cover(fun, args, "dynamic_slice", device_mesh)
    assert "indexed" in kinds
    assert "positional" in kinds or name == "one row"


UPDATES = {
    "one row": (TABLE, rand(1, 6, seed=1), (5, 3)),
    "rows across shards": (TABLE, rand(3, 6, seed=1), (2, 0)),
    "clamped": (TABLE, rand(6, 2, seed=1), (7, -4)),
    "bools": (TABLE > 0, rand(2, 3) > 0, (3, 2)),
    "more than a shard": (rand(8), rand(7), (1,)),
}


@pytest.mark.parametrize("name", UPDATES)
def test_dynamic_update_slice(name, device_mesh):
    x, update, starts = UPDATES[name]
    args = (x, update, *(np.int32(s) for s in starts))
    kind = "dynamic_update_slice"
    fun = lax.dynamic_update_slice_p.bind
    kinds = cover(fun, args, kind, device_mesh)
    assert "positional" in kinds


def test_keys_are_looked_up_whole(device_mesh):
    keys = jax.random.split(jax.random.key(0), 8)
    kinds = cover(lambda k, i: k[i], (keys, ints(4)), "gather", device_mesh)
    assert kinds == {"parallel"}


ROWS = rand(16, 3)
STRIDED = {
    "gather": (lambda t, i: t[i], (ROWS, ints(9, high=16))),
    "scatter-add": (at("add", "drop"), (ROWS, ints(9, high=16), rand(9, 3))),
    "dynamic_slice": (slices(5, 3), (ROWS, np.int32(6), np.int32(0))),
    "dynamic_update_slice": (
        lax.dynamic_update_slice_p.bind,
        (ROWS, rand(1, 3, seed=1), np.int32(6), np.int32(0))),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_over_two_axes(kind, device_mesh):
    fun, args = STRIDED[kind]
    program, op = one_op(fun, *args, kind=kind)
    given = operands(fun, args, kind)
    name = rule_of(program, op).operands[0][0][0]
    choice = Choice.of({name: [Split("x", 4), Split("y", 1)]})
    mesh = Mesh.of(x=2, y=2)
    (have,) = recombine(program, choice, mesh, device_mesh(mesh), given)
    np.testing.assert_allclose(have, evaluate(program, given)[0], 1e-5)


@pytest.mark.parametrize(
    "factor, split, kept",
    [
        (0, Split("x", 4), (False, True)),  # rows of others are out of bounds
        (1, Split("x", 3), (True, True)),  # columns
        (2, Split("x", 2), (False, True)),  # updates
        (2, Split("x", 3), (False, False)),  # updates, padded
    ],
)
def test_promises(factor, split, kept, device_mesh, monkeypatch):
    """Sorted and unique indices are only promised of a shard where they still are."""
    size = 4 if split.stride == 2 else 5
    fun = at("add", "drop", indices_are_sorted=True, unique_indices=True)
    args = (TABLE, np.arange(size, dtype=np.int32), rand(size, 6))
    program, op = one_op(fun, *args, kind="scatter-add")
    given = operands(fun, args, "scatter-add")
    promised = []
    bind = compat.bind

    def recorded(eqn, xs, changed):
        promised.append((changed["indices_are_sorted"], changed["unique_indices"]))
        return bind(eqn, xs, changed)

    monkeypatch.setattr(compat, "bind", recorded)
    choice = Choice.of({rule_of(program, op).factors[factor].name: [split]})
    recombine(program, choice, SMALL, device_mesh(SMALL), given)
    assert promised == [kept]


@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_far_out_of_bounds(dtype, device_mesh, x64):
    # Cut to 32 bits, the last but one would be in bounds (and the last place).
    far = np.array([5, 3, 2**32 + 7, 2**31 + 5]).clip(max=np.iinfo(dtype).max)
    vectors = np.stack([far, far[::-1] % 4], axis=-1).astype(dtype)
    args = (rand(8, 4), vectors, rand(4))
    fun = put(((), (0, 1), (0, 1), (), ()), "drop")
    assert "indexed" in cover(fun, args, "scatter-add", device_mesh)


PADDED = {
    "gather": (lambda x, i: x[i], (rand(13, 4), ints(6, high=13))),
    "scatter-add": (
        lambda x, i, u: x.at[i].add(u, mode="drop"),
        (rand(13, 4), wild(6), rand(6, 4, seed=1)),
    ),
    "dynamic_slice": (
        lambda x, i: lax.dynamic_slice(x, (i, 0), (5, 4)),
        (rand(13, 4), np.int32(7)),
    ),
    "dynamic_update_slice": (
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
        (rand(13, 4), rand(5, 4, seed=1), np.int32(7)),
    ),
}


@pytest.mark.parametrize("kind", PADDED)
def test_what_is_looked_up_may_be_padded(kind, device_mesh):
    """13 rows over 4 devices, the last of which holds one of them."""
    fun, args = PADDED[kind]
    args = operands(fun, args, kind)
    program, op = one_op(fun, *PADDED[kind][1], kind=kind)
    rule = rule_of(program, op)
    (name,) = rule.operands[0][0]
    mesh = Mesh.of(x=4)
    choice = Choice().with_split(name, Split("x", 4))
    (want,) = evaluate(program, args)
    (have,) = recombine(program, choice, mesh, device_mesh(mesh), args)
    np.testing.assert_allclose(have, want, rtol=1e-6)
