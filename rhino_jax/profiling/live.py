"""Kernels and collectives, measured on attached devices.

All devices run the same kernel at once, as in a step: simulated devices share their
host's cores. What a call takes by itself is taken off: a program of several equal
kernels is compared with one of one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rhino_jax.profiling.grid import Exchange, Kernel, chained

RUNS, ROUNDS = 12, 5
HELD_BYTES = 2 * 2**30
"""All inputs of one kernel's runs together, at most."""
LONG_SECONDS = 0.05
"""What takes longer than this is measured alone."""


def least(run: Callable[[], Any], seconds: float, runs: int = 1) -> float:
    """Seconds of a run: the shortest round of as many as fit in ``seconds``.

    A round is ``runs`` runs, one right after the other, so that starting one does not
    count. The first run compiles.
    """
    jax.block_until_ready(run())
    found, until = float("inf"), time.perf_counter() + seconds
    while found == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(runs)])
        found = min(found, (time.perf_counter() - began) / runs)
    return found


def kernel_seconds(
    kernel: Kernel,
    devices: Sequence[Any],
    held_bytes: int = HELD_BYTES,
    runs: int = RUNS,
) -> float:
    """Seconds of one run of ``kernel`` on each of ``devices`` at once.

    Every run has inputs of its own, as many as ``held_bytes`` allow.
    """
    mesh = jax.sharding.Mesh(
        np.array(devices), ("all",), axis_types=(AxisType.Auto,) * 1
    )
    spec = PartitionSpec("all")
    first = _arguments(kernel, mesh, spec)
    held = sum(x.nbytes for x in first)
    count = int(max(2, min(runs, held_bytes // max(held, 1))))

    def program(number: int) -> Callable[[Any], Any]:
        mapped = jax.shard_map(
            chained([kernel] * number),
            mesh=mesh,
            in_specs=(spec,),
            out_specs=spec,
            check_vma=False,
        )
        return jax.jit(mapped)

    sets = [first]
    alone = _shortest(functools.partial(program(1), sets))
    if alone > LONG_SECONDS:
        return alone
    sets += [tuple(x.copy() for x in first) for _ in range(count - 1)]
    return _each(alone, _shortest(functools.partial(program(count), sets)), count)


def _each(alone: float, together: float, count: int) -> float:
    """Seconds of one of ``count`` equal parts; never less than a tenth of its share."""
    return max((together - alone) / (count - 1), together / count / 10)


def _shortest(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
        if times[-1] > 10 * LONG_SECONDS:
            break
    return min(times)


def _arguments(kernel: Kernel, mesh: Any, spec: Any) -> tuple[Any, ...]:
    """Random arguments, a shard of the kernel's shape on every device."""
    rng = np.random.default_rng(0)
    rows = kernel.shapes[0][0]
    where = NamedSharding(mesh, spec)

    def one(at: int) -> Any:
        shape = (mesh.size * kernel.shapes[at][0], *kernel.shapes[at][1:])
        if at in kernel.ints:
            found = rng.integers(0, rows, shape, dtype=np.int32)
            return jax.device_put(found, where)
        key = jax.random.key(int(rng.integers(2**31)), impl="rbg")

        def draw() -> Any:
            return jax.random.normal(key, shape, kernel.dtype)

        return jax.jit(draw, out_shardings=where)()

    return tuple(one(at) for at in range(len(kernel.shapes)))


def exchange_seconds(exchange: Exchange, devices: Sequence[Any]) -> float:
    """Seconds of a collective among groups of neighbours, all groups at once."""
    count = exchange.count
    assert len(devices) % count == 0, (len(devices), count)
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(-1, count),
        ("apart", "group"),
        axis_types=(AxisType.Auto,) * 2,
    )
    spec = PartitionSpec(("apart", "group"))

    def program(number: int) -> Callable[[Any], Any]:
        def run(x: Any) -> list[Any]:
            outs: list[Any] = []
            for _ in range(number):
                if outs:
                    x, outs[-1] = jax.lax.optimization_barrier((x, outs[-1]))
                    x = x + 1  # equal collectives of one value would be merged
                outs.append(exchange.run(x, "group"))
            return outs

        mapped = jax.shard_map(
            run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        return jax.jit(mapped)

    x = jax.device_put(
        np.zeros(len(devices) * exchange.elements, np.float32),
        NamedSharding(mesh, spec),
    )
    alone = _shortest(functools.partial(program(1), x))
    if alone > LONG_SECONDS:
        return alone
    return _each(alone, _shortest(functools.partial(program(RUNS), x)), RUNS)
