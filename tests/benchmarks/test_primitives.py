"""No public function of JAX has a primitive that nobody wrote a rule for."""

from __future__ import annotations

from functools import cache

import jax
import pytest

from benchmarks.primitives import PLACE, Census, census, markdown

seen = cache(census)

NEWER = {"empty", "call_hi_primitive"}
"""Of jax 0.11: planned by fallback."""


def test_every_primitive_has_a_rule() -> None:
    found: Census = seen()
    assert found.functions > 500
    newer = set() if jax.__version__.startswith("0.10.") else NEWER
    assert set(found.without_a_rule) <= newer


def test_the_table_in_the_docs_is_up_to_date() -> None:
    if not jax.__version__.startswith("0.10."):
        pytest.skip("written with jax 0.10; another version has other primitives")
    assert PLACE.read_text() == markdown(seen()), "run python -m benchmarks.primitives"
