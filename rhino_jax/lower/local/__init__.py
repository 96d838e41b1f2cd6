"""How to run each primitive on one shard: one file per family, beside ``rules/``.

Every file is a table ``LOCALS`` from primitive to local form. :func:`run_local` runs
the local form of an op; it is what lowering and the tests both call.
"""

from rhino_jax.lower.local.registry import LOCALS as LOCALS
from rhino_jax.lower.local.registry import run_local as run_local
