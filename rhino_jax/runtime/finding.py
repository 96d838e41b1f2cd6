"""Which op made the first number that is none, once JAX has found one in a program.

JAX's own checks (``jax_debug_nans``, ``jax_debug_infs``) see what a program gives. The
program of a stage is run once more, and tells of every op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rhino_jax.ir.pipeline.flow import OP
from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.runtime.tasks import Run


def first_fault(stages: StagePrograms, task: Run, args: Sequence[Any]) -> str:
    """Where the first fault of a task is, in words; "" where that can not be told.

    It can not where the task was given buffers that are gone with its first run.
    """
    chunk = stages.chunks.by_key[task.key]
    given = args[: len(args) - len(chunk.totals)]
    if task.start or any(x.is_deleted() for x in jax.tree.leaves(given)):
        return ""
    faulty = jnp.isnan if jax.debug_nans.value else jnp.isinf
    with jax.debug_nans(False), jax.debug_infs(False):
        (told,) = stages.finding_program(chunk, faulty)(*given)
        found = np.asarray(told)
    units = (stages.chunks.flow.units[number] for number in chunk.units)
    ops = [stages.program.ops[unit.index] for unit in units if unit.kind == OP]
    if not found.any():
        return ""
    first = ops[int(np.argmax(found))]
    return f"; first made by {first.kind} at {first.where}"
