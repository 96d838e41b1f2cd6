"""The count of what has rules of its own: it sees what has none."""

import json
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rhino_jax as rhino
from benchmarks.coverage import cell, of_row, shares
from rhino_jax.cluster.parse import parse_cluster

CLUSTER = "h100:1x8"
X = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
W = jax.ShapeDtypeStruct((512, 512), jnp.float32)
WORDS = jax.ShapeDtypeStruct((4,), jnp.uint32)


def counted(step: Any, *args: Any, **options: Any) -> dict[str, Any]:
    planned = rhino.plan(step, *args, cluster=CLUSTER, cache_dir="", **options)
    return shares(planned, parse_cluster(CLUSTER).device)


def product(w: jax.Array, x: jax.Array) -> jax.Array:
    return w - x.T @ jnp.tanh(x @ w)


def test_a_step_of_ops_with_rules_is_covered_and_divided() -> None:
    found = counted(product, W, X)
    assert found["without"] == ()
    assert found["repeated_flops"] == pytest.approx(1.0)


def test_an_op_that_is_drawn_whole_is_found_with_its_share() -> None:
    def step(w: jax.Array, x: jax.Array, words: jax.Array) -> jax.Array:
        _, bits = jax.lax.rng_bit_generator(words, x.shape)
        return product(w, x + (bits >> 9).astype(x.dtype))

    (found,) = counted(step, W, X, WORDS)["without"]
    assert (found.kind, found.how) == ("rng_bit_generator", "whole")
    assert found.flops == 0 and found.is_important
    assert "% of bytes" in str(found)


def test_what_every_device_repeats_is_counted() -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return product(w, x[:1])  # one row: nothing to divide by data_parallel

    found = counted(step, W, X, recipe="data_parallel")
    assert found["repeated_flops"] == pytest.approx(8.0)
    assert any(share.kind == "dot_general" for share in found["whole"])


def test_a_cell_is_kept_as_it_is() -> None:
    found = cell("decode", CLUSTER, "tiny")
    assert found.fits and found.without == ()
    assert of_row(json.loads(json.dumps(asdict(found)))) == found
