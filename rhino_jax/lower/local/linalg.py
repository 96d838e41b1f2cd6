"""Linear algebra and Fourier transforms on a shard: as they stand, fewer at a time."""

from __future__ import annotations

from collections.abc import Mapping

from rhino_jax.lower.local.shard import LocalFn, as_it_stands
from rhino_jax.rules import linalg

LOCALS: Mapping[str, LocalFn] = dict.fromkeys(linalg.RULES, as_it_stands)
