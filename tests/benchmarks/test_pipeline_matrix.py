"""The matrix of pipelines covers every pair of settings, in few cases."""

from __future__ import annotations

import itertools
from dataclasses import astuple, fields

from benchmarks.pipeline_matrix import MESHES, Case, cases, possible
from rhino_jax.schedule.generate import SCHEDULES


def test_every_pair_is_covered() -> None:
    found = cases()
    assert len(found) <= 100
    assert all(map(possible, found))
    assert {case.schedule for case in found} == set(SCHEDULES)
    seen = [astuple(case) for case in found]
    names = [field.name for field in fields(Case)]
    values = [sorted({row[k] for row in seen}) for k in range(len(names))]
    for a, b in itertools.combinations(range(len(names)), 2):
        pairs = {(row[a], row[b]) for row in seen}
        for one, other in set(itertools.product(values[a], values[b])) - pairs:
            # Only where no case with this pair can be.
            fixed = {names[a]: one, names[b]: other}
            rest = [
                [fixed[name]] if name in fixed else values[k]
                for k, name in enumerate(names)
            ]
            assert not any(possible(Case(*row)) for row in itertools.product(*rest))


def test_no_case_needs_more_than_16_devices() -> None:
    sizes = {"1": 1, "2": 2, "2x2": 4}
    assert sizes.keys() == MESHES.keys()
    assert max(case.workers * sizes[case.mesh] for case in cases()) <= 16
