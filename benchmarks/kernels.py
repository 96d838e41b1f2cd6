"""What single kernels take on the attached device: the grid that prices are fitted to.

Measured as ``rhino profile`` measures (:mod:`rhino_jax.profiling.live`); the list is
longer and holds what models are made of. ``python -m benchmarks.kernels --help``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp

from rhino_jax.profiling.grid import (
    Kernel,
    convolution,
    elementwise,
    product,
    summed,
)
from rhino_jax.profiling.live import call_seconds, kernel_seconds

HELD_BYTES = 6 * 2**30
"""All inputs of one kernel's runs together, at most."""


def normalized(x: Any) -> Any:
    """Layer norm without scale, in float32."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    spread = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(spread + 1e-6)).astype(x.dtype)


def kernels(scale: int) -> Iterator[Kernel]:
    """The grid; ``scale`` divides every long side (1 for a data centre's GPU)."""

    def cut(*shape: int) -> tuple[int, ...]:
        return tuple(max(n // scale, 8) for n in shape)

    for dtype in ("bfloat16", "float32"):
        for side in (256, 512, 1024, 2048, 4096, 8192):
            yield product(*cut(side, side, side), dtype)
        for m, k, n in (
            (16384, 2048, 2048),
            (16384, 2048, 8192),
            (16384, 8192, 2048),
            (2048, 16384, 8192),
            (16384, 2048, 51200),
            (65536, 768, 768),
            (4096, 768, 3072),
            (1024, 1024, 4096),
            (128, 4096, 4096),
        ):
            yield product(*cut(m, k, n), dtype)
        for batch, m, k, n in (
            (512, 1024, 64, 1024),
            (512, 1024, 1024, 64),
            (512, 256, 64, 256),
            (64, 2048, 128, 2048),
            (16, 2048, 768, 6144),
        ):
            yield product(*cut(m, k, n), dtype, max(batch // scale, 1))
    for size in (2**14, 2**18, 2**20, 2**22, 2**24, 2**26, 2**28):
        shape = (max(size // scale, 8),)
        yield elementwise("copy", lambda x: x + 1, shape, "float32")
        yield elementwise("gelu", jax.nn.gelu, shape, "bfloat16")
    for rows, width in ((65536, 2048), (16384, 1024), (524288, 256), (4096, 51200)):
        shape = cut(rows, width)
        for dtype in ("bfloat16", "float32"):
            yield elementwise("softmax", jax.nn.softmax, shape, dtype)
            yield elementwise("norm", normalized, shape, dtype)
            for axis in (0, 1):
                yield summed(shape, dtype, axis)
        yield elementwise("transpose", lambda x: x.T + 1, shape, "bfloat16")
        yield elementwise("cumulative sum", lambda x: x.cumsum(1), shape, "float32")
    rows, width, many = cut(51200, 2048, 16384)
    for dtype in ("bfloat16", "float32"):
        size = many * width * jnp.dtype(dtype).itemsize
        yield Kernel(
            "gather rows",
            lambda table, at: table[at] + 1,
            ((rows, width), (many,)),
            *(dtype, 0, 2 * size, (1,)),
        )
        yield Kernel(
            "scatter-add rows",
            lambda table, at, x: table.at[at].add(x),
            ((rows, width), (many,), (many, width)),
            *(dtype, 0, 2 * rows * width * jnp.dtype(dtype).itemsize + 3 * size, (1,)),
        )
    for batch, side, inside, out, window, stride in (
        (256, 224, 3, 64, 7, 2),
        (256, 56, 64, 64, 1, 1),
        (256, 56, 64, 64, 3, 1),
        (256, 56, 64, 256, 1, 1),
        (256, 28, 128, 128, 3, 1),
        (256, 14, 256, 256, 3, 1),
        (256, 14, 256, 1024, 1, 1),
        (256, 7, 512, 512, 3, 1),
    ):
        yield convolution(
            max(batch // scale, 2), side, inside, out, window, stride, "bfloat16"
        )


def measured(kernel: Kernel, call: float) -> dict[str, Any]:
    """Seconds of one run of ``kernel``, and what it had to do."""
    seconds = kernel_seconds(kernel, jax.devices()[:1], call, HELD_BYTES)
    shapes = " ".join("x".join(map(str, shape)) for shape in kernel.shapes)
    return {
        "kind": kernel.kind,
        "shapes": shapes,
        "dtype": kernel.dtype,
        "flops": kernel.flops,
        "num_bytes": kernel.num_bytes,
        "seconds": seconds,
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="kernels.jsonl")
@click.option("--scale", default=1, show_default=True, help="Divides all long sides.")
@click.option("--seconds", default=600.0, show_default=True, help="Stop after this.")
@click.option("--skip", default="", help="Leave out kinds that hold this word.")
def main(out: Path, scale: int, seconds: float, skip: str) -> None:
    """Measure the grid, one line of JSON a kernel."""
    until = time.perf_counter() + seconds
    kind = jax.devices()[0].device_kind
    call = call_seconds(jax.devices()[:1])
    with out.open("w") as file:
        for kernel in kernels(scale):
            if skip and skip in kernel.kind:
                continue
            if time.perf_counter() > until:
                click.echo("no time left: the rest of the grid is not measured")
                break
            row = {"device": kind, **measured(kernel, call)}
            file.write(json.dumps(row) + "\n")
            file.flush()
            rate = row["flops"] / row["seconds"] / 1e12
            speed = row["num_bytes"] / row["seconds"] / 1e9
            click.echo(
                f"{row['kind']:18} {row['dtype']:9} {row['shapes']:34} "
                f"{row['seconds'] * 1e6:10.1f} us {rate:7.1f} TFLOP/s {speed:7.0f} GB/s"
            )


if __name__ == "__main__":
    main()
