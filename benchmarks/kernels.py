"""What single kernels take on the attached device: the grid that prices are fitted to.

Every kernel runs several times in one program, each time on inputs of its own and only
after the one before it (an ``optimization_barrier`` between them): launching a program
hardly counts, and no cache is measured. ``python -m benchmarks.kernels --help``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

HELD_BYTES = 6 * 2**30
"""All inputs of one kernel's runs together, at most."""
RUNS = 12


@dataclass(frozen=True)
class Kernel:
    """One function and the shapes of its arguments.

    ``flops`` are those of its product; ``num_bytes`` what it must read and write.
    """

    kind: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    flops: int = 0
    num_bytes: int = 0
    ints: tuple[int, ...] = ()
    """Arguments that are row numbers, below the first argument's rows."""


def product(m: int, k: int, n: int, dtype: str, batch: int = 0) -> Kernel:
    """``[b, m, k] @ [b, k, n]``."""
    lead = (batch,) if batch else ()
    shapes = ((*lead, m, k), (*lead, k, n))
    times, item = max(batch, 1), jnp.dtype(dtype).itemsize
    return Kernel(
        "batched product" if batch else "product",
        jnp.matmul,
        shapes,
        dtype,
        2 * times * m * k * n,
        item * times * (m * k + k * n + m * n),
    )


def elementwise(kind: str, f: Any, shape: tuple[int, ...], dtype: str) -> Kernel:
    """Reads one array and writes another like it."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    return Kernel(kind, f, (shape,), dtype, 0, 2 * size)


def convolution(
    batch: int, side: int, inside: int, out: int, window: int, stride: int, dtype: str
) -> Kernel:
    """``[batch, side, side, inside]``, channels last, same padding."""

    def f(x: Any, w: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=numbers
        )

    item, after = jnp.dtype(dtype).itemsize, -(-side // stride)
    return Kernel(
        f"convolution {window}x{window}/{stride}",
        f,
        ((batch, side, side, inside), (window, window, inside, out)),
        dtype,
        2 * batch * after**2 * window**2 * inside * out,
        item * batch * (side**2 * inside + after**2 * out),
    )


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
            size = math.prod(shape) * jnp.dtype(dtype).itemsize
            for axis in (0, 1):
                summed = Kernel(
                    f"sum over {axis}",
                    lambda x, axis=axis: x.sum(axis),
                    (shape,),
                    dtype,
                    0,
                    size,
                )
                yield summed
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


def measured(kernel: Kernel) -> dict[str, Any]:
    """Seconds of one run of ``kernel``, and what it had to do."""
    rng = np.random.default_rng(0)
    rows = kernel.shapes[0][0]

    def argument(at: int) -> Any:
        shape = kernel.shapes[at]
        if at in kernel.ints:
            return jnp.asarray(rng.integers(0, rows, shape, dtype=np.int32))
        key = jax.random.key(rng.integers(2**31), impl="rbg")
        return jax.random.normal(key, shape, kernel.dtype)

    arguments = tuple(argument(at) for at in range(len(kernel.shapes)))
    held = sum(x.nbytes for x in arguments)
    count = int(max(2, min(RUNS, HELD_BYTES // max(held, 1))))
    sets = [arguments]
    sets += [jax.tree.map(lambda x: x.copy(), arguments) for _ in range(count - 1)]

    def chained(sets: Any) -> Any:
        outs = []
        for arguments in sets:
            if outs:
                *arguments, outs[-1] = jax.lax.optimization_barrier(
                    (*arguments, outs[-1])
                )
            outs.append(kernel.function(*arguments))
        return outs

    run = jax.jit(chained)
    jax.block_until_ready(run(sets))
    times = []
    for _ in range(7):
        began = time.perf_counter()
        jax.block_until_ready(run(sets))
        times.append(time.perf_counter() - began)
    shapes = " ".join("x".join(map(str, shape)) for shape in kernel.shapes)
    told = asdict(kernel)
    del told["function"], told["ints"]
    return {**told, "shapes": shapes, "runs": count, "seconds": min(times) / count}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="kernels.jsonl")
@click.option("--scale", default=1, show_default=True, help="Divides all long sides.")
@click.option("--seconds", default=600.0, show_default=True, help="Stop after this.")
@click.option("--skip", default="", help="Leave out kinds that hold this word.")
def main(out: Path, scale: int, seconds: float, skip: str) -> None:
    """Measure the grid, one line of JSON a kernel."""
    until = time.perf_counter() + seconds
    kind = jax.devices()[0].device_kind
    with out.open("w") as file:
        for kernel in kernels(scale):
            if skip and skip in kernel.kind:
                continue
            if time.perf_counter() > until:
                click.echo("no time left: the rest of the grid is not measured")
                break
            row = {"device": kind, **measured(kernel)}
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
