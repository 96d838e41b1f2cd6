"""Random programs under random layouts equal the undecorated run.

A few hundred lines of JAX a run; ``python -m benchmarks.fuzz`` runs thousands, and what
it found is below.
"""

from __future__ import annotations

from random import Random

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import check
from benchmarks.random_programs import random_program
from rhino_jax.errors import TraceError
from rhino_jax.ir.mesh import Mesh

MESH = Mesh.of(x=2, y=4)
PROGRAMS, TOGETHER = 104, 13


@settings(
    max_examples=PROGRAMS // TOGETHER,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.integers(0, 10**6))
def test_random_programs(seed: int) -> None:
    rng = Random(seed)
    with jax.enable_x64(True):
        programs = [
            random_program(rng, most_lines=3, depth=1 + (n % 6 > 0))
            for n in range(TOGETHER)
        ]
    check(programs, rng, MESH)


@pytest.mark.parametrize("seed", [7, 298])
def test_what_was_found(seed: int) -> None:
    """Seeds of the long run that failed once: sums of truth values (7), the
    sine of a large number (298)."""
    with jax.enable_x64(True):
        program = random_program(Random(seed))
    check([program], Random(seed), MESH)


@pytest.mark.parametrize("seed", [613, 1542])
def test_what_jax_can_not_discharge_is_said(seed: int) -> None:
    """References made in differentiated loops: equal, or an error that helps."""
    with jax.enable_x64(True):
        program = random_program(Random(seed))
    try:
        check([program], Random(seed), MESH)
    except TraceError as error:
        assert "Make them outside of differentiated loops" in str(error)
