"""Where the examples are, against what changes when one example does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.models import FIRST
from rhino_jax.ir.analysis.batch import BatchDims, batch_dims, common_batch_size
from rhino_jax.ir.analysis.digits import Digit, Place
from rhino_jax.ir.analysis.regions import BACKWARD, FORWARD, RESIDUAL
from rhino_jax.rules import rule_of
from rhino_jax.trace import trace
from tests.ir.analysis.steps import f32, zoo

EXAMPLES = 8
W = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)


def where(fun: Callable[..., Any], *shapes: Any) -> tuple[list[Place], BatchDims]:
    """The places of ``fun``'s outputs; all arguments are batch inputs."""
    program = trace(fun, shapes).program
    found = batch_dims(program, range(len(shapes)), rule_of)
    return [found.places.get(v, ()) for v in program.outputs], found


def scanned(x: Any) -> Any:
    def body(carry: Any, w: Any) -> Any:
        total, y = carry
        y = jnp.tanh(y @ w)
        return (total + y.T, y), y

    weights = jnp.stack([W, W])
    (total, y), ys = jax.lax.scan(body, (jnp.zeros((6, EXAMPLES)), x), weights)
    return total, y, ys


def looped(x: Any) -> Any:
    return jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1]) @ W), (0, x)
    )[1]


def branched(x: Any) -> Any:
    return jax.lax.cond(W[0, 0] > 0, lambda x: x * 2.0, lambda x: x - 1.0, x)


ALONE: dict[str, tuple[Callable[..., Any], list[Place]]] = {
    "elementwise": (lambda x: jnp.sin(x) + W[0], [(Digit(1, 8, 0, 1),)]),
    "product": (lambda x: W @ x.T, [(Digit(1, 8, 1, 1),)]),
    "merged": (lambda x: x.reshape(48), [(Digit(1, 8, 0, 6),)]),
    "merged behind": (lambda x: x.T.reshape(48), [(Digit(1, 8, 0, 1),)]),
    "divided": (
        lambda x: x.reshape(4, 2, 6),
        [(Digit(2, 4, 0, 1), Digit(1, 2, 1, 1))],
    ),
    "divided and turned": (
        lambda x: x.reshape(4, 2, 6).transpose(1, 0, 2).reshape(8, 6),
        [(Digit(2, 4, 0, 1), Digit(1, 2, 0, 4))],
    ),
    "groups of tokens": (
        lambda x: x.reshape(4, 12),
        [(Digit(2, 4, 0, 1), Digit(1, 2, 1, 6))],
    ),
    "groups, summed inside": (
        lambda x: x.reshape(4, 12).sum(1),
        [(Digit(2, 4, 0, 1),)],
    ),
    "new dimension": (
        lambda x: jnp.broadcast_to(x[None, :, :, None], (3, 8, 6, 2)),
        [(Digit(1, 8, 1, 1),)],
    ),
    "scan": (
        scanned,
        [(Digit(1, 8, 1, 1),), (Digit(1, 8, 0, 1),), (Digit(1, 8, 1, 1),)],
    ),
    "while": (looped, [(Digit(1, 8, 0, 1),)]),
    "cond": (branched, [(Digit(1, 8, 0, 1),)]),
    "remat": (jax.checkpoint(lambda x: jnp.tanh(x @ W)), [(Digit(1, 8, 0, 1),)]),
}


def belongs(shape: tuple[int, ...], place: Place, example: int) -> np.ndarray:
    """The elements of an array that ``place`` says belong to ``example``."""
    mask = np.ones(shape, bool)
    for digit in place:
        along = np.arange(shape[digit.dim]) // digit.stride % digit.size
        own = along == example // digit.of % digit.size
        mask &= np.expand_dims(own, [d for d in range(len(shape)) if d != digit.dim])
    return mask


@pytest.mark.parametrize("name", ALONE)
def test_an_example_changes_its_own_elements_only(name: str) -> None:
    fun, wanted = ALONE[name]
    places, _ = where(fun, f32(EXAMPLES, 6))
    assert places == wanted
    x = np.random.default_rng(1).standard_normal((EXAMPLES, 6)).astype(np.float32)
    before = jax.tree.leaves(fun(x))
    for example in range(EXAMPLES):
        other = x.copy()
        other[example] += 1.0
        for old, new, place in zip(
            before, jax.tree.leaves(fun(other)), places, strict=True
        ):
            changed = np.asarray(old != new)
            assert changed.any()
            assert not (changed & ~belongs(changed.shape, place, example)).any()


MIXED: dict[str, tuple[Callable[..., Any], list[tuple[str, str, bool]]]] = {
    "mean": (lambda x: x.mean(), [("reduction", "sum", True)]),
    "largest": (lambda x: x.max(0), [("reduction", "max", True)]),
    "centred": (lambda x: x - x.mean(0), [("reduction", "sum", True)]),
    "gram matrix": (lambda x: x.T @ x, [("reduction", "sum", True)]),
    "all with all": (lambda x: x @ x.T, [("paired", "", True)]),
    "sorted": (lambda x: jnp.sort(x, axis=0), [("blocked", "", True)]),
    "running sum": (lambda x: jnp.cumsum(x, 0), [("blocked", "", True)]),
    "neighbours": (
        lambda x: x.reshape(4, 2, 6).sum(1),
        [("reduction", "sum", False)],
    ),
    "a loop over examples": (
        lambda x: jax.lax.scan(lambda c, r: (c + r, c), jnp.zeros(6), x)[1],
        [("looped", "", True)],
    ),
    "a carry that turns": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c.T, jnp.hstack([x, x[:, :2]])),
        [("looped", "", True)],
    ),
    "mixed inside": (
        jax.checkpoint(lambda x: x - jnp.sin(x).mean(0)),
        [("inside", "", True)],
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_who_mixes_examples_is_named(name: str) -> None:
    fun, wanted = MIXED[name]
    program = trace(fun, (f32(EXAMPLES, 6),)).program
    found = batch_dims(program, [0], rule_of)
    assert [(m.how, m.operator, m.far) for m in found.mixing] == wanted
    for mixing in found.mixing:
        assert 0 <= mixing.op < len(program.ops)


def test_a_result_that_mixed_has_no_dimension() -> None:
    _, found = where(lambda x: x.reshape(4, 2, 6).sum(0), f32(EXAMPLES, 6))
    (place,) = (p for v, p in found.places.items() if p and p[0].size == 2)
    assert place == (Digit(1, 2, 0, 1),)
    (value,) = (v for v, p in found.places.items() if p == place)
    assert found.dim(value) is None


def test_a_constant_takes_no_part() -> None:
    places, found = where(lambda x: (x * 0.0 + W[:1], jnp.ones((8, 6))), f32(8, 6))
    assert places == [(Digit(1, 8, 0, 1),), ()]
    assert found.mixing == ()


def test_the_length_most_inputs_have_is_the_batch() -> None:
    shapes = (f32(8, 6), f32(6, 6), f32(8), f32())
    program = trace(lambda x, w, y, s: x @ w * s + y[:, None], shapes).program
    assert common_batch_size(program, range(4)) == 8
    assert common_batch_size(program, [1, 3]) == 6
    assert common_batch_size(program, [3]) == 0
    # Of two as frequent, the one with more bytes.
    assert common_batch_size(program, [1, 2]) == 6
    chosen = batch_dims(program, range(4), rule_of, batch_size=8)
    assert [chosen.dim(program.inputs[i]) for i in range(4)] == [0, None, 0, None]


@pytest.mark.parametrize("name", [n for n in FIRST if n != "resnet"])
def test_every_activation_of_the_zoo_has_its_examples(name: str) -> None:
    """Forward and residual values of the batch, but for those that are scalars."""
    found = zoo(name)
    program, known = found.program, found.structure.regions
    dims = batch_dims(program, found.traced.batch_inputs, rule_of)
    assert dims.batch_size == 16
    activations = [
        v
        for i in known.ops(FORWARD, RESIDUAL)
        for v in program.ops[i].results
        if v in known.batch and v not in known.uniform
    ]
    assert len(activations) > 50
    assert [program.values[v] for v in activations if dims.dim(v) is None] == []


def test_batch_norm_is_what_mixes_in_a_resnet() -> None:
    found = zoo("resnet")
    program, known = found.program, found.structure.regions
    dims = batch_dims(program, found.traced.batch_inputs, rule_of)
    ahead = [m for m in dims.mixing if known.of[m.op] in (FORWARD, RESIDUAL)]
    names = [program.ops[m.op].where.name_stack for m in ahead]
    # Mean and mean square of each norm; the loss; the accuracy.
    norms = [n for n in names if "norm" in n.lower()]
    assert len(norms) == 2 * 15
    assert len(names) == len(norms) + 2


def test_gradients_of_a_network_are_sums_over_examples() -> None:
    """Behind the loss nothing mixes but what makes the gradient of a parameter."""
    found = zoo("gpt_unrolled")
    program, known = found.program, found.structure.regions
    dims = batch_dims(program, found.traced.batch_inputs, rule_of)
    ahead = [m for m in dims.mixing if known.of[m.op] == FORWARD]
    behind = [m for m in dims.mixing if known.of[m.op] == BACKWARD]
    assert [program.ops[m.op].kind for m in ahead] == ["reduce_sum"]
    assert len(ahead) + len(behind) == len(dims.mixing)
    assert {m.operator for m in behind} == {"sum"}
    assert len(behind) >= len(known.gradients) - 1


def test_places_inside_a_loop() -> None:
    found = zoo("gpt_scanned")
    program = found.program
    dims = batch_dims(program, found.traced.batch_inputs, rule_of)
    (pair,) = found.structure.loops
    (body,) = dims.inner[pair.forward]
    (program_inside,) = program.ops[pair.forward].programs
    carry = program_inside.inputs[program.ops[pair.forward].param["num_consts"]]
    assert body.dim(carry) == 0
    assert body.mixing == ()
    assert dims.dim(pair.saved[0].value) == 1
