"""Ops that no family knows: Shardy's rules composed, the user's own, or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import rhino_jax as rhino
from rhino_jax import extend
from rhino_jax.errors import RuleError
from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules import rule_of
from tests.lower.local.harness import alone_and_in_pairs, check_choices, one_op

MESH = Mesh.of(x=2, y=4)
X = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)


def primitive(name: str, fun: Callable[..., Any]) -> Callable[..., Any]:
    """A primitive of somebody's own that does what ``fun`` does."""
    found = Primitive(name)
    found.def_impl(fun)

    def shapes(*avals: Any, **params: Any) -> Any:
        made = jax.eval_shape(lambda *xs: fun(*xs, **params), *avals)
        return jax.core.ShapedArray(made.shape, made.dtype)

    found.def_abstract_eval(shapes)
    mlir.register_lowering(found, mlir.lower_fun(fun, multiple_results=False))
    return found.bind


softmax = primitive("test_softmax", lambda x: jax.nn.softmax(x, -1))
grow = primitive("test_grow", lambda x, size: jnp.broadcast_to(x, (size, *x.shape[1:])))
centered = primitive("test_centered", lambda x: x - jnp.sum(x, 1, keepdims=True) / 4)
divided = primitive("test_divided", lambda x: x / x.shape[0])
matmul = primitive("test_matmul", lambda x, y: jnp.tanh(x) @ y)


@pytest.mark.parametrize(
    ("fun", "rule"),
    [
        (softmax, "abc->abc {c:blocked}"),
        (centered, "abc->abc {b:blocked}"),
        # The divisor is the whole size: of a shard it would be another.
        (divided, "abc->abc {a:blocked}"),
    ],
)
def test_shardys_rules_are_composed(fun: Any, rule: str, device_mesh: Any) -> None:
    program, op = one_op(fun, X)
    assert rule_of(program, op).text == rule
    choices = alone_and_in_pairs(rule_of(program, op), MESH)
    assert choices
    check_choices(program, choices[:6], MESH, device_mesh(MESH), (X,))


def test_what_can_not_be_lowered_runs_whole() -> None:
    nowhere = Primitive("test_nowhere")
    nowhere.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    program, op = one_op(nowhere.bind, X)
    assert all(f.kind == "blocked" for f in rule_of(program, op).factors)


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    names: list[str] = []

    def register(name: str, rule: str, **more: Any) -> None:
        names.append(name)
        extend.register_rule(name, rule, **more)

    yield register
    for name in names:
        extend.forget_rule(name)


def planned(fun: Any, *args: Any, **options: Any) -> Any:
    step = rhino.auto_parallel(fun, cache_dir="", mesh={"x": 2, "y": 4}, **options)
    return step, step.planned(*args)


def test_a_registered_rule_is_used_and_said(registered: Any) -> None:
    x, y = X[:, 0], X[0].T

    def step(x: Any, y: Any) -> Any:
        return matmul(x, y)

    registered("test_matmul", "ij,jk->ik")
    run, plan = planned(step, x, y)
    (op,) = plan.traced.program.ops
    assert rule_of(plan.traced.program, op).text == "ij,jk->ik {j:reduction=sum}"
    assert "ij,jk->ik" in str(plan) and "registered" in str(plan)
    np.testing.assert_allclose(run(x, y), np.tanh(x) @ y, rtol=1e-5)
    _, other = planned(step, x, y, rules={"test_matmul": "ij,jk->ik {j:blocked}"})
    assert "{j:blocked}" in str(other), "rules of the step come first"
    assert other.traced.program.digest != plan.traced.program.digest


@jax.jit
def attended(q: Any, k: Any) -> Any:
    return jax.nn.softmax(q @ k.T / q.shape[0] ** 0.5) @ k


def test_a_function_with_a_local_form(registered: Any, device_mesh: Any) -> None:
    """A jitted function counts as one op, and its shards run what is given."""
    q, k = X[:, 0], X[:, 1]

    def local(q: Any, k: Any) -> Any:
        return jax.nn.softmax(q @ k.T / 8**0.5) @ k

    registered("attended", "ij,kj->ij {j:blocked, k:blocked}", local=local)
    run, plan = planned(lambda q, k: attended(q, k), q, k)
    assert [op.kind for op in plan.traced.program.ops] == ["jit"]
    np.testing.assert_allclose(run(q, k), attended(q, k), rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "what", "caret"),
    [
        ("bij,jk", "one '->'", 0),
        ("bij->b->i", "one '->'", 6),
        ("b1j->bj", "'1' is no factor", 1),
        ("bii->bi", "'i' stands twice", 2),
        ("bij->bk", "'k' is in no operand", 6),
        ("b(ij->b", "not closed", 0),
        ("bij->b {j:sum}", "is no factor with a kind", 8),
        ("bij->b {q:blocked}", "no operand has a factor 'q'", 8),
    ],
)
def test_what_is_no_rule_is_refused_with_a_caret(
    rule: str, what: str, caret: int
) -> None:
    with pytest.raises(RuleError) as caught:
        extend.register_rule("some", rule)
    first, second, third = str(caught.value).splitlines()
    assert what in first and second == f"  {rule}" and third == f"  {' ' * caret}^"
    assert "some" not in extend.registered()


def test_a_rule_that_contradicts_the_shapes_is_named(registered: Any) -> None:
    registered("test_matmul", "ij,kj->ik")
    with pytest.raises(RuleError, match=r"test_fallback.py:\d+: the rule of 'test_mat"):
        planned(lambda x, y: matmul(x, y), X[:, 0], X[0].T)


def test_a_shard_that_can_not_run_as_it_stands_is_named(registered: Any) -> None:
    registered("test_grow", "ijk->ijk")
    with pytest.raises(RuleError, match="local="):
        planned(lambda x: grow(x, size=8), X)


def test_a_rule_of_one_step_is_checked_when_it_is_decorated() -> None:
    with pytest.raises(RuleError, match="'i' stands twice"):
        rhino.auto_parallel(lambda x: x, rules={"some": "ii->i"})
