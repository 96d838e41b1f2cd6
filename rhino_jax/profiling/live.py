"""Kernels and collectives, measured on attached devices.

All devices run the same kernel at once, as in a step: simulated devices share their
host's cores. A program holds several equal kernels, each with inputs of its own; what a
call takes by itself (:func:`call_seconds`) is taken off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rhino_jax.profiling.grid import Exchange, Kernel, chained

Clock = Callable[[], float]

RUNS, ROUNDS = 12, 5
HELD_BYTES = 2 * 2**30
"""All inputs of one kernel's runs together, at most."""
LONG_SECONDS = 0.5
"""A round longer than this is the last."""
MOST_FLOPS = {"cpu": 4e9}
"""Of one kernel's runs together on a device, by platform."""
KEEPING = ((-4, 0), (-1, 2**31 - 1), (-8, 1))
"""mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX. No allocation by a mapping of
its own, none given back, all from one arena."""


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


def core_seconds() -> float:
    """A clock of what this process computes, shared out among the machine's cores.

    Of simulated devices, which keep all cores busy, it goes as fast as the clock on the
    wall, and stands still while other processes run.
    """
    return time.process_time() / (os.cpu_count() or 1)


def keep_memory() -> bool:
    """Have this process keep the memory that it is done with; whether that can be.

    Simulated devices have their arrays from the C library, which hands large ones back
    to the kernel and asks again: every page anew, and cleared (1 MiB to write on each
    of 8 devices took 730 us, of which 330 us with pages that were there). An
    accelerator's memory is its own. For processes that measure: it is for good.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no C library of GNU
        return False
    return all(mallopt(what, value) for what, value in KEEPING)


def call_seconds(devices: Sequence[Any], clock: Clock = time.perf_counter) -> float:
    """What a call takes that does next to nothing on each of ``devices``."""
    mesh, spec = _meshed(devices)
    x = jax.device_put(np.zeros(len(devices), np.float32), NamedSharding(mesh, spec))
    run = functools.partial(_program(lambda x: x + 1, mesh, spec), x)
    return _shortest(run, clock)


def kernel_seconds(
    kernel: Kernel,
    devices: Sequence[Any],
    call: float,
    held_bytes: int = HELD_BYTES,
    clock: Clock = time.perf_counter,
) -> float:
    """Seconds of one run of ``kernel`` on each of ``devices`` at once.

    Args:
        call: what a call takes by itself.
        held_bytes: what inputs of all runs may take.
        clock: :func:`core_seconds` where other processes share the machine.
    """
    mesh, spec = _meshed(devices)
    first = _arguments(kernel, mesh, spec)
    most = MOST_FLOPS.get(devices[0].platform, 1e14) // max(kernel.flops, 1)
    held = sum(x.nbytes for x in first)
    count = int(max(1, min(RUNS, held_bytes // max(held, 1), most)))
    sets = [first, *(tuple(x.copy() for x in first) for _ in range(count - 1))]
    run = _program(chained([kernel] * count), mesh, spec)
    return _each(_shortest(functools.partial(run, sets), clock), call, count)


def _meshed(devices: Sequence[Any]) -> tuple[jax.sharding.Mesh, PartitionSpec]:
    mesh = jax.sharding.Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    return mesh, PartitionSpec("all")


def _program(f: Callable[..., Any], mesh: Any, spec: Any) -> Callable[..., Any]:
    return jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


def _each(together: float, call: float, count: int) -> float:
    """Seconds of one of ``count`` equal parts; never less than a tenth of its share."""
    return max(together - call, together / 10) / count


def _shortest(run: Callable[[], Any], clock: Clock) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(ROUNDS):
        began = clock()
        jax.block_until_ready(run())
        times.append(clock() - began)
        if times[-1] > LONG_SECONDS:
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
        drawn = rng.standard_normal(shape, np.float32)
        return jax.device_put(drawn.astype(jnp.dtype(kernel.dtype)), where)

    return tuple(one(at) for at in range(len(kernel.shapes)))


def exchange_seconds(
    exchange: Exchange,
    devices: Sequence[Any],
    call: float,
    clock: Clock = time.perf_counter,
) -> float:
    """Seconds of a collective among groups of neighbours, all groups at once.

    ``call``: what a call takes by itself.
    """
    group = exchange.count
    assert len(devices) % group == 0, (len(devices), group)
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(-1, group),
        ("apart", "group"),
        axis_types=(AxisType.Auto,) * 2,
    )
    spec = PartitionSpec(("apart", "group"))

    held = len(devices) * (4 * exchange.elements + exchange.sent_bytes)
    count = int(max(1, min(RUNS, HELD_BYTES // held)))

    def run(arrays: Sequence[Any]) -> list[Any]:
        outs: list[Any] = []
        for x in arrays:  # equal collectives of one value would be merged
            if outs:
                x, outs[-1] = jax.lax.optimization_barrier((x, outs[-1]))
            outs.append(exchange.run(x, "group"))
        return outs

    zeros = np.zeros(len(devices) * exchange.elements, np.float32)
    where = NamedSharding(mesh, spec)
    arrays = [jax.device_put(zeros, where) for _ in range(count)]
    took = _shortest(functools.partial(_program(run, mesh, spec), arrays), clock)
    return _each(took, call, count)
