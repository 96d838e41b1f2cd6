"""A diffusion transformer in flax nnx: noise drawn in the step, an average of weights.

DiT on latents (Peebles and Xie, arXiv 2212.09748): every block is shifted and scaled by
time and class. The step draws times and noise, drops classes at random, and keeps an
exponential moving average of the parameters.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.models.zoo import (
    Batch,
    Metrics,
    Model,
    Precision,
    State,
    ints,
    make_model,
    pick,
    precision,
)


@dataclass(frozen=True)
class Config:
    """Sizes; `image` is the side of the latents, which have `channels`."""

    image: int
    channels: int
    patch: int
    hidden: int
    heads: int
    layers: int
    classes: int
    batch: int
    times: int = 1000
    decay: float = 0.999

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.image // self.patch


SIZES = {
    "tiny": Config(8, 4, 2, hidden=32, heads=4, layers=2, classes=7, batch=16),
    "medium": Config(16, 4, 2, hidden=512, heads=8, layers=4, classes=1000, batch=64),
    "large": Config(32, 4, 2, 1152, heads=16, layers=28, classes=1000, batch=256),
}  # fmt: skip


class Block(nnx.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, cfg: Config, prec: Precision, rngs: nnx.Rngs) -> None:
        kw = {"dtype": prec.compute, "param_dtype": prec.param, "rngs": rngs}
        plain = {"use_bias": False, "use_scale": False, **kw}
        # DiT starts from zero here; from little, all of it learns from the start.
        small = nnx.initializers.normal(0.02)
        h = cfg.hidden
        self.condition = nnx.Linear(h, 6 * h, kernel_init=small, **kw)
        self.norm1 = nnx.LayerNorm(h, **plain)
        self.heads = cfg.heads
        self.qkv = nnx.Linear(h, 3 * h, **kw)
        self.mixed = nnx.Linear(h, h, **kw)
        self.norm2 = nnx.LayerNorm(h, **plain)
        self.up = nnx.Linear(h, 4 * h, **kw)
        self.down = nnx.Linear(4 * h, h, **kw)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        parts = jnp.split(self.condition(nnx.silu(condition)), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (p[:, None] for p in parts)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attend(y)
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(nnx.gelu(self.up(y)))

    def attend(self, x: jax.Array) -> jax.Array:
        """Self-attention by one fused projection, three times the heads."""
        b, s, h = x.shape
        parts = self.qkv(x).reshape(b, s, 3, self.heads, h // self.heads)
        q, k, v = (parts[:, :, i] for i in range(3))
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k) * (h // self.heads) ** -0.5
        y = jnp.einsum("bnqk,bknd->bqnd", nnx.softmax(scores), v)
        return self.mixed(y.reshape(b, s, h))


class DiT(nnx.Module):
    """Noised latents `[B, I, I, C]`, times and classes `[B]` to the noise in them."""

    def __init__(self, cfg: Config, prec: Precision, rngs: nnx.Rngs) -> None:
        self.cfg, self.compute = cfg, prec.compute
        kw = {"dtype": prec.compute, "param_dtype": prec.param, "rngs": rngs}
        h, patch = cfg.hidden, (cfg.patch, cfg.patch)
        self.patches = nnx.Conv(cfg.channels, h, patch, patch, padding="VALID", **kw)
        self.places = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (cfg.side**2, h), prec.param)
        )
        self.time1 = nnx.Linear(2 * (h // 4), h, **kw)
        self.time2 = nnx.Linear(h, h, **kw)
        self.classes = nnx.Embed(cfg.classes + 1, h, **kw)
        self.blocks = nnx.List([Block(cfg, prec, rngs) for _ in range(cfg.layers)])
        self.norm = nnx.LayerNorm(h, use_bias=False, use_scale=False, **kw)
        self.condition = nnx.Linear(h, 2 * h, **kw)
        self.out = nnx.Linear(h, cfg.patch**2 * cfg.channels, **kw)

    def __call__(self, x: jax.Array, times: jax.Array, labels: jax.Array) -> jax.Array:
        cfg = self.cfg
        b, s, p = x.shape[0], cfg.side, cfg.patch
        x = self.patches(x).reshape(b, s * s, cfg.hidden)
        x = x + self.places.astype(self.compute)
        waves = sinusoids(times, cfg.hidden // 4, self.compute)
        condition = self.time2(nnx.silu(self.time1(waves))) + self.classes(labels)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = jnp.split(self.condition(nnx.silu(condition)), 2, axis=-1)
        x = self.out(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(b, s, s, p, p, cfg.channels)
        return jnp.einsum("bhwpqc->bhpwqc", x).reshape(b, s * p, s * p, cfg.channels)


def sinusoids(times: jax.Array, count: int, dtype: Any) -> jax.Array:
    """Cosines and sines of `times` at `count` frequencies, `[B, 2 count]`."""
    rates = np.exp(-np.log(10000.0) * np.arange(count) / count)
    angles = times[:, None].astype(dtype) * jnp.asarray(rates, dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


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
    tx = optimizer or optax.adamw(1e-3, weight_decay=0.0)
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, cfg.times))

    def create(rng: jax.Array) -> tuple[DiT, nnx.Optimizer[DiT]]:
        model = DiT(cfg, prec, nnx.Rngs(rng))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    abstract = nnx.eval_shape(create, jax.random.key(0))
    model_def, opt_def = (nnx.graphdef(part) for part in abstract)

    def params_of(model: DiT) -> Any:
        return nnx.state(model, nnx.Param)

    def state_of(model: DiT, opt: nnx.Optimizer[DiT], average: Any) -> State:
        parts = {"params": nnx.state(model), "optimizer": nnx.state(opt)}
        return {**parts, "average": average}

    def init(rng: jax.Array) -> State:
        model, opt = create(rng)
        return state_of(model, opt, jax.tree.map(jnp.copy, params_of(model)))

    def loss_fn(model: DiT, key: jax.Array, batch: Batch) -> jax.Array:
        latents = batch["latents"]
        k1, k2, k3 = jax.random.split(key, 3)
        times = jax.random.randint(k1, (latents.shape[0],), 0, cfg.times)
        noise = jax.random.normal(k2, latents.shape, latents.dtype)
        dropped = jax.random.bernoulli(k3, 0.1, (latents.shape[0],))
        labels = jnp.where(dropped, cfg.classes, batch["labels"])
        share = jnp.asarray(kept, prec.param)[times][:, None, None, None]
        mixed = jnp.sqrt(share) * latents + jnp.sqrt(1 - share) * noise
        found = model(mixed.astype(prec.compute), times, labels)
        return jnp.mean(jnp.square(found.astype(prec.param) - noise))

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        model = nnx.merge(model_def, state["params"])
        opt = nnx.merge(opt_def, state["optimizer"])
        key = jax.random.fold_in(jax.random.key(0), opt.step[...])
        loss, grads = nnx.value_and_grad(loss_fn)(model, key, batch)
        opt.update(model, grads)
        average = optax.incremental_update(
            params_of(model), state["average"], 1 - cfg.decay
        )
        return state_of(model, opt, average), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        labels = rng.integers(0, cfg.classes, cfg.batch, dtype=np.int32)
        shape = (cfg.batch, cfg.image, cfg.image, cfg.channels)
        tint = np.cos(labels)[:, None, None, None]
        latents = tint + 0.5 * rng.standard_normal(shape)
        return {"latents": latents.astype(prec.param), "labels": labels}

    latents = (cfg.batch, cfg.image, cfg.image, cfg.channels)
    shapes = {
        "latents": jax.ShapeDtypeStruct(latents, prec.param),
        "labels": ints(cfg.batch),
    }
    states = state_of(*abstract, params_of(abstract[0]))
    return make_model("diffusion", train_step, init, shapes, make_batch, states)
