"""A physics-informed network in equinox: Burgers' equation, trained by L-BFGS.

The residual `u_t + u u_x - nu u_xx` at scattered points takes derivatives of the
network (Raissi et al., arXiv 1711.10561), the loss one more; the optimizer's line
search evaluates loss and gradient in a `while` loop until the step is good.
"""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.models.zoo import (
    Batch,
    Metrics,
    Model,
    State,
    make_model,
    pick,
    precision,
)

VISCOSITY = 0.01 / np.pi


@dataclass(frozen=True)
class Config:
    """Hidden layers and their width; points inside, and on the border."""

    width: int
    layers: int
    inside: int
    border: int


SIZES = {
    "tiny": Config(16, layers=2, inside=64, border=16),
    "medium": Config(128, layers=4, inside=8192, border=512),
    # Raissi et al.: 9 layers of 20, 10,000 points; wider, and many more points.
    "large": Config(512, layers=8, inside=1 << 20, border=1 << 14),
}


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, layers=cfg.layers if depth is None else depth)
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=8)
    tx = optax.with_extra_args_support(
        optimizer or optax.lbfgs(memory_size=4, linesearch=search)
    )

    def make(key: jax.Array) -> eqx.nn.MLP:
        return eqx.nn.MLP(
            2, "scalar", cfg.width, cfg.layers, jnp.tanh, dtype=prec.param, key=key
        )

    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    _, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def init(rng: jax.Array) -> State:
        params = eqx.filter(make(rng), eqx.is_array)
        return params, tx.init(params)

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        cast = jax.tree.map(lambda p: p.astype(prec.compute), params)
        net = eqx.combine(cast, static)

        def u(x: jax.Array, t: jax.Array) -> jax.Array:
            return net(jnp.stack([x, t]))

        def residual(point: jax.Array) -> jax.Array:
            x, t = point
            value, (u_x, u_t) = jax.value_and_grad(u, (0, 1))(x, t)
            u_xx = jax.grad(jax.grad(u))(x, t)
            return u_t + value * u_x - VISCOSITY * u_xx

        inside, border, values = (
            batch[k].astype(prec.compute) for k in ("inside", "border", "values")
        )
        residuals = jax.vmap(residual)(inside).astype(prec.param)
        misses = (jax.vmap(net)(border) - values).astype(prec.param)
        return jnp.mean(jnp.square(residuals)) + jnp.mean(jnp.square(misses))

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, opt_state = state

        def value_fn(params: Any) -> jax.Array:
            return loss_fn(params, batch)

        loss, grads = jax.value_and_grad(value_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, grad=grads, value_fn=value_fn
        )
        return (eqx.apply_updates(params, updates), opt_state), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        low, high = (-1.0, 0.0), (1.0, 1.0)
        inside = rng.uniform(low, high, (cfg.inside, 2))
        border = rng.uniform(low, high, (cfg.border, 2))
        border[::2, 1] = 0.0
        border[1::2, 0] = np.sign(border[1::2, 0])
        values = np.where(border[:, 1] == 0, -np.sin(np.pi * border[:, 0]), 0.0)
        points = {"inside": inside, "border": border, "values": values}
        return {k: v.astype(prec.param) for k, v in points.items()}

    batch_shapes = {
        "inside": jax.ShapeDtypeStruct((cfg.inside, 2), prec.param),
        "border": jax.ShapeDtypeStruct((cfg.border, 2), prec.param),
        "values": jax.ShapeDtypeStruct((cfg.border,), prec.param),
    }
    return make_model("pinn", train_step, init, batch_shapes, make_batch)
