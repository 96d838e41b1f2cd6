"""Forward, backward, epilogue; parameters and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks.models import FIRST
from rhino_jax.ir.analysis.influence import reached
from rhino_jax.ir.analysis.regions import (
    BACKWARD,
    EPILOGUE,
    FORWARD,
    RESIDUAL,
    Regions,
    regions,
)
from rhino_jax.ir.program import Op, Program, Where
from tests.ir.analysis.steps import (
    Analyzed,
    analyzed,
    batch_shapes,
    f32,
    mlp_loss,
    mlp_shapes,
    sgd,
    zoo,
)

Step = Callable[..., Any]


def without_names(program: Program) -> Program:
    ops = tuple(replace(op, where=Where()) for op in program.ops)
    return replace(program, ops=ops)


def gradient_ops(found: Analyzed) -> list[tuple[str, Op]]:
    """For each parameter, its name and the op that makes its gradient."""
    program = found.program
    return [
        (found.named(i), program.ops[program.producer[v]])
        for i, v in found.structure.regions.gradients.items()
    ]


@pytest.mark.parametrize("name", FIRST)
def test_parameters_of_the_zoo_are_those_called_so(name: str) -> None:
    found = zoo(name)
    roots = ("state/params/", "state/0/")  # a train state; a pair with the optimizer's
    wanted = [
        i for i, path in enumerate(found.traced.input_paths) if path.startswith(roots)
    ]
    assert list(found.structure.regions.parameters) == wanted
    assert list(found.structure.regions.gradients) == wanted


@pytest.mark.parametrize("name", FIRST)
def test_gradients_of_the_zoo_are_what_transposition_made_last(name: str) -> None:
    found = zoo(name)
    program, known = found.program, found.structure.regions
    for (path, op), value in zip(
        gradient_ops(found), known.gradients.values(), strict=True
    ):
        assert "transpose(" in op.where.name_stack, path
        for use in program.uses[value]:
            assert "transpose(" not in program.ops[use].where.name_stack, path
    shapes = [program.values[v].shape for v in known.gradients.values()]
    assert shapes == [program.values[program.inputs[i]].shape for i in known.gradients]


@pytest.mark.parametrize("name", FIRST)
def test_regions_of_the_zoo_agree_with_jax_names(name: str) -> None:
    """``transpose(`` is backward; ``jvp(`` is forward or residual or unread."""
    found = zoo(name)
    for op, region in zip(found.program.ops, found.structure.regions.of, strict=True):
        stack = op.where.name_stack
        if "transpose(" in stack:
            assert region == BACKWARD, (op.kind, stack)
        elif region == BACKWARD:
            # Behind the last forward value that it needs: a seed, a last side result.
            assert not found.structure.regions.batch.issuperset(op.results) or (
                "jvp(" in stack
            )


@pytest.mark.parametrize("name", ["gpt_unrolled", "gpt_scanned", "resnet", "t5"])
def test_names_are_only_a_hint(name: str) -> None:
    """Without them a gradient may be told before it is reshaped or spread: the one
    that is told with them is made from it alone."""
    found = zoo(name)
    program, known = found.program, found.structure.regions
    blind = regions(without_names(program), found.pairs, found.traced.batch_inputs)
    assert blind.parameters == known.parameters
    assert list(blind.gradients) == list(known.gradients)
    for position, value in blind.gradients.items():
        shape = program.values[program.inputs[position]].shape
        assert program.values[value].shape == shape
        assert known.gradients[position] in reached(program, (value,))
    moved = {
        (old, new) for old, new in zip(known.of, blind.of, strict=True) if old != new
    }
    assert moved <= {(BACKWARD, EPILOGUE)}


def counts(known: Regions) -> dict[str, int]:
    return {r: known.of.count(r) for r in (FORWARD, RESIDUAL, BACKWARD, EPILOGUE)}


def test_one_product() -> None:
    """loss = sum(x @ w): three ops make it, two the gradient, two the update."""

    def step(w: Any, x: Any) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.sum(x @ w))(w)
        return w - 0.1 * grad, loss

    found = analyzed(step, f32(3, 2), f32(5, 3))
    kinds = [op.kind for op in found.program.ops]
    assert dict(zip(kinds, found.structure.regions.of, strict=True)) == {
        "dot_general": BACKWARD,  # the second of them
        "reduce_sum": FORWARD,
        "broadcast_in_dim": BACKWARD,
        "transpose": BACKWARD,
        "mul": EPILOGUE,
        "sub": EPILOGUE,
    }
    assert kinds.count("dot_general") == 2
    assert found.structure.regions.of[kinds.index("dot_general")] == FORWARD


ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def adam_shapes() -> tuple[Any, Any]:
    """The arguments of ``grad_step``'s step."""
    params = mlp_shapes(2)
    return (params, jax.eval_shape(ADAM.init, params)), batch_shapes()


def grad_step(extra: Callable[[Any, Any, Any], dict[str, Any]]) -> Step:
    """A step with adam and a clip that gives the loss and more."""

    def step(state: Any, batch: Any) -> Any:
        params, opt = state
        loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
        updates, opt = ADAM.update(grads, opt, params)
        new = optax.apply_updates(params, updates)
        return (new, opt), {"loss": loss, **extra(params, grads, new)}

    return step


EXTRAS: dict[str, Callable[[Any, Any, Any], dict[str, Any]]] = {
    "nothing": lambda params, grads, new: {},
    "norm of gradients": lambda params, grads, new: {"a": optax.tree.norm(grads)},
    "norm of new parameters": lambda params, grads, new: {"a": optax.tree.norm(new)},
    "norm of parameters": lambda params, grads, new: {"z": optax.tree.norm(params)},
    "the gradients": lambda params, grads, new: {"a": grads[0]["b"]},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_metrics_made_from_gradients_do_not_move_the_regions(extra: str) -> None:
    plain = analyzed(grad_step(EXTRAS["nothing"]), *adam_shapes())
    found = analyzed(grad_step(EXTRAS[extra]), *adam_shapes())
    ours, theirs = found.structure.regions, plain.structure.regions
    assert ours.parameters == theirs.parameters == (0, 1, 2, 3)
    assert list(ours.gradients) == [0, 1, 2, 3]
    more = counts(ours)
    assert {**more, EPILOGUE: 0} == {**counts(theirs), EPILOGUE: 0}


OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "rows and columns": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "products of a gradient": optax.contrib.muon(1e-3),
    "a branch around it all": optax.apply_if_finite(optax.adam(1e-3), 3),
    "a branch every second step": optax.MultiSteps(
        optax.adam(1e-3), 2
    ).gradient_transformation(),
    "a norm for each parameter": optax.lamb(1e-3),
    "units clipped": optax.chain(optax.adaptive_grad_clip(0.1), optax.adamw(1e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_end_where_the_optimizer_begins(name: str) -> None:
    tx = OPTIMIZERS[name]

    def step(state: Any, batch: Any) -> Any:
        params, opt = state
        loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), loss

    params = mlp_shapes(2)
    found = analyzed(step, (params, jax.eval_shape(tx.init, params)), batch_shapes())
    plain = analyzed(grad_step(EXTRAS["nothing"]), *adam_shapes())
    ours, theirs = found.structure.regions, plain.structure.regions
    assert list(ours.gradients) == [0, 1, 2, 3]
    assert {**counts(ours), EPILOGUE: 0} == {**counts(theirs), EPILOGUE: 0}
    for _, op in gradient_ops(found):
        assert "transpose(" in op.where.name_stack


def test_a_step_without_metrics() -> None:
    def step(params: Any, batch: Any) -> Any:
        return sgd(params, jax.grad(mlp_loss)(params, batch))

    found = analyzed(step, mlp_shapes(2), batch_shapes())
    known = found.structure.regions
    assert list(known.gradients) == list(known.parameters) == [0, 1, 2, 3]
    for _, op in gradient_ops(found):
        assert "transpose(" in op.where.name_stack
    dots = [known.of[i] for i, op in enumerate(found.program.ops) if "dot" in op.kind]
    assert dots == [FORWARD] * 2 + [BACKWARD] * (len(dots) - 2)


def test_a_parameter_without_gradient() -> None:
    """A frozen part is a parameter; integer state that the loss reads is none."""

    def step(state: Any, batch: Any) -> Any:
        trained, frozen, count = state["trained"], state["frozen"], state["count"]

        def loss_fn(trained: Any) -> Any:
            x = batch["x"] @ frozen * (1.0 + count)
            return mlp_loss(trained, {"x": x, "y": batch["y"]})

        loss, grads = jax.value_and_grad(loss_fn)(trained)
        new = {"count": count + 1, "frozen": frozen, "trained": sgd(trained, grads)}
        return new, loss

    state = {
        "count": jax.ShapeDtypeStruct((), jnp.int32),
        "frozen": f32(8, 8),
        "trained": mlp_shapes(1),
    }
    found = analyzed(step, state, batch_shapes())
    known = found.structure.regions
    assert [found.named(i) for i in known.parameters] == [
        "state/frozen",
        "state/trained/0/b",
        "state/trained/0/w",
    ]
    assert list(known.gradients) == [2, 3]


def test_an_optimizer_of_one_vector_shares_one_gradient() -> None:
    """All gradients meet where they are put together, before the moments come in."""
    tx = optax.adam(1e-3)

    def step(state: Any, batch: Any) -> Any:
        params, opt = state
        loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
        flat, unravel = ravel_pytree(grads)
        updates, opt = tx.update(flat, opt)
        return (optax.apply_updates(params, unravel(updates)), opt), loss

    params = mlp_shapes(2)
    state = (params, jax.eval_shape(tx.init, f32(2 * (8 + 64))))
    found = analyzed(step, state, batch_shapes())
    known = found.structure.regions
    assert known.parameters == (0, 1, 2, 3)
    (vector,) = set(known.gradients.values())
    assert found.program.ops[found.program.producer[vector]].kind == "concatenate"
    assert len(known.gradients) == 4


def test_a_tied_parameter_has_the_sum_as_its_gradient() -> None:
    def step(w: Any, x: Any) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(x @ w) @ w.T))(w)
        return w - 0.1 * grad, loss

    ((_, op),) = gradient_ops(analyzed(step, f32(4, 4), f32(5, 4)))
    assert op.kind == "add_any"


def test_a_program_that_does_not_train() -> None:
    found = analyzed(lambda w, x: jnp.sum(x @ w), f32(3, 2), f32(5, 3))
    known = found.structure.regions
    assert (known.parameters, known.gradients, known.turn) == ((), {}, -1)
    assert set(known.of) == {FORWARD}
