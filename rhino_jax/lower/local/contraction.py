"""Matrix products on a shard: as they stand; a split contraction leaves a term."""

from __future__ import annotations

from collections.abc import Mapping

from rhino_jax.lower.local.shard import LocalFn, as_it_stands

LOCALS: Mapping[str, LocalFn] = {"dot_general": as_it_stands}
