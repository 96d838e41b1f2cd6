"""Local forms of linear algebra and Fourier transforms: the batch is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rhino_jax.ir.mesh import Mesh
from rhino_jax.rules.linalg import RULES
from tests.lower.local.harness import check

MESH = Mesh.of(x=2, y=2, z=2)
RNG = np.random.default_rng(0)
ANY = RNG.normal(size=(6, 4, 5, 5)).astype(np.float32)
POSITIVE = (ANY @ ANY.swapaxes(-1, -2) + 5 * np.eye(5)).astype(np.float32)

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "cholesky": (lax.linalg.cholesky, (POSITIVE,)),
    "eigh": (lambda x: lax.linalg.eigh(x, symmetrize_input=False), (POSITIVE,)),
    "lu": (lax.linalg.lu, (POSITIVE,)),
    "householder_product": (
        lambda a, t: lax.linalg.householder_product_p.bind(a, t),
        (ANY, ANY[..., 0]),
    ),
    "svd": (lambda x: lax.linalg.svd(x, full_matrices=False), (POSITIVE,)),
    "triangular_solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        (POSITIVE, ANY[..., :3]),
    ),
    "tridiagonal_solve": (
        lax.linalg.tridiagonal_solve,
        (ANY[..., 0], POSITIVE[..., 1] + 9, ANY[..., 2], ANY),
    ),
    "fft": (lambda x: lax.fft(x.astype(jnp.complex64), "FFT", (5, 5)), (ANY,)),
}


@pytest.mark.parametrize("kind", CASES)
def test_shard_run_recombine(
    kind: str, device_mesh: Callable[[Mesh], jax.sharding.Mesh]
) -> None:
    fun, args = CASES[kind]
    given = tuple(a.astype(np.complex64) for a in args) if kind == "fft" else args
    tried = check(
        fun, args, MESH, device_mesh(MESH), kind, 3, rtol=1e-4, args_of_op=given
    )
    assert any(choice.splits for choice in tried)


def test_matrices_stay_whole() -> None:
    assert {"qr", "eig", "schur"} <= set(RULES)
