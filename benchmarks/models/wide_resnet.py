"""Wide ResNet in flax nnx: bottlenecks twice as wide, batch norm, SGD momentum.

`large` is Wide-ResNet-50-2 (Zagoruyko and Komodakis, arXiv 1605.07146). Batch norm
changes its statistics in place; the step splits and merges, as nnx has it.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.models.resnet import shallow
from benchmarks.models.zoo import (
    Batch,
    Metrics,
    Model,
    Precision,
    State,
    ints,
    labelled_images,
    make_model,
    pick,
    precision,
)


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the global batch; `stages` counts blocks."""

    image: int
    width: int
    wider: int
    stages: tuple[int, ...]
    classes: int
    batch: int


SIZES = {
    "tiny": Config(16, 8, 2, (1, 1), classes=16, batch=16),
    "medium": Config(64, 64, 2, (1, 1), classes=1024, batch=64),
    "large": Config(224, 64, 2, (3, 4, 6, 3), classes=1000, batch=256),
}


class ConvNorm(nnx.Module):
    """A convolution and batch norm."""

    def __init__(
        self, ins: int, outs: int, kernel: int, stride: int, prec: Precision,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        kw = {"dtype": prec.compute, "param_dtype": prec.param, "rngs": rngs}
        size, strides = (kernel, kernel), (stride, stride)
        self.conv = nnx.Conv(ins, outs, size, strides, use_bias=False, **kw)
        self.norm = nnx.BatchNorm(outs, momentum=0.9, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions around a skip, projected where shapes differ."""

    def __init__(
        self, ins: int, filters: int, stride: int, cfg: Config, prec: Precision,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        inner, outs = cfg.wider * filters, 4 * filters
        self.first = ConvNorm(ins, inner, 1, 1, prec, rngs)
        self.second = ConvNorm(inner, inner, 3, stride, prec, rngs)
        self.third = ConvNorm(inner, outs, 1, 1, prec, rngs)
        self.project = (
            ConvNorm(ins, outs, 1, stride, prec, rngs)
            if ins != outs or stride != 1
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.second(nnx.relu(self.first(x))))
        y = self.third(y)
        return nnx.relu(y + (x if self.project is None else self.project(x)))


class WideResNet(nnx.Module):
    """Images `[B, I, I, 3]` to logits `[B, classes]`."""

    def __init__(self, cfg: Config, prec: Precision, rngs: nnx.Rngs) -> None:
        self.stem = ConvNorm(3, cfg.width, 7, 2, prec, rngs)
        blocks, ins = [], cfg.width
        for stage, count in enumerate(cfg.stages):
            filters = cfg.width * 2**stage
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(ins, filters, stride, cfg, prec, rngs))
                ins = 4 * filters
        self.blocks = nnx.List(blocks)
        kw = {"dtype": prec.compute, "param_dtype": prec.param, "rngs": rngs}
        self.head = nnx.Linear(ins, cfg.classes, **kw)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(images))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def build(
    size: str = "tiny",
    *,
    depth: int | None = None,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Build the model; see `benchmarks.models.build`. `depth` counts blocks."""
    cfg, prec = pick(SIZES, size), precision(dtype)
    if depth is not None:
        cfg = replace(cfg, stages=shallow(cfg.stages, depth))
    tx = optimizer or optax.sgd(0.02, momentum=0.9, nesterov=True)

    def create(rng: jax.Array) -> tuple[WideResNet, nnx.Optimizer[WideResNet]]:
        model = WideResNet(cfg, prec, nnx.Rngs(rng))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    graphdef = nnx.graphdef(nnx.eval_shape(create, jax.random.key(0)))

    def init(rng: jax.Array) -> State:
        return jax.tree.map(_floats(prec.param), nnx.state(create(rng)))

    def loss_fn(model: WideResNet, batch: Batch) -> jax.Array:
        logits = model(batch["images"]).astype(prec.param)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        )
        return losses.mean()

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        model, opt = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        opt.update(model, grads)
        return nnx.state((model, opt)), {"loss": loss}

    def make_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return labelled_images(rng, cfg.batch, cfg.image, cfg.classes, prec.param)

    images = (cfg.batch, cfg.image, cfg.image, 3)
    shapes = {
        "images": jax.ShapeDtypeStruct(images, prec.param),
        "labels": ints(cfg.batch),
    }
    return make_model("wide_resnet", train_step, init, shapes, make_batch)


def _floats(dtype: Any) -> Any:
    """Batch norm makes its statistics float32 whatever `param_dtype` says."""
    return lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
