"""The search's picture of a Program: what is written, and what is made on the way."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from rhino_jax.search.build import unwritten
from tests.search.steps import f32, subject_of


def test_a_mask_of_counted_places_is_made_on_the_way() -> None:
    def step(params: Any, x: Any) -> Any:
        rows, columns = (lax.broadcasted_iota(jnp.int32, (8, 8), d) for d in (0, 1))
        return params + jnp.where(rows >= columns, x @ params, 0.0)

    program = subject_of(step, f32(8, 8), f32(8, 8)).program
    made = {op.kind: op.results[0] for op in program.ops}
    away = unwritten(program)
    assert {made["iota"], made["ge"]} <= away
    assert made["dot_general"] not in away
