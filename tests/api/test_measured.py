"""Devices that the catalogue does not know are measured once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rhino_jax.api import measured
from rhino_jax.api.attached import attached_cluster
from rhino_jax.api.measured import as_cluster, measure
from rhino_jax.api.planned import subject_of
from rhino_jax.errors import ClusterError
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Wish
from rhino_jax.trace import trace

SMALL: dict[str, Any] = {
    "seconds": 0.1,
    "side": 128,
    "copied_bytes": 2**22,
    "large_bytes": 2**20,
}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder; and measurements are small ones."""
    monkeypatch.setattr(measured, "measure", partial(measure, **SMALL))
    return tmp_path


def look_up(folder: Path) -> measured.Measured:
    measured._kept.cache_clear()
    return measured._kept(tuple(jax.devices()), 2**30, folder)


def test_what_is_measured_can_be() -> None:
    """Within what any machine that runs tests has: 1 MFLOPS to 1 PFLOPS."""
    found = measure(jax.devices(), 2**30, **SMALL)
    assert set(found.flops_per_second) == {"bf16", "f16", "f32", "int8"}
    assert all(1e6 < peak < 1e15 for peak in found.flops_per_second.values())
    assert 1e7 < found.memory_bytes_per_second < 1e14
    assert 1e5 < found.link_bytes_per_second < 1e13
    assert 1e-9 < found.link_latency_seconds < 1
    assert "TFLOPS" in str(found)


def test_measured_once_and_said(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="not in the catalogue.*measured in"):
        first = look_up(kept)
    (file,) = kept.iterdir()

    def never(*args: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(measured, "measure", never)
        assert look_up(kept) == first
    file.write_text("{")
    with pytest.warns(UserWarning, match="measured in"):
        look_up(kept)


def test_plans_are_made_for_it() -> None:
    count = len(jax.devices())
    found = measure(jax.devices(), 2**30, **SMALL)
    cluster = as_cluster(found, count)

    def step(w: Any, x: Any) -> Any:
        return w - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)

    array = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    traced = trace(step, (array((64, 64)), array((128, 64))))
    wish = Wish(cluster, (Mesh.of(x=count),), 2**30)
    best = plan_search(subject_of(traced), wish).best
    assert best.prediction.step_seconds > 0


def test_devices_that_can_not_be_measured() -> None:
    def device(**more: Any) -> Any:
        one = {"platform": "gpu", "device_kind": "Some GPU", "process_index": 0}
        return SimpleNamespace(**{**one, "memory_stats": lambda: None, **more})

    with pytest.raises(ClusterError, match="does not tell its memory"):
        attached_cluster([device()])
    with pytest.raises(ClusterError, match="nearest device"):
        attached_cluster([device(platform="tpu", device_kind="TPU v99")])
