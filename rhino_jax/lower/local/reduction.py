"""Reductions on a shard: as they stand; a split reduced dimension leaves a term."""

from __future__ import annotations

from collections.abc import Mapping

from rhino_jax.lower.local.shard import LocalFn, as_it_stands
from rhino_jax.rules import reduction

LOCALS: Mapping[str, LocalFn] = dict.fromkeys(reduction.RULES, as_it_stands)
