"""``planned.verify()``: both sides in words; compilers that fail; none installed."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rhino_jax as rhino
from rhino_jax.api.planned import Planned
from rhino_jax.api.verified import Verified
from rhino_jax.errors import VerifyError
from rhino_jax.verify.compile_only import installed
from rhino_jax.verify.facts import CompiledFacts, CompiledMemory, OutOfMemory
from rhino_jax.verify.witness import Witness
from tests.api.test_api import make_batch, train_step


def shapes() -> tuple[Any, Any]:
    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {"up": f32(16, 64), "b": f32(64), "down": f32(64, 8)}
    batch = {k: f32(*v.shape) for k, v in make_batch().items()}
    return (params, params), batch


@cache
def planned(cluster: str) -> Planned:
    return rhino.plan(train_step, *shapes(), cluster=cluster, recipe="zero1")


@cache
def verified() -> Verified:
    return planned("cpu:8").verify(cache_dir=None)


def test_both_sides_are_told() -> None:
    found = verified()
    assert found.ok, str(found)
    text = str(found)
    for part in (
        "the compiled program is the plan, and fits",
        "all-gather",
        "reduce-scatter",
        "memory of a device",
        "at the predicted peak (",
        "at the compiled peak (",
        "the compiler gives no estimate of its own",
    ):
        assert part in text
    assert all(len(line) <= 130 for line in text.splitlines())


def test_bytes_by_kind_add_up_to_bytes_by_axes() -> None:
    found = verified()
    for row in found.rows:
        kinds = [one for one in found.kinds if one.axes == row.axes]
        assert sum(one.planned_bytes for one in kinds) == row.planned_bytes
        assert sum(one.compiled_bytes for one in kinds) == row.compiled_bytes
    assert found.rows


def test_what_stands_at_the_compiled_peak_is_near_what_is_set_aside() -> None:
    found = verified()
    assert found.busiest is not None and found.facts.memory is not None
    ours, theirs = found.busiest.temp_bytes, found.facts.memory.temp_bytes
    assert 0.5 * theirs <= ours <= 1.5 * theirs
    assert found.fits and found.predicted_fits
    assert found.compiled_peak_bytes == found.facts.memory.live_bytes  # no CPU peak


def verify_by(code: str, tmp_path: Path, **options: Any) -> Verified:
    """``verify`` with a Python program in the compiler's place."""
    command = (sys.executable, "-c", code)
    return planned("cpu:8").verify(cache_dir=tmp_path, command=command, **options)


def test_a_compiler_that_dies_is_told_of(tmp_path: Path) -> None:
    code = "import os; print('Check failed: x', flush=True); os.abort()"
    found = verify_by(code, tmp_path)
    assert not found.ok and found.fits is None
    text = str(found)
    assert "the compiler's process ended: nothing is verified" in text
    assert "SIGABRT" in text and "Check failed: x" in text
    assert "not told" in text  # the compiled peak


def test_no_memory_for_the_compiler(tmp_path: Path) -> None:
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    text = str(verify_by(code, tmp_path))
    assert "SIGKILL" in text and "runs out of memory" in text and "GiB are free" in text


def test_a_compiler_that_takes_too_long(tmp_path: Path) -> None:
    code = "import time; print('pass 7', flush=True); time.sleep(60)"
    text = str(verify_by(code, tmp_path, timeout_seconds=1.0))
    assert "ran out of time" in text and "pass 7" in text


REFUSAL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (23.78G) exceeds available HBM (15.75G)."
)


def test_a_refusal_for_memory_is_a_verdict(tmp_path: Path) -> None:
    code = (
        "import json, pathlib, sys\n"
        f"result = {{'outcome': 'refused', 'message': {REFUSAL!r}}}\n"
        "pathlib.Path(sys.argv[1], 'result.json').write_text(json.dumps(result))"
    )
    found = verify_by(code, tmp_path)
    assert found.fits is False and not found.ok
    assert found.compiled_peak_bytes == int(23.78 * 2**30)
    text = str(found)
    assert "refused for lack of memory" in text and "23.8 GiB" in text
    assert "by the compiler it does not fit" in text


@pytest.mark.parametrize(
    ("cluster", "extra"), [("h100:1x8", "gpu"), ("v5e:2x4", "tpu")]
)
def test_without_extras_all_but_verify_works(
    cluster: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither compiler installed: planning, printing, saving and lowering do."""
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "libtpu" or package.startswith("jax-cuda"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert not installed("cuda") and not installed("tpu")
    found = rhino.plan(train_step, *shapes(), cluster=cluster, cache_dir="")
    assert cluster in str(found) and found.predicted is not None
    assert found.explain("state/0/up")
    found.save(tmp_path / "plan.json")
    again = rhino.plan(train_step, *shapes(), plan=tmp_path / "plan.json")
    assert not found.diff(again)
    assert "stablehlo" in found.lower().as_text()
    with pytest.raises(VerifyError, match=rf"pip install 'rhino-jax\[{extra}\]'"):
        found.verify()


@pytest.mark.compilers
@pytest.mark.parametrize("cluster", ["h100:1x8", "v5e:2x4"])
def test_the_real_compilers_bear_witness(cluster: str) -> None:
    if not installed(planned(cluster).platform):
        pytest.skip(f"no compiler for {cluster}")
    found = planned(cluster).verify(cache_dir=None)
    assert not found.missing and found.fits, str(found)
    assert "the compiler's estimate: " in str(found)


@pytest.mark.parametrize(
    ("target", "gaps", "arguments"), [("v5e:2x4", 0, 0), ("h100:1x8", 1, 1)]
)
def test_what_a_device_must_have(target: str, gaps: int, arguments: int) -> None:
    """A TPU compiler's temporaries are not what is needed, its refusals are."""
    memory = CompiledMemory(100, 100, 100, 70, 0, 150)
    refusal = OutOfMemory(500, 400)
    prediction = planned("cpu:8").prediction()
    facts = CompiledFacts("ok", target, 8, "", "", memory=memory)
    accepted = Witness(facts, prediction, None, 0, "")
    refused = replace(
        accepted, facts=replace(facts, memory=None, out_of_memory=refusal)
    )
    assert accepted.needed_bytes == 150 + 20 * gaps and accepted.fits
    extra = arguments * prediction.memory.input_bytes
    assert refused.needed_bytes == 500 + extra and refused.fits is False
