"""Elementwise primitives on a shard: as they stand."""

from __future__ import annotations

from collections.abc import Mapping

from rhino_jax.lower.local.shard import LocalFn, as_it_stands
from rhino_jax.rules import elementwise

LOCALS: Mapping[str, LocalFn] = dict.fromkeys(elementwise.RULES, as_it_stands)
