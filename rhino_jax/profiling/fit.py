"""Curves and fits of the seconds that kernels and collectives took."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from rhino_jax.cluster.hardware import Device, column
from rhino_jax.cluster.kernels import (
    ARITHMETIC,
    AXES,
    CONVOLUTION,
    KINDS,
    Curve,
    Kernels,
)
from rhino_jax.cluster.profile import LinkFit
from rhino_jax.cluster.topology import Fit
from rhino_jax.profiling.grid import Exchange, Kernel

Sample = tuple[Kernel, float]
"""A kernel and the seconds it took."""

LEAST_SHARE, MOST_SHARE = 1e-9, 1.0


def share_of(kernel: Kernel, seconds: float, device: Device) -> float:
    """Share of the device's peak that a kernel reached."""
    if kernel.curve in ARITHMETIC:
        peak, work = device.flops_per_second(kernel.dtype), kernel.flops
    else:
        peak, work = device.memory_bytes_per_second, kernel.num_bytes
    return min(max(work / (peak * seconds), LEAST_SHARE), MOST_SHARE)


def curves(
    samples: Sequence[Sample], held_out: Sequence[Sample], device: Device
) -> tuple[Curve, ...]:
    """A curve for every kind and type in ``samples``; errors from ``held_out``.

    Samples of a curve fill a grid; where a point is missing or several fall on one,
    the nearest and the median stand in.
    """
    found = []
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for kernel, seconds in samples:
        groups[_key(kernel)].append((kernel, seconds))
    for (kind, dtype), group in sorted(groups.items(), key=_order):
        curve = _gridded(kind, dtype, group, device)
        found.append(_judged(curve, held_out or group, device))
    return tuple(found)


def _key(kernel: Kernel) -> tuple[str, str]:
    typed = kernel.curve in ARITHMETIC
    return kernel.curve, column(kernel.dtype) if typed else ""


def _order(entry: tuple[tuple[str, str], list[Sample]]) -> tuple[int, str]:
    return KINDS.index(entry[0][0]), entry[0][1]


def _gridded(kind: str, dtype: str, group: list[Sample], device: Device) -> Curve:
    at: dict[tuple[float, ...], list[float]] = defaultdict(list)
    for kernel, seconds in group:
        at[tuple(map(float, kernel.size))].append(share_of(kernel, seconds, device))
    shares = {size: statistics.median(found) for size, found in at.items()}
    axes = tuple(tuple(sorted(set(axis))) for axis in zip(*shares, strict=True))
    if kind == CONVOLUTION and len(shares) < math.prod(map(len, axes)):
        # A model's convolutions, which fill no grid: one share.
        middle = statistics.median(shares.values())
        return Curve(kind, dtype, (), (_short(middle),))
    assert len(axes) == AXES.get(kind, 1), (kind, axes)
    filled = []
    for size in itertools.product(*axes):
        nearest = min(shares, key=partial(_apart, size)) if size not in shares else size
        filled.append(_short(shares[nearest]))
    axes = tuple(tuple(map(float, axis)) for axis in axes)
    return Curve(kind, dtype, axes, tuple(filled))


def _apart(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum(max(x, y) / max(min(x, y), 1e-9) for x, y in zip(a, b, strict=True))


def _judged(curve: Curve, samples: Sequence[Sample], device: Device) -> Curve:
    alone = Kernels((curve,), 0.0, "")
    errors = [
        abs(
            share_of(kernel, seconds, device) / alone.share(*_key(kernel), kernel.size)
            - 1
        )
        for kernel, seconds in samples
        if _key(kernel) == (curve.kind, curve.dtype)
    ]
    error = _short(statistics.median(errors)) if errors else 0.0
    return Curve(curve.kind, curve.dtype, curve.axes, curve.shares, error)


def _relative(kernel: Kernel, seconds: float, by: Kernels, device: Device) -> float:
    """By how much the predicted seconds are off."""
    share = by.share(*_key(kernel), tuple(map(float, kernel.size)))
    return share_of(kernel, seconds, device) / share - 1


def link_fits(
    link: str, samples: Sequence[tuple[Exchange, float]]
) -> tuple[LinkFit, ...]:
    """Fits of collectives over one kind of link; more bytes never take less.

    ``error``: what making them rise changed, as a median.
    """
    groups: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for exchange, seconds in samples:
        key = exchange.kind, exchange.count
        groups[key].append((exchange.sent_bytes, seconds))
    found = []
    for (kind, count), points in sorted(groups.items()):
        points.sort()
        rising = list(itertools.accumulate((s for _, s in reversed(points)), min))[::-1]
        errors = [r / s - 1 for r, (_, s) in zip(rising, points, strict=True)]
        fitted = tuple(
            (float(sent), _short(took))
            for (sent, _), took in zip(points, rising, strict=True)
        )
        error = _short(statistics.median(map(abs, errors)))
        found.append(LinkFit(link, Fit(kind, count, fitted), error))
    return tuple(found)


def _short(figure: float) -> float:
    """Four digits: more would not be true, and files stay short."""
    return float(f"{figure:.4g}")
