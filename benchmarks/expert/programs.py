"""Programs whose best plans are published: dense, attention, experts, convolutions.

Each function gives ``(step, state_shapes, batch_shapes)``; steps train with Adam on a
mean squared error, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

Built = tuple[Callable[..., Any], Any, Any]
Params = Mapping[str, Any]
HEADS = 8


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def trained(loss_of: Callable[[Any, Any], jax.Array], params: Any, batch: Any) -> Built:
    """A step of Adam on ``loss_of``."""
    optimizer = optax.adam(1e-3)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, loss

    opt = jax.eval_shape(optimizer.init, params)
    return step, {"params": params, "opt": opt}, batch


def squared(found: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.mean((found - expected) ** 2)


# ---- dense -------------------------------------------------------------------------


def mlp_loss(layers: int) -> Callable[[Any, Any], jax.Array]:
    def loss_of(params: Params, batch: Params) -> jax.Array:
        x = batch["x"]
        for i in range(layers):
            x = x @ params[f"w{i}"] + params[f"b{i}"]
            x = jax.nn.relu(x)
        return squared(x, batch["y"])

    return loss_of


def mlp_params(layers: int, hidden: int) -> dict[str, Any]:
    weights = {f"w{i}": f32(hidden, hidden) for i in range(layers)}
    return weights | {f"b{i}": f32(hidden) for i in range(layers)}


def mlp(batch: int, hidden: int, layers: int = 6) -> Built:
    data = {"x": f32(batch, hidden), "y": f32(batch, hidden)}
    return trained(mlp_loss(layers), mlp_params(layers, hidden), data)


def plain_mlp(batch: int, hidden: int, layers: int) -> Built:
    """Without biases."""

    def loss_of(params: Params, data: Params) -> jax.Array:
        x = data["x"]
        for i in range(layers):
            x = jax.nn.relu(x @ params[f"w{i}"])
        return squared(x, data["y"])

    params = {f"w{i}": f32(hidden, hidden) for i in range(layers)}
    return trained(loss_of, params, {"x": f32(batch, hidden), "y": f32(batch, hidden)})


def accumulate(batch: int, hidden: int, layers: int = 6) -> Built:
    """The user's own accumulation: gradients of a microbatch added to the held ones."""
    loss_of = mlp_loss(layers)

    def step(held: Any, params: Any, data: Any) -> Any:
        return jax.tree.map(jnp.add, held, jax.grad(loss_of)(params, data))

    params = mlp_params(layers, hidden)
    data = {"x": f32(batch, hidden), "y": f32(batch, hidden)}
    return step, params, (params, data)


# ---- attention ---------------------------------------------------------------------


def layer_norm(x: jax.Array, params: Params, name: str) -> jax.Array:
    centered = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(centered**2, -1, keepdims=True)
    scaled = centered * jax.lax.rsqrt(variance + 1e-6)
    return scaled * params[f"{name}_scale"] + params[f"{name}_bias"]


def attention(x: jax.Array, params: Params, heads: int) -> jax.Array:
    batch, length, hidden = x.shape
    q, k, v = (
        (x @ params[name]).reshape(batch, length, heads, hidden // heads)
        for name in ("q", "k", "v")
    )
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
    return mixed.reshape(x.shape) @ params["out"]


def bert_layer(x: jax.Array, params: Params) -> jax.Array:
    """Post-norm, as BERT is."""
    x = layer_norm(x + attention(x, params, HEADS), params, "norm1")
    inner = jax.nn.gelu(x @ params["fc1"]) @ params["fc2"]
    return layer_norm(x + inner, params, "norm2")


def bert_params(hidden: int) -> dict[str, Any]:
    square = {name: f32(hidden, hidden) for name in ("q", "k", "v", "out")}
    norms = {
        f"{norm}_{part}": f32(hidden)
        for norm in ("norm1", "norm2")
        for part in ("scale", "bias")
    }
    wide = {"fc1": f32(hidden, 4 * hidden), "fc2": f32(4 * hidden, hidden)}
    return square | norms | wide


def bert(batch: int, length: int, hidden: int, layers: int = 2) -> Built:
    def loss_of(params: Any, data: Params) -> jax.Array:
        x = data["x"]
        for layer in params:
            x = bert_layer(x, layer)
        return squared(x, data["y"])

    shape = f32(batch, length, hidden)
    params = [bert_params(hidden) for _ in range(layers)]
    return trained(loss_of, params, {"x": shape, "y": shape})


def tied_embedding(batch: int, length: int, vocab: int, hidden: int) -> Built:
    def loss_of(params: Params, data: Params) -> jax.Array:
        x = params["embedding"][data["tokens"]]
        logits = x @ params["embedding"].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["tokens"])
        return losses.mean()

    tokens = {"tokens": i32(batch, length)}
    return trained(loss_of, {"embedding": f32(vocab, hidden)}, tokens)


def attention_forward(batch: int, length: int, hidden: int, heads: int) -> Built:
    """Forward only; its output is wanted whole (the caller pins it)."""

    def step(params: Params, data: Params) -> jax.Array:
        return checkpoint_name(attention(data["x"], params, heads), "result")

    params = {name: f32(hidden, hidden) for name in ("q", "k", "v", "out")}
    return step, params, {"x": f32(batch, length, hidden)}


# ---- experts -----------------------------------------------------------------------


def moe(
    batch: int, length: int, hidden: int, experts: int, group: int, capacity: int
) -> Built:
    """One GShard-style layer: top-1 tokens dispatched by one-hot einsums."""

    def loss_of(params: Params, data: Params) -> jax.Array:
        x = data["x"].reshape(-1, group, hidden)
        gates = jax.nn.softmax(jnp.einsum("gsm,me->gse", x, params["gate"]))
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), experts)
        place = jnp.cumsum(chosen, axis=1) * chosen - chosen
        slots = jax.nn.one_hot(place.sum(-1).astype(jnp.int32), capacity)
        mask = jax.lax.stop_gradient(chosen[..., None] * slots[..., None, :])
        combine = jnp.sum(gates * chosen, -1)[..., None, None] * mask
        sent = jnp.einsum("gsec,gsm->egcm", mask, x)
        inner = jax.nn.relu(jnp.einsum("egcm,emh->egch", sent, params["up"]))
        back = jnp.einsum("egch,ehm->egcm", inner, params["down"])
        out = jnp.einsum("gsec,egcm->gsm", combine, back)
        return squared(out.reshape(data["x"].shape), data["y"])

    params = {
        "gate": f32(hidden, experts),
        "up": f32(experts, hidden, 4 * hidden),
        "down": f32(experts, 4 * hidden, hidden),
    }
    shape = f32(batch, length, hidden)
    return trained(loss_of, params, {"x": shape, "y": shape})


# ---- convolutions, odds and ends -------------------------------------------------


def convolved(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def conv(
    batch: int, image: int, channels: int, layers: int, norm: bool, size: int = 3
) -> Built:
    def loss_of(params: Params, data: Params) -> jax.Array:
        x = data["x"]
        for i in range(layers):
            x = convolved(x, params[f"k{i}"])
            if norm:
                mean = jnp.mean(x, (0, 1, 2))
                variance = jnp.mean((x - mean) ** 2, (0, 1, 2))
                x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
                x = x * params[f"scale{i}"] + params[f"bias{i}"]
            x = jax.nn.relu(x)
        return squared(x, data["y"])

    params = {f"k{i}": f32(size, size, channels, channels) for i in range(layers)}
    if norm:
        params |= {f"scale{i}": f32(channels) for i in range(layers)}
        params |= {f"bias{i}": f32(channels) for i in range(layers)}
    shape = f32(batch, image, image, channels)
    return trained(loss_of, params, {"x": shape, "y": shape})


def depthwise(batch: int, image: int, channels: int) -> Built:
    """Pointwise, depthwise, pointwise."""

    def loss_of(params: Params, data: Params) -> jax.Array:
        x = jax.nn.relu(convolved(data["x"], params["first"]))
        x = jax.nn.relu(convolved(x, params["each"], channels))
        return squared(convolved(x, params["last"]), data["y"])

    params = {
        "first": f32(1, 1, channels, channels),
        "each": f32(3, 3, 1, channels),
        "last": f32(1, 1, channels, channels),
    }
    shape = f32(batch, image, image, channels)
    return trained(loss_of, params, {"x": shape, "y": shape})


def dropout_mlp(batch: int, hidden: int) -> Built:
    def loss_of(params: Params, data: Params) -> jax.Array:
        x = jax.nn.relu(data["x"] @ params["w0"])
        kept = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape)
        return squared(jnp.where(kept, x / 0.9, 0.0) @ params["w1"], data["y"])

    params = {"w0": f32(hidden, hidden), "w1": f32(hidden, hidden)}
    return trained(loss_of, params, {"x": f32(batch, hidden), "y": f32(batch, hidden)})


def embedding(batch: int, length: int, vocab: int, hidden: int) -> Built:
    def loss_of(params: Params, data: Params) -> jax.Array:
        return squared(params["table"][data["tokens"]], data["y"])

    data = {"tokens": i32(batch, length), "y": f32(batch, length, hidden)}
    return trained(loss_of, {"table": f32(vocab, hidden)}, data)


def reshaped(rows: int, columns: int) -> Built:
    """An elementwise op, a reshape and a maximum's place along the rows."""

    def step(state: Any, data: Params) -> Any:
        del state
        found = jnp.argmax(data["x"], axis=0)
        return None, (data["x"] * 2.0).reshape(-1), found

    return step, None, {"x": f32(rows, columns)}


def two_products(rows: int, inner: int) -> Built:
    def step(state: Params, data: Params) -> Any:
        x, y = data["x"], state["y"]
        return state, jax.nn.relu(x @ y + x @ y)

    return step, {"y": f32(inner, rows)}, {"x": f32(rows, inner)}
