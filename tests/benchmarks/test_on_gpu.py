"""The scripts for a GPU, as far as a CPU can tell: what they say, and of what."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import kernels, on_gpu


def row(**more: Any) -> dict[str, Any]:
    """One case as its process tells it: 100 ms and 8 GiB predicted."""
    ran = {"step_seconds": 0.125, "losses": (2.0, 1.0, 0.5), "peak_bytes": 4 * 2**30}
    return {
        "decorated": ran,
        "jit": {**ran, "losses": (2.0, 1.0, 0.4)},
        "predicted": {"step_seconds": 0.1, "peak_bytes": 8 * 2**30},
        "remat": [],
        "microbatches": 1,
        **more,
    }


def test_a_line_puts_predicted_beside_measured() -> None:
    case = on_gpu.CASES["gpt"]
    found = dict(zip(on_gpu.HEAD, on_gpu.line(case, row()), strict=False))
    assert on_gpu.line(case, row())[:5] == (
        *("gpt_scanned 12 layers bfloat16", "100.00", "125.00", "0.800"),
        "125.00",
    )
    assert on_gpu.line(case, row())[5:8] == ("8.00", "4.00", "2.000")
    assert found["losses differ"] == "2.5e-01"


def test_a_case_that_failed_says_why() -> None:
    case = on_gpu.CASES["gpt"]
    assert on_gpu.line(case, {"error": "no card"})[1] == "no card"
    assert on_gpu.line(case, {"decorated_error": "no memory"})[1] == "no memory"
    jit = row()
    del jit["jit"]
    assert on_gpu.line(case, {**jit, "jit_error": "out of memory"})[4] == (
        "out of memory"
    )


def test_the_grid_is_of_the_kinds_that_have_prices_of_their_own() -> None:
    kinds = Counter(k.kind.split()[0] for k in kernels.kernels(scale=1))
    for kind in ("product", "batched", "copy", "softmax", "norm", "sum", "convolution"):
        assert kinds[kind] >= 4, kind


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.product(16, 8, 32, "float32", batch=2),
        kernels.convolution(2, 8, 4, 8, 3, 2, "float32"),
        kernels.elementwise("norm", kernels.normalized, (8, 64), "bfloat16"),
    ],
    ids=lambda kernel: kernel.kind,
)
def test_a_kernel_does_what_it_is_counted_for(kernel: kernels.Kernel) -> None:
    given = [jax.ShapeDtypeStruct(shape, kernel.dtype) for shape in kernel.shapes]
    counted = jax.jit(kernel.function).lower(*given).cost_analysis() or {}
    if kernel.flops:
        # The edges of a padded convolution count less.
        assert 0.7 * kernel.flops <= counted["flops"] <= kernel.flops
    made = jax.eval_shape(kernel.function, *given)
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in (*given, made))
    assert kernel.num_bytes == pytest.approx(size, rel=0.5)
    found = kernels.measured(kernel, call=0.0)
    assert found["seconds"] > 0 and found["num_bytes"] == kernel.num_bytes
