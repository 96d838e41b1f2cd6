"""An image in blocks on the GPU's compiler: the edges that are sent, nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import rhino_jax as rhino
from rhino_jax.verify.audit import audit
from rhino_jax.verify.collectives import axes_of
from rhino_jax.verify.compile_only import installed

CLUSTER = "h100:1x8"
IMAGE, CHANNELS = 1024, 32


def convolved(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride,) * 2, "SAME", dimension_numbers=numbers
    )


def train_step(params: Any, image: jax.Array) -> Any:
    """Three convolutions, one by stride 2, and max pooling that overlaps."""

    def loss_of(params: Any) -> jax.Array:
        x = jax.nn.relu(convolved(image, params["first"]))
        x = jax.nn.relu(convolved(x, params["second"], 2))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        return jnp.mean(jnp.square(convolved(x, params["third"])))

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def planned(batch: int = 1) -> rhino.Planned:
    """As many microbatches as images."""
    sizes = {"first": (7, 16), "second": (3, CHANNELS), "third": (3, CHANNELS)}
    params = {
        name: jax.ShapeDtypeStruct((window, window, channels, CHANNELS), jnp.float32)
        for name, (window, channels) in sizes.items()
    }
    image = jax.ShapeDtypeStruct((batch, IMAGE, IMAGE, 16), jnp.float32)
    return rhino.plan(
        train_step,
        params,
        image,
        cluster=CLUSTER,
        mesh={"rows": 8},
        microbatches=batch,
        pins={"image": P(None, "rows")},
        cache_dir="",
    )


ROW = IMAGE * CHANNELS * 4
EDGES = {
    "the image, forward and for the weight": [3 * ROW // 2] * 4,
    "of stride 2, forward and for the weight": [ROW] * 2,
    "of stride 2, back": [ROW // 2],
    "pooling": [ROW // 2],
    "pooling, back": [ROW // 4, 2 * ROW // 2, ROW // 2],
    "the last, forward, for the weight and back": [ROW // 4] * 6,
}
"""Bytes that a device sends: rows of images of 1024, 512 and 256 columns."""


@pytest.mark.parametrize("batch", [1, 2])
def test_the_plan_lists_every_edge_of_every_turn(batch: int) -> None:
    plan = planned(batch).plan
    sent = [c for c in plan.collectives if c.kind == "collective-permute"]
    expected = sorted(size for sizes in EDGES.values() for size in sizes)
    assert sorted(c.wire_bytes for c in sent) == expected
    assert {(c.axes, c.count) for c in sent} == {(("rows",), batch)}


@pytest.mark.compilers
def test_compiled_as_planned() -> None:
    if not installed("cuda"):
        pytest.skip("no compiler for GPUs here")
    found = planned()
    facts = found.compile_only()
    assert facts.ok, facts.message
    shape = found.plan.mesh.shape
    made = audit(found.planned_collectives(), facts, shape)
    assert made.ok, str(made)
    permutes = [one for one in facts.collectives if one.kind == "collective-permute"]
    assert {axes_of(one.groups, shape, pairs=True) for one in permutes} == {("rows",)}
    total = sum(one.total_wire_bytes for one in permutes)
    assert total == sum(sum(sizes) for sizes in EDGES.values())
