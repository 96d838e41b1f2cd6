"""Shard, run, recombine for primitives that no other test here runs on shards.

``python -m tests.lower.local.sweep`` does the same for all of them.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.lower.local.sweep import MESH, cases, check_kind

KINDS = (
    "conv_general_dilated cumlogsumexp dynamic_update_slice ragged_dot_general "
    "random_fold_in scatter-mul sort tile top_k triangular_solve zeta"
).split()


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return dict(cases(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_alone_and_in_pairs(
    kind: str, programs: dict[str, Any], device_mesh: Any
) -> None:
    assert check_kind(programs[kind], device_mesh(MESH), most=4) >= 1
