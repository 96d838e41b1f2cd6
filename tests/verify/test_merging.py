"""Which equal collectives each compiler merges: what a plan must not count twice.

Seen with jax 0.10.2: equal gathers of one value become one on every compiler, however
far apart; an optimization barrier (``jax.checkpoint`` writes one) keeps them apart on
GPU and TPU, not on CPU. Two reduce-scatters that are added become one of the sum on
GPU and TPU; on CPU both stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from rhino_jax.verify.compile_only import compile_for, installed
from tests.verify import programs

TARGETS = {"cpu": "cpu:8", "cuda": "h100:1x8", "tpu": "v5e:2x4"}
SIZE = 512
AG, RS = "all-gather", "reduce-scatter"
OLD = jax.__version__.startswith("0.10.")


def whole(w: Any) -> Any:
    return lax.all_gather(w, "t", axis=0, tiled=True)


def scattered(y: Any) -> Any:
    return lax.psum_scatter(y, "t", scatter_dimension=0, tiled=True)


def far_apart(w: Any, x: Any) -> Any:
    """The same gather at both ends of a chain of products."""
    y = jnp.tanh(x @ whole(w))
    for _ in range(3):
        y = jnp.sin(y @ y.T @ y)
    return y @ whole(w)


def behind_a_barrier(w: Any, x: Any) -> Any:
    y = jnp.tanh(x @ whole(w))
    again, y = lax.optimization_barrier((w, y))
    return y @ whole(again)


def added(w: Any, x: Any) -> Any:
    """Two scatters of different values, added at once."""
    first, second = x @ x.T, jnp.tanh(x) @ x.T
    return scattered(first) + scattered(second) + jnp.sum(w)


# program: collectives of its kind that run, per compiler
RUNS: dict[Callable[..., Any], tuple[str, dict[str, int]]] = {
    far_apart: (AG, {"cpu": 1, "cuda": 1, "tpu": 1}),
    # From jax 0.11 on the CPU keeps them apart too.
    behind_a_barrier: (AG, {"cpu": 1 if OLD else 2, "cuda": 2, "tpu": 2}),
    added: (RS, {"cpu": 2, "cuda": 1, "tpu": 1}),
}


@pytest.mark.compilers
@pytest.mark.parametrize("platform", list(TARGETS))
@pytest.mark.parametrize("step", list(RUNS), ids=lambda step: step.__name__)
def test_equal_collectives(step: Callable[..., Any], platform: str) -> None:
    if not installed(platform):
        pytest.skip(f"the compiler for {platform} is not installed")
    mapped = jax.shard_map(
        step,
        mesh=programs.MESH,
        in_specs=(P("t"), P("d")),
        out_specs=P(("d", "t")) if step is added else P("d"),
        check_vma=False,
    )
    square = (SIZE, SIZE)
    args = programs.shape(square, P("t")), programs.shape(square, P("d"))
    lowered = jax.jit(mapped).trace(*args).lower(lowering_platforms=(platform,))
    found = compile_for(lowered, TARGETS[platform], cache_dir=None)
    assert found.ok, found.message
    kind, runs = RUNS[step]
    assert {one.kind for one in found.collectives} == {kind}
    assert sum(one.trip_count for one in found.collectives) == runs[platform]
