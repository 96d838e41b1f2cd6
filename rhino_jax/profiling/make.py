"""A whole profile: of the attached devices, or of a device that is not here."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from rhino_jax.cluster.hardware import (
    CATALOGUE,
    CPU,
    CUDA,
    TPU,
    Device,
    catalogue_name,
)
from rhino_jax.cluster.kernels import (
    ARITHMETIC,
    CONVOLUTION,
    ELEMENTWISE,
    PRODUCT,
    SCATTER,
    Curve,
)
from rhino_jax.cluster.links import IN_HOST, IN_MEMORY
from rhino_jax.cluster.profile import (
    COMPILE_ONLY,
    MEASURED,
    REFERENCE,
    LinkFit,
    Profile,
    shipped,
)
from rhino_jax.cluster.topology import NETWORK
from rhino_jax.errors import ProfileError
from rhino_jax.ir.steps import ALL_GATHER, REDUCE_SCATTER
from rhino_jax.profiling import compiled, live
from rhino_jax.profiling.fit import Sample, curves, link_fits
from rhino_jax.profiling.grid import GRIDS, Grid, Kernel, exchanges, kernels, others

Told = Callable[[str, int, int], None]
"""What is done now, how much of it is done, how much there is."""
IN_HOSTS = ((2, 1, 8), (4, 1, 8), (8, 1, 8))
BETWEEN = ((2, 2, 8), (4, 4, 8), (8, 8, 8), (16, 16, 8))
"""Groups of collectives that a GPU's compiler is asked for: (count, hosts, GPUs)."""


def _silent(what: str, done: int, total: int) -> None:
    """Nobody listens."""


def measured_profile(
    devices: Sequence[Any],
    told: Told = _silent,
    grid: Grid | None = None,
    passes: int = 1,
    clock: live.Clock = time.perf_counter,
) -> Profile:
    """Measure ``devices`` (of ``jax.devices()``), all of one kind and one host.

    Where the catalogue's figures are guesses (CPU devices), or there are none, the best
    that was measured is the peak. Everything is measured ``passes`` times, one pass
    after the other, and the least counts: a machine that has other work now and then
    is measured rightly all the same. One that always has, and simulates the devices,
    by another ``clock`` (:func:`rhino_jax.profiling.live.core_seconds`).

    Raises:
        ProfileError: devices of several hosts.
    """
    first = devices[0]
    if len({device.process_index for device in devices}) > 1:
        raise ProfileError(
            "devices of several hosts are not measured together; next: rhino profile "
            "on one host (links between hosts are the catalogue's)"
        )
    name = catalogue_name(first.device_kind, getattr(first, "num_cores", 1) or 1)
    known = CATALOGUE.get(name or "")
    chosen = grid or GRIDS.get(known.platform if known else CUDA, GRIDS[CUDA])
    wanted = (*kernels(chosen), *others(chosen, 4))
    call = min(live.call_seconds(devices, clock) for _ in range(passes))
    least = [math.inf] * len(wanted)
    for _, (number, kernel) in itertools.product(range(passes), enumerate(wanted)):
        told(f"{kernel.kind} {kernel.dtype}", number, len(wanted))
        took = live.kernel_seconds(kernel, devices, call, clock=clock)
        least[number] = min(least[number], took)
    found = list(zip(wanted, least, strict=True))
    apart = len(wanted) - len(others(chosen, 4))
    device, figures = _with_figures(known, first.device_kind, found)
    link = IN_HOST[name].kind if name in IN_HOST else IN_MEMORY.kind
    return Profile(
        device.name,
        MEASURED,
        _machine(f"{len(devices)} x {first.device_kind}"),
        datetime.date.today().isoformat(),
        _versions("jax", "jaxlib"),
        0.0,
        _completed(curves(found[:apart], found[apart:], device)),
        tuple(_measured_links(link, devices, call, chosen, told, passes, clock)),
        figures,
    )


def _measured_links(
    link: str,
    devices: Sequence[Any],
    call: float,
    grid: Grid,
    told: Told,
    passes: int,
    clock: live.Clock,
) -> Iterator[LinkFit]:
    counts = [n for n in range(2, len(devices) + 1) if len(devices) % n == 0]
    wanted = [one for count in counts for one in exchanges(grid, count)]
    least = [math.inf] * len(wanted)
    for _, (number, one) in itertools.product(range(passes), enumerate(wanted)):
        told(f"{one.kind} among {one.count}", number, len(wanted))
        took = live.exchange_seconds(one, devices, call, clock)
        least[number] = min(least[number], took)
    yield from link_fits(link, list(zip(wanted, least, strict=True)))


def _with_figures(
    known: Device | None, kind: str, samples: Sequence[Sample]
) -> tuple[Device, tuple[tuple[str, float], ...]]:
    """The device that shares are of; its peaks where the catalogue has no true ones."""
    if known is not None and known.platform != CPU:
        return known, ()
    timed = [(kernel, seconds) for kernel, seconds in samples if seconds > 0]
    flops = max(k.flops / s for k, s in timed if k.curve in ARITHMETIC)
    moved = max(k.num_bytes / s for k, s in timed if k.curve not in ARITHMETIC)
    names = (f"{column}_flops_per_second" for column in ("bf16", "f16", "f32", "f8"))
    figures: dict[str, Any] = dict.fromkeys((*names, "int8_flops_per_second"), flops)
    figures["memory_bytes_per_second"] = moved
    device = known or replace(CATALOGUE[CPU], name=kind, kind=kind)
    return replace(device, **figures), tuple(figures.items())


def compiled_profile(name: str, told: Told = _silent) -> Profile:
    """What the compiler of a catalogued GPU or TPU says, with no such device here.

    What it does not price (convolutions on GPUs; products on GPUs that XLA has no table
    of) has the measured shares of the reference card, and the profile says so.

    Raises:
        ClusterError, VerifyError: no such device; no compiler for it here, or one that
            prices nothing.
    """
    target = compiled.one_device(name)
    compiled.clock_of(target)
    grid, device = GRIDS[target.platform], CATALOGUE[name]
    wanted = (*kernels(grid), *others(grid))
    seconds: list[float | None] = []
    many = compiled.AT_ONCE[target.platform]
    for start in range(0, len(wanted), many):
        told(f"kernels of {name}", start, len(wanted))
        part = wanted[start : start + many]
        seconds += compiled.kernel_seconds(part, name)
    pairs = list(zip(wanted, seconds, strict=True))
    apart = len(wanted) - len(others(grid))
    on_grid = _priced(pairs[:apart], target.platform)
    fitted = curves(on_grid, _priced(pairs[apart:], target.platform), device)
    package = "libtpu" if target.platform != CUDA else "jax-cuda13-pjrt"
    needed = (PRODUCT,) if target.platform == TPU else (PRODUCT, CONVOLUTION)
    lacking = [k for k in needed if k not in {c.kind for c in fitted}]
    note = f"; {' and '.join(lacking)}: as measured on {REFERENCE}" if lacking else ""
    return Profile(
        name,
        COMPILE_ONLY,
        f"compiled for {target.text} with no such device{note}",
        datetime.date.today().isoformat(),
        _versions("jax", package),
        0.0,
        _completed(fitted, (*needed, ELEMENTWISE)),
        tuple(_compiled_links(name, grid, told)) if target.platform == CUDA else (),
    )


def _priced(
    pairs: Sequence[tuple[Kernel, float | None]], platform: str
) -> list[Sample]:
    """What the compiler prices. Of a scatter the TPU's prices only what leads to it.

    On a TPU a convolution takes what the product that it is does.
    """
    left = (SCATTER, CONVOLUTION) if platform == TPU else ()
    return [
        (kernel, seconds)
        for kernel, seconds in pairs
        if seconds and kernel.curve not in left
    ]


def _compiled_links(name: str, grid: Grid, told: Told) -> Iterator[LinkFit]:
    """Collectives in a host and between hosts; a reduce-scatter that is not priced
    costs what the all-gather does."""
    if not compiled.has_table(name):
        return
    for link, groups in ((IN_HOST[name].kind, IN_HOSTS), (NETWORK, BETWEEN)):
        samples = []
        for number, (count, hosts, per_host) in enumerate(groups):
            told(f"collectives over {link}", number, len(groups))
            wanted = exchanges(grid, count)
            seconds = compiled.exchange_seconds(wanted, name, hosts, per_host)
            samples += [(e, s) for e, s in zip(wanted, seconds, strict=True) if s]
        told_of = {one.kind for one, _ in samples}
        if REDUCE_SCATTER not in told_of:
            gathers = [(e, s) for e, s in samples if e.kind == ALL_GATHER]
            samples += [(replace(e, kind=REDUCE_SCATTER), s) for e, s in gathers]
        yield from link_fits(link, samples)


def _completed(
    found: tuple[Curve, ...],
    needed: tuple[str, ...] = (PRODUCT, CONVOLUTION, ELEMENTWISE),
) -> tuple[Curve, ...]:
    """With the reference card's shares for what is lacking."""
    reference = shipped(REFERENCE, MEASURED)
    assert reference is not None, "it comes with Rhino"
    there = {curve.kind for curve in found}
    lacking = set(needed) - there
    return (*found, *(one for one in reference.curves if one.kind in lacking))


def _machine(devices: str) -> str:
    return f"{devices}; {os.cpu_count()} cores, {platform.machine()}"


def _versions(*packages: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, importlib.metadata.version(name)) for name in packages)
