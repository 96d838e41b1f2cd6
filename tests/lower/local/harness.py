"""Shard, run, recombine: one op under one choice against the op itself.

The op runs through the code that lowers a plan: its operands are cut to the layouts
that the choice implies (slices, and terms of a sum where an operand is partial), its
local form runs on every device, and the results are brought back whole.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from rhino_jax.cost.reshard import route
from rhino_jax.ir.assignment import Assignment, OpPlan
from rhino_jax.ir.factors import Choice, Rule, choice_problems, layouts
from rhino_jax.ir.layout import Layout, Split, contiguous
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program
from rhino_jax.ir.steps import Move
from rhino_jax.lower.manual import run
from rhino_jax.rules import rule_of
from rhino_jax.trace.reader import read_jaxpr


def one_op(fun: Callable[..., Any], *args: Any, kind: str = "") -> tuple[Program, Op]:
    """The Program of ``fun`` cut down to its one op (the last one of ``kind``).

    What comes before the op stays outside: the op's operands become the inputs.
    """
    program, consts = read_jaxpr(jax.make_jaxpr(fun)(*args))
    assert not consts, "a constant in a one-op test"
    ops = [op for op in program.ops if not kind or op.kind == kind]
    op = ops[-1]
    values = [v for v in dict.fromkeys(op.operands)]
    inputs = tuple(v for v in values if program.values[v].literal is None)
    return Program(program.values, inputs, (op,), op.results), op


def evaluate(program: Program, args: Sequence[Any]) -> list[np.ndarray]:
    """The one op run as it stands, on whole operands."""
    (op,) = program.ops
    mesh = Mesh.of(x=1)
    rule = rule_of(program, op)
    _, given = layouts(rule, Choice())
    plan = Assignment(
        tuple(Layout.replicated(len(program.values[v].shape)) for v in program.inputs),
        given,
        (OpPlan(),),
    )
    out = jax.jit(lambda *xs: run(program, plan, mesh, xs))(*args)
    return [np.asarray(_words(x)) for x in out]


def recombine(
    program: Program,
    choice: Choice,
    mesh: Mesh,
    jax_mesh: jax.sharding.Mesh,
    args: Sequence[Any],
) -> list[np.ndarray]:
    """The one op run shard by shard under ``choice``, and put together again."""
    return recombine_all(program, [choice], mesh, jax_mesh, args)[0]


def recombine_all(
    program: Program,
    choices: Sequence[Choice],
    mesh: Mesh,
    jax_mesh: jax.sharding.Mesh,
    args: Sequence[Any],
) -> list[list[np.ndarray]]:
    """The results under each choice; all of them are compiled together, as that is
    most of the time."""
    plans = [plan_of(program, choice, mesh) for choice in choices]
    body = jax.shard_map(
        lambda *xs: [run(program, plan, mesh, xs) for plan in plans],
        mesh=jax_mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    found = jax.jit(body)(*args)
    return [[np.asarray(_words(x)) for x in one] for one in found]


def plan_of(program: Program, choice: Choice, mesh: Mesh) -> Assignment:
    """Whole operands cut to what the choice wants, and its results made whole."""
    (op,) = program.ops
    rule = rule_of(program, op)
    assert not choice_problems(rule, choice, mesh), choice_problems(rule, choice, mesh)
    wanted, given = layouts(rule, choice)

    def move(value: int, source: Layout, target: Layout) -> Move:
        v = program.values[value]
        steps = route(v.shape, v.dtype, source, target, mesh)
        return Move(value, source, target, steps)

    before, seen = [], set()
    for value, layout in zip(op.operands, wanted, strict=True):
        whole = Layout.replicated(layout.rank)
        literal = program.values[value].literal is not None
        if layout != whole and (value, layout) not in seen:
            assert not literal or layout.partial, "a split literal"
            before.append(move(value, whole, layout))
            seen.add((value, layout))
    wholes = [Layout.replicated(layout.rank) for layout in given]
    after = [
        move(value, layout, whole)
        for value, layout, whole in zip(op.results, given, wholes, strict=True)
        if layout != whole
    ]
    return Assignment(
        tuple(Layout.replicated(len(program.values[v].shape)) for v in program.inputs),
        tuple(wholes),
        (OpPlan(choice, tuple(before), tuple(after)),),
    )


def random_choice(rule: Rule, mesh: Mesh, rng: random.Random) -> Choice:
    """A random choice that the rule allows: contiguous, strided, ragged, flows."""
    choice = Choice()
    for axis in mesh.names:
        options = [choice]
        for factor in rule.factors:
            for split in _splits(factor.size, axis, mesh):
                tried = choice.with_split(factor.name, split)
                if not choice_problems(rule, tried, mesh):
                    options.append(tried)
        for number in range(len(rule.flows)):
            options.append(choice.with_flow(axis, number))
        weights = [1] + [3] * (len(options) - 1)
        choice = rng.choices(options, weights)[0]
    return choice


def every_choice(rule: Rule, mesh: Mesh) -> list[Choice]:
    """Every choice over one axis of ``mesh`` at a time."""
    found = []
    for axis, factor in itertools.product(mesh.names, rule.factors):
        for split in _splits(factor.size, axis, mesh):
            tried = Choice().with_split(factor.name, split)
            if not choice_problems(rule, tried, mesh):
                found.append(tried)
    for axis, number in itertools.product(mesh.names, range(len(rule.flows))):
        found.append(Choice().with_flow(axis, number))
    return list(dict.fromkeys(found))


def alone_and_in_pairs(rule: Rule, mesh: Mesh) -> list[Choice]:
    """Every factor and flow over the first axis alone, and every two of them over two.

    A factor is split in blocks, and in strides of one where it can be.
    """
    first, second = mesh.names[:2]

    def ways(axis: str) -> list[Choice]:
        found = []
        for factor in rule.factors:
            strides = _splits(factor.size, axis, mesh)[:2]
            found += [Choice().with_split(factor.name, s) for s in strides]
        flows = range(len(rule.flows))
        return found + [Choice().with_flow(axis, number) for number in flows]

    alone, other = ways(first), ways(second)
    pairs = [
        Choice.of(
            {n: (*a.on(n), *b.on(n)) for n in (*dict(a.splits), *dict(b.splits))},
            {**dict(a.flows), **dict(b.flows)},
        )
        for a, b in itertools.product(alone, other)
    ]
    every = dict.fromkeys([*alone, *pairs])
    return [c for c in every if not choice_problems(rule, c, mesh)]


def check(
    fun: Callable[..., Any],
    args: Sequence[Any],
    mesh: Mesh,
    jax_mesh: jax.sharding.Mesh,
    kind: str = "",
    choices: int = 4,
    seed: int = 0,
    rtol: float = 1e-5,
    args_of_op: Sequence[Any] | None = None,
) -> list[Choice]:
    """Run the op of ``fun`` under random choices against the op itself.

    ``args_of_op`` are given where the op's operands are not the arguments of ``fun``.
    Returns the choices tried, so that a test can say what it covered.
    """
    program, op = one_op(fun, *args, kind=kind)
    rng = random.Random(seed)
    tried = [random_choice(rule_of(program, op), mesh, rng) for _ in range(choices)]
    given = args if args_of_op is None else args_of_op
    check_choices(program, tried, mesh, jax_mesh, given, rtol)
    return tried


def check_choices(
    program: Program,
    choices: Sequence[Choice],
    mesh: Mesh,
    jax_mesh: jax.sharding.Mesh,
    given: Sequence[Any],
    rtol: float = 1e-5,
) -> None:
    """Run the one op of ``program`` under ``choices`` against the op itself."""
    (op,) = program.ops
    rule = rule_of(program, op)
    expected = evaluate(program, given)
    unique = list(dict.fromkeys(choices))
    found = recombine_all(program, unique, mesh, jax_mesh, given)
    for choice, got in zip(unique, found, strict=True):
        for want, have in zip(expected, got, strict=True):
            message = f"{op.kind} under {choice} with {rule.text}"
            if want.dtype.kind in "fc":
                scale = float(np.max(np.abs(want[np.isfinite(want)]), initial=1e-30))
                np.testing.assert_allclose(
                    have, want, rtol=rtol, atol=rtol * scale, err_msg=message
                )
            else:
                np.testing.assert_array_equal(have, want, err_msg=message)


def _splits(size: int, axis: str, mesh: Mesh) -> list[Split]:
    """Contiguous (ragged where it does not divide) and every strided split."""
    n = mesh.size(axis)
    found = list(contiguous(size, (axis,), mesh)) if size > 1 else []
    strides = [s for s in range(1, size // n) if size % (s * n) == 0]
    return found + [Split(axis, s) for s in strides]


def _words(x: jax.Array) -> jax.Array:
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return x
