"""Small sharded programs whose collectives are known, lowered without devices.

All are for 8 devices, a mesh of d=2 by t=4, every collective written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_SHAPE = {"d": 2, "t": 4}
MESH = AbstractMesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
LAYERS, TURNS, INNER = 3, 3, 5

Program = tuple[Callable[..., Any], tuple[Any, ...], Any, Any, tuple[int, ...]]


def shape(dims: tuple[int, ...], spec: Any, dtype: Any = jnp.float32) -> Any:
    """A described array with its layout on the mesh."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(MESH, spec))


def mixed() -> Program:
    """all-gather d, all-reduce t, reduce-scatter t, permute d, each once."""

    def step(w: Any, x: Any) -> Any:
        whole = lax.all_gather(w, "d", axis=0, tiled=True)
        y = lax.psum(jnp.tanh(x @ whole), "t")
        part = lax.psum_scatter(jnp.sin(y), "t", scatter_dimension=1, tiled=True)
        return lax.ppermute(part, "d", [(0, 1), (1, 0)])

    args = (shape((256, 1024), P("d")), shape((128, 256), P()))
    return step, args, (P("d"), P()), P("d", "t"), ()


def nested() -> Program:
    """A scan of 3 around a gather over d and a scan of 5 around RS + AG over t."""

    def step(w: Any, x: Any) -> Any:
        def outer(carry: Any, _: None) -> Any:
            whole = lax.all_gather(carry, "d", axis=0, tiled=True)

            def inner(y: Any, _: None) -> Any:
                part = lax.psum_scatter(
                    jnp.tanh(y @ whole), "t", scatter_dimension=0, tiled=True
                )
                return 0.5 * lax.all_gather(part, "t", axis=0, tiled=True), None

            z, _ = lax.scan(inner, x, None, length=INNER)
            return carry + z[:128] * jnp.sum(z), None

        carry, _ = lax.scan(outer, w, None, length=TURNS)
        return lax.psum(carry, "t")

    args = (shape((256, 256), P("d")), shape((128, 256), P()))
    return step, args, (P("d"), P()), P("d"), (0,)


def zero() -> Program:
    """ZeRO-3 over d: gathered weights, gradients summed over 3 microbatches, then one
    reduce-scatter per weight."""

    def step(weights: Any, moments: Any, batch: Any) -> Any:
        whole = [lax.all_gather(w, "d", axis=0, tiled=True) for w in weights]

        def loss(ws: Any, x: Any) -> Any:
            for w in ws:
                x = jnp.tanh(x @ w)
            return jnp.mean(x * x)

        def microbatch(total: Any, x: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(whole, x)
            return jax.tree.map(jnp.add, total, grads), value

        start = jax.tree.map(jnp.zeros_like, whole)
        total, values = lax.scan(microbatch, start, batch)
        grads = [
            lax.psum_scatter(g, "d", scatter_dimension=0, tiled=True) for g in total
        ]
        moments = [0.9 * m + g for m, g in zip(moments, grads, strict=True)]
        weights = [w - 0.1 * m for w, m in zip(weights, moments, strict=True)]
        return weights, moments, lax.pmean(jnp.mean(values), ("d", "t"))

    specs = [P("d")] * LAYERS
    state = [shape((1024, 1024), P("d"))] * LAYERS
    rows = P(None, ("d", "t"))
    args = (state, state, shape((TURNS, 1024, 1024), rows))
    return step, args, (specs, specs, rows), (specs, specs, P()), (0, 1)


def many() -> Program:
    """Permutes and reductions of several arrays, which compilers combine."""

    def step(arrays: Any) -> Any:
        ring = [(i, (i + 1) % 4) for i in range(4)]
        moved = [lax.ppermute(a, "t", ring) for a in arrays]
        return moved, [lax.psum(a, ("d", "t")) for a in arrays]

    args = ([shape((256, 256), P()), shape((512, 512), P(), jnp.bfloat16)],)
    return step, args, ([P()] * 2,), ([P()] * 2, [P()] * 2), ()


def branches() -> Program:
    """Different collectives over t in the branches of a conditional."""

    def gathered(x: Any) -> Any:
        whole = lax.all_gather(x, "t", axis=0, tiled=True)
        return lax.psum_scatter(whole, "t", scatter_dimension=0, tiled=True)

    def step(x: Any) -> Any:
        first = lax.axis_index("d") == 0
        return lax.cond(first, lambda y: lax.psum(y, "t"), gathered, x)

    return step, (shape((512, 512), P()),), (P(),), P(), ()


def padded() -> Program:
    """A reduce-scatter over t that the TPU compiler pads."""

    def step(x: Any) -> Any:
        return lax.psum_scatter(jnp.tanh(x), "t", scatter_dimension=0, tiled=True)

    return step, (shape((4096, 2048), P()),), (P(),), P("t"), ()


def endless() -> Program:
    """An all-reduce over t in a loop whose length depends on data."""

    def step(x: Any) -> Any:
        return lax.while_loop(
            lambda y: jnp.sum(y) < 100.0, lambda y: 0.3 * lax.psum(y, "t"), x
        )

    return step, (shape((512, 512), P()),), (P(),), P(), ()


def exchange() -> Program:
    """bfloat16: gather d, all-to-all over t and over both axes."""

    def step(w: Any) -> Any:
        whole = lax.all_gather(w, "d", axis=0, tiled=True)
        turned = lax.all_to_all(whole, "t", 0, 1, tiled=True)
        return lax.all_to_all(turned, ("d", "t"), 1, 0, tiled=True)

    args = (shape((512, 512), P("d"), jnp.bfloat16),)
    return step, args, (P("d"),), P(), ()


PROGRAMS: dict[str, Callable[[], Program]] = {
    one.__name__: one
    for one in (mixed, nested, zero, many, branches, padded, endless, exchange)
}


def lower(name: str, platform: str, mesh: Any = MESH) -> Any:
    """A program of ``PROGRAMS`` lowered for a platform ("cpu", "cuda", "tpu")."""
    step, args, in_specs, out_specs, donated = PROGRAMS[name]()
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    traced = jax.jit(mapped, donate_argnums=donated).trace(*args)
    return traced.lower(lowering_platforms=(platform,))


def lower_constrained(platform: str) -> Any:
    """The same ZeRO idea left to the partitioner: weights sharded, no collectives."""

    def step(weights: Any, x: Any) -> Any:
        def loss(ws: Any) -> Any:
            y = x
            for w in ws:
                y = jnp.tanh(y @ w)
            return jnp.mean(y * y)

        grads = jax.grad(loss)(weights)
        return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]

    state = [shape((512, 512), P("d"))] * 2
    sharding = [NamedSharding(MESH, P("d"))] * 2
    jitted = jax.jit(step, donate_argnums=0, out_shardings=sharding)
    traced = jitted.trace(state, shape((1024, 512), P(("d", "t"))))
    return traced.lower(lowering_platforms=(platform,))


def huge(platform: str) -> Any:
    """A program whose activations need far more memory than any device has."""

    def step(x: Any) -> Any:
        return jnp.sort(jnp.tanh(x @ x), axis=0) @ x

    traced = jax.jit(step).trace(shape((100_000, 100_000), P("d")))
    return traced.lower(lowering_platforms=(platform,))
