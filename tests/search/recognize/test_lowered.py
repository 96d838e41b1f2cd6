"""What was recognized runs on cuDNN's kernels where there are any."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax import compat
from rhino_jax.api.attending import attended
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.ir.mesh import Mesh
from rhino_jax.lower.program import jit_step
from rhino_jax.options import make_options
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta
from tests import attentions
from tests.attentions import train_step


@pytest.mark.parametrize(
    ("dtype", "heads", "calls"),
    [
        (jnp.bfloat16, 4, {"CAUSAL"}),
        (jnp.bfloat16, 1, {"CAUSAL", "NO_MASK"}),
        (jnp.float32, 4, set()),
    ],
)
def test_a_gpu_gets_the_kernels_of_cudnn(
    dtype: Any,
    heads: int,
    calls: set[str],
    device_mesh: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lowered, not run: on split heads, and around a ring of one head. float32 stays
    blocks."""
    monkeypatch.setattr(compat, "cudnn_runs", lambda: True)
    args = (
        attentions.params_of(heads, heads, dtype=dtype),
        attentions.inputs_of(1, 64, dtype=dtype),
    )
    step = partial(train_step, attentions.by_hand)
    traced = traced_bare(step, args, {}, make_options(donate=False))
    traced = attended(traced, "recognized").traced
    mesh = Mesh.of(x=4)
    request = Request(mesh, AlphaBeta(), replicate_heavy=False)
    found = search(subject_of(traced), request).assignment
    lowered = (
        jit_step(traced.program, found, mesh, device_mesh(mesh))
        .trace(*jax.tree.leaves(args))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    kernels = set(re.findall(r"@__cudnn\$fmhaSoftmax(Backward)?\(", lowered))
    assert kernels == ({"", "Backward"} if calls else set())
    assert {mask for mask in ("CAUSAL", "NO_MASK") if mask in lowered} == calls
