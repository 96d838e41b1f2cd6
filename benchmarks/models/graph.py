"""Graph network in haiku: messages along edges, summed where they arrive, adam.

Graphs of a batch are one graph of many parts, as jraph has them: `senders` and
`receivers` index all nodes. `large` is the network of MeshGraphNets (Pfaff et al.,
arXiv 2010.03409) on 64 graphs of the size of its flow around a cylinder.
"""

from dataclasses import dataclass, replace
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.models.zoo import (
    Batch,
    Metrics,
    Model,
    State,
    ints,
    make_model,
    pick,
    precision,
)


@dataclass(frozen=True)
class Config:
    """Sizes; `nodes` and `edges` are those of one graph, `steps` of messages."""

    nodes: int
    edges: int
    features: int
    latent: int
    steps: int
    graphs: int


SIZES = {
    "tiny": Config(8, 32, features=8, latent=32, steps=2, graphs=16),
    "medium": Config(512, 2048, features=16, latent=128, steps=4, graphs=16),
    "large": Config(2048, 12288, features=16, latent=128, steps=15, graphs=64),
}


def mlp(cfg: Config, x: jax.Array) -> jax.Array:
    """Two hidden layers and a norm."""
    sizes = (cfg.latent,) * 3
    x = hk.nets.MLP(sizes, activation=jax.nn.silu)(x)
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)


def forward(batch: Batch, cfg: Config) -> jax.Array:
    """What every node is predicted to become, `[N, features]`."""
    senders, receivers = batch["senders"], batch["receivers"]
    nodes, edges = mlp(cfg, batch["nodes"]), mlp(cfg, batch["edges"])
    for _ in range(cfg.steps):
        ends = [edges, nodes[senders], nodes[receivers]]
        edges = edges + mlp(cfg, jnp.concatenate(ends, axis=-1))
        arrived = jax.ops.segment_sum(edges, receivers, nodes.shape[0])
        nodes = nodes + mlp(cfg, jnp.concatenate([nodes, arrived], axis=-1))
    sizes = (cfg.latent, cfg.latent, cfg.features)
    return hk.nets.MLP(sizes, activation=jax.nn.silu)(nodes)


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. `depth` counts steps."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    cfg = replace(cfg, steps=cfg.steps if depth is None else depth)
    net = hk.without_apply_rng(hk.transform(lambda batch: forward(batch, cfg)))
    tx = optimizer or optax.adam(1e-3)
    nodes, edges = cfg.graphs * cfg.nodes, cfg.graphs * cfg.edges
    shapes = {
        "nodes": jax.ShapeDtypeStruct((nodes, cfg.features), prec.param),
        "edges": jax.ShapeDtypeStruct((edges, 4), prec.param),
        "senders": ints(edges),
        "receivers": ints(edges),
        "targets": jax.ShapeDtypeStruct((nodes, cfg.features), prec.param),
    }

    def init(rng: jax.Array) -> State:
        one = {k: jnp.zeros((1, *s.shape[1:]), s.dtype) for k, s in shapes.items()}
        params = net.init(rng, one)
        return params, tx.init(params)

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        def cast(x: Any) -> Any:
            whole = jnp.issubdtype(x.dtype, jnp.integer)
            return x if whole else jnp.asarray(x, prec.compute)

        predicted = net.apply(*jax.tree.map(cast, (params, dict(batch))))
        return jnp.mean(jnp.square(predicted.astype(prec.param) - batch["targets"]))

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        part = np.repeat(np.arange(cfg.graphs) * cfg.nodes, cfg.edges)
        ends = rng.integers(0, cfg.nodes, (2, edges))
        senders, receivers = (part + ends).astype(np.int32)
        at = rng.standard_normal((nodes, cfg.features))
        apart = at[senders, :3] - at[receivers, :3]
        far = np.linalg.norm(apart, axis=-1, keepdims=True)
        targets = 0.5 * at
        np.add.at(targets, receivers, 0.2 * at[senders])
        return {
            "nodes": at.astype(prec.param),
            "edges": np.concatenate([apart, far], axis=-1).astype(prec.param),
            "senders": senders,
            "receivers": receivers,
            "targets": targets.astype(prec.param),
        }

    return make_model("graph", train_step, init, shapes, make_batch)
