"""Sorts, searches and running sums on a shard: as they stand, their axis is whole."""

from __future__ import annotations

from collections.abc import Mapping

from rhino_jax.lower.local.shard import LocalFn, as_it_stands
from rhino_jax.rules import sorting

LOCALS: Mapping[str, LocalFn] = dict.fromkeys(sorting.RULES, as_it_stands)
