"""A step with every kind of nesting, and how to run it under random pins."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.program import jit_step
from rhino_jax.search.pins import pinned
from rhino_jax.search.recipes import RECIPES, completed, place
from rhino_jax.search.specs import Spec
from rhino_jax.search.subject import Subject
from rhino_jax.trace import Traced, trace

BATCH, WIDTH, HIDDEN, LAYERS, OUT = 8, 8, 16, 2, 6


@jax.custom_vjp
def damped(x: jax.Array) -> jax.Array:
    """The identity, with half the gradient."""
    return x * 1.0


damped.defvjp(lambda x: (x * 1.0, None), lambda _, g: (0.5 * g,))


@partial(jax.jit, static_argnames="rate")
def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def loss_of(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    @jax.checkpoint
    def block(x: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        layer, key = xs
        with jax.named_scope("hidden_layer"):
            h = checkpoint_name(jnp.tanh(x @ layer["up"] + layer["bias"]), "hidden")
        x = x + dropout(h, key, 0.25) @ layer["down"]
        return x, jnp.sum(h * h, axis=-1)

    keys = jax.random.split(batch["key"], LAYERS)
    x, norms = jax.lax.scan(block, batch["x"], (params["layers"], keys))
    logits = damped(x) @ params["head"]
    logs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logs, batch["label"][:, None], axis=-1)
    return -jnp.mean(picked), jnp.mean(norms)


def largest(matrix: jax.Array) -> jax.Array:
    """The square root of the largest singular value's square, by power iteration."""

    def go_on(held: Any) -> jax.Array:
        _, before, now, turn = held
        return (jnp.abs(now - before) > 1e-3 * now) & (turn < 20)

    def turn(held: Any) -> Any:
        v, _, now, count = held
        u = matrix @ v
        v = matrix.T @ (u / jnp.linalg.norm(u))
        return v / jnp.linalg.norm(v), now, jnp.linalg.norm(v), count + 1

    start = jnp.ones(matrix.shape[1]) / matrix.shape[1] ** 0.5
    return jax.lax.while_loop(go_on, turn, (start, 0.0, 1.0, 0))[2]


def train_step(state: Any, batch: Any) -> Any:
    """Momentum, a warm-up by ``cond``, a step size by ``while``."""
    (loss, norm), grads = jax.value_and_grad(loss_of, has_aux=True)(
        state["params"], batch
    )
    size = 0.1 / (1.0 + largest(state["params"]["head"]))
    slots = jax.lax.cond(
        state["count"] < 2,
        lambda slots, grads: grads,
        lambda slots, grads: jax.tree.map(lambda m, g: 0.9 * m + g, slots, grads),
        state["slots"],
        grads,
    )
    params = jax.tree.map(lambda p, m: p - size * m, state["params"], slots)
    new = {"params": params, "slots": slots, "count": state["count"] + 1}
    return new, {"loss": loss, "norm": norm, "size": size}


@cache
def arguments(count: int = 1) -> tuple[Any, Any]:
    draw = np.random.default_rng(0).normal
    shapes = {
        "layers": {
            "up": (LAYERS, WIDTH, HIDDEN),
            "bias": (LAYERS, HIDDEN),
            "down": (LAYERS, HIDDEN, WIDTH),
        },
        "head": (WIDTH, OUT),
    }
    params = jax.tree.map(
        lambda s: draw(size=s).astype(np.float32) / 3,
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    slots = jax.tree.map(lambda p: p * 0.1, params)
    batch = {
        "x": draw(size=(BATCH, WIDTH)).astype(np.float32),
        "label": np.arange(BATCH, dtype=np.int32) % OUT,
        "key": jax.random.key(7),
    }
    state = {"params": params, "slots": slots, "count": np.int32(count)}
    return state, batch


@cache
def traced() -> tuple[Traced, Subject]:
    found = trace(train_step, arguments())
    subject = Subject(
        found.program, found.input_paths, found.output_paths, found.state_pairs
    )
    return found, subject


def random_pins(rng: random.Random, mesh: Mesh) -> dict[str, Spec]:
    """Some inputs, and the named activation, split where they divide."""
    _, subject = traced()
    shapes = {path: subject.shape(i) for i, path in enumerate(subject.input_paths)}
    shapes["hidden"] = (BATCH, HIDDEN)
    chosen = rng.sample(sorted(shapes), 5)
    pins = {}
    for path in chosen:
        free = rng.sample(mesh.names, len(mesh.names))
        spec: list[tuple[str, ...]] = []
        for n in shapes[path]:
            axes: tuple[str, ...] = ()
            while free and rng.random() < 0.6:
                if n % mesh.group_size((*axes, free[-1])):
                    break
                axes = (*axes, free.pop())
            spec.append(axes)
        pins[path] = tuple(spec)
    return pins


def lowered(
    recipe: str,
    mesh: Mesh,
    jax_mesh: Any,
    pins: Mapping[str, Spec],
    lowering: str = "manual",
) -> Any:
    """The jitted step on flat leaves."""
    found, subject = traced()
    placement, named = pinned(
        place(RECIPES[recipe], subject, mesh), subject, mesh, pins
    )
    assignment = completed(placement, subject, mesh, named)
    return jit_step(found.program, assignment, mesh, jax_mesh, (), lowering)


def flat(args: Any) -> list[Any]:
    return [*jax.tree.leaves((args, {})), *traced()[0].constants]


@cache
def expected(count: int) -> list[np.ndarray]:
    return [
        np.asarray(x) for x in jax.tree.leaves(jax.jit(train_step)(*arguments(count)))
    ]


def check_equal(jitted: Any) -> None:
    """Both branches of the ``cond``: the first step and a later one."""
    for count in (1, 5):
        found = jitted(*flat(arguments(count)))
        for path, have, want in zip(
            traced()[0].output_paths, found, expected(count), strict=True
        ):
            np.testing.assert_allclose(
                have, want, rtol=1e-4, atol=1e-6, err_msg=f"{path}, count {count}"
            )
