"""Small train steps in plain JAX, and what a recipe makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import rhino_jax as rhino
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search.choose import completion
from rhino_jax.search.recipes import RECIPES, Placement, place
from rhino_jax.search.remat import BOUNDARY, NONE
from rhino_jax.search.specs import Spec
from rhino_jax.search.subject import Subject
from rhino_jax.sent import Collective, collectives
from rhino_jax.trace import trace

BATCH, WIDTH, HIDDEN, LAYERS = 16, 8, 32, 3
EXPERTS, CAPACITY, HEADS = 4, 4, 4


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled_peaks(step: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Remat policy -> peak bytes of ``step`` on each of 8 GPUs, by the compiler."""
    peak = {}
    for policy in (NONE, BOUNDARY):
        planned = rhino.plan(
            step,
            *args,
            cluster="h100:1x8",
            mesh={"data": 8},
            recipe="data_parallel",
            remat=policy,
        )
        memory = planned.compile_only().memory
        assert memory is not None
        peak[policy] = memory.peak_bytes
    return peak


@dataclass(frozen=True)
class Made:
    """A step under one recipe, on one mesh."""

    subject: Subject
    mesh: Mesh
    placement: Placement
    assignment: Assignment

    @cached_property
    def sent(self) -> tuple[Collective, ...]:
        """The collectives of the plan, each with its count."""
        return tuple(collectives(self.subject.program, self.assignment, self.mesh))

    def counts(self) -> Counter[str]:
        """How often each kind runs in a step."""
        found: Counter[str] = Counter()
        for c in self.sent:
            found[c.kind] += c.count
        return found

    def written(self) -> Counter[tuple[str, tuple[int, ...]]]:
        """(kind, shape of the whole value) -> how often it runs in a step."""
        found: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for c in self.sent:
            found[c.kind, c.shape] += c.count
        return found

    def input(self, path: str) -> str:
        """The layout of the input at a tree path."""
        return str(self.assignment.inputs[self.subject.input_paths.index(path)])


def subject_of(fun: Callable[..., Any], *args: Any) -> Subject:
    traced = trace(fun, args)
    return Subject(
        traced.program, traced.input_paths, traced.output_paths, traced.state_pairs
    )


def made(
    step: tuple[Callable[..., Any], Any, Any],
    recipe: str,
    pins: Mapping[str, Spec] | None = None,
    **mesh: int,
) -> Made:
    fun, state, batch = step
    subject, grid = subject_of(fun, state, batch), Mesh.of(**mesh)
    placement = place(RECIPES[recipe], subject, grid)
    return Made(subject, grid, *completion(placement, subject, grid, pins or {}))


def with_momentum(loss: Callable[[Any, Any], jax.Array]) -> Callable[..., Any]:
    """A step of momentum SGD on ``{"params", "slots"}``."""

    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state["params"], batch)
        return updated(state, grads), {"loss": value}

    return step


def updated(state: Any, grads: Any) -> Any:
    slots = jax.tree.map(lambda m, g: 0.9 * m + g, state["slots"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], slots)
    return {"params": params, "slots": slots}


def state_of(params: Any) -> Any:
    return {"params": params, "slots": params}


# ---- a scanned, rematerialized residual MLP ---------------------------------------


def mlp_loss(params: Any, batch: Any) -> jax.Array:
    @jax.checkpoint
    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        h = jnp.tanh(x @ layer["up"])
        h = checkpoint_name(h, "hidden")
        return x + h @ layer["down"], None

    x, _ = jax.lax.scan(block, batch["x"], params["layers"])
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


MLP_PARAMS = {
    "layers": {"up": f32(LAYERS, WIDTH, HIDDEN), "down": f32(LAYERS, HIDDEN, WIDTH)},
    "head": f32(WIDTH, WIDTH),
}
MLP_BATCH = {"x": f32(BATCH, WIDTH), "y": f32(BATCH, WIDTH)}
MLP = (with_momentum(mlp_loss), state_of(MLP_PARAMS), MLP_BATCH)


# ---- gradients accumulated over microbatches by the user ---------------------------

MICROBATCHES = 4


def plain_loss(params: Any, batch: Any) -> jax.Array:
    h = jnp.tanh(batch["x"] @ params["up"])
    return jnp.mean((h @ params["down"] - batch["y"]) ** 2)


def rows_inside(x: jax.Array) -> jax.Array:
    """Microbatch m takes the rows m, m + M, ...: each device keeps its own rows."""
    return x.reshape(-1, MICROBATCHES, *x.shape[1:]).swapaxes(0, 1)


def rows_outside(x: jax.Array) -> jax.Array:
    """Microbatch m takes the m-th block of rows: the way most people write it."""
    return x.reshape(MICROBATCHES, -1, *x.shape[1:])


def accumulated(
    loss: Callable[[Any, Any], jax.Array], cut: Callable[[jax.Array], jax.Array]
) -> Callable[..., Any]:
    def step(state: Any, batch: Any) -> Any:
        def one(total: Any, part: Any) -> tuple[Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(state["params"], part)
            return jax.tree.map(jnp.add, total, grads), value

        zeros = jax.tree.map(jnp.zeros_like, state["params"])
        parts = jax.tree.map(cut, batch)
        grads, losses = jax.lax.scan(one, zeros, parts)
        grads = jax.tree.map(lambda g: g / MICROBATCHES, grads)
        return updated(state, grads), {"loss": jnp.mean(losses)}

    return step


PLAIN_PARAMS = {"up": f32(WIDTH, HIDDEN), "down": f32(HIDDEN, WIDTH)}


# ---- one attention layer with a fused projection ------------------------------------


def attention_loss(params: Any, batch: Any) -> jax.Array:
    x = batch["x"]
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)

    def heads(a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[:2], HEADS, WIDTH // HEADS)

    scores = jnp.einsum("bqhd,bkhd->bhqk", heads(q), heads(k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads(v))
    return jnp.mean((mixed.reshape(x.shape) @ params["out"] - batch["y"]) ** 2)


ATTENTION = (
    with_momentum(attention_loss),
    state_of({"qkv": f32(WIDTH, 3 * WIDTH), "out": f32(WIDTH, WIDTH)}),
    {"x": f32(BATCH, 6, WIDTH), "y": f32(BATCH, 6, WIDTH)},
)


# ---- a mixture of experts, dispatched by one-hot einsums ----------------------------


def moe_loss(params: Any, batch: Any) -> jax.Array:
    x = batch["x"]
    gates = jax.nn.softmax(x @ params["router"])
    # [batch, token, expert, capacity]: token t fills slot t of each expert.
    dispatch = gates[..., None] * jnp.eye(CAPACITY)[None, :, None, :]
    slots = jnp.einsum("bsec,bsm->ebcm", dispatch, x)
    hidden = jnp.tanh(jnp.einsum("ebcm,emh->ebch", slots, params["up"]))
    out = jnp.einsum("ebch,ehm->ebcm", hidden, params["down"])
    y = jnp.einsum("bsec,ebcm->bsm", dispatch, out)
    return jnp.mean((y - batch["y"]) ** 2)


MOE = (
    with_momentum(moe_loss),
    state_of(
        {
            "router": f32(WIDTH, EXPERTS),
            "up": f32(EXPERTS, WIDTH, HIDDEN),
            "down": f32(EXPERTS, HIDDEN, WIDTH),
        }
    ),
    {"x": f32(BATCH, CAPACITY, WIDTH), "y": f32(BATCH, CAPACITY, WIDTH)},
)
