"""Ticks of a pipelined scan by closed forms, and how its values are seen outside."""

from __future__ import annotations

import pytest

from rhino_jax.ir.layout import Layout, Split
from rhino_jax.ir.mesh import STAGE, TIME, Mesh
from rhino_jax.ir.staged import Lift, Staged
from rhino_jax.schedule.closed_forms import makespan_seconds


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (2, 8), (4, 4), (8, 32)])
def test_ticks_are_those_of_the_schedule(
    stages: int, microbatches: int, rounds: int
) -> None:
    cut = Staged(stages, microbatches, rounds)
    name = "circular" if rounds > 1 else "gpipe"
    both = makespan_seconds(name, stages, microbatches, rounds, forward=1, backward=2)
    assert 3 * cut.ticks == both
    assert cut.bubble == pytest.approx(1 - rounds * microbatches * 3 / both)
    assert cut.turns(stages * rounds * 5) == 5


def test_a_stack_is_split_and_whole_in_time() -> None:
    inside = Layout.of((("data", 4), (TIME, 2)), ())
    lift = Lift(Staged(2, 2).stack(8), timed=True)
    assert lift(inside) == Layout.of(((STAGE, 4),), (("data", 4),), ())
    term = Lift(partial=((STAGE, "sum"),), timed=True)
    assert term(inside) == Layout.of((("data", 4),), (), partial=[(STAGE, "sum")])


def test_time_is_an_axis_inside_only() -> None:
    cut = Staged(2, 4)
    mesh = Mesh.of(stage=2, data=2)
    assert cut.over(mesh).size(TIME) == 4
    assert cut.over(cut.over(mesh)) == cut.over(mesh)
    assert cut.stack(12) == (Split(STAGE, 6),)
