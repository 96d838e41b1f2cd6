"""Compiling in a process of its own: facts, failures as data, the cache.

The programs are small (each compiles in a second or two with its process), and each
compiled module serves several tests.
"""

from __future__ import annotations

import functools
import gzip
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rhino_jax.errors import VerifyError
from rhino_jax.verify import compile_only
from rhino_jax.verify.collectives import axes_key, collective_axes
from rhino_jax.verify.compile_only import compile_for, compile_lowered, installed
from rhino_jax.verify.facts import CompiledFacts, OutOfMemory, out_of_memory
from rhino_jax.verify.targets import parse_target
from tests.verify import programs

TARGETS = {"cpu": "cpu:8", "cuda": "h100:1x8", "tpu": "v5e:2x4"}
everywhere = pytest.mark.parametrize(
    "platform",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.compilers),
        pytest.param("tpu", marks=pytest.mark.compilers),
    ],
)


@functools.cache
def facts(name: str, platform: str) -> CompiledFacts:
    if not installed(platform):
        pytest.skip(f"the compiler for {platform} is not installed")
    lowered = programs.lower(name, platform)
    return compile_for(lowered, TARGETS[platform], cache_dir=None)


def counted(found: CompiledFacts) -> list[tuple[str, str, int]]:
    return sorted(
        (one.kind, axes_key(collective_axes(one, programs.MESH_SHAPE)), one.trip_count)
        for one in found.collectives
    )


@everywhere
def test_every_written_collective_is_there(platform: str) -> None:
    found = facts("mixed", platform)
    assert found.ok, found.message
    assert counted(found) == [
        ("all-gather", "d", 1),
        ("all-reduce", "t", 1),
        ("collective-permute", "d", 1),
        ("reduce-scatter", "t", 1),
    ]
    assert found.target == TARGETS[platform] and found.device_count == 8
    assert found.compiler_version and found.compile_seconds > 0
    assert found.collectives[0].source.startswith(programs.__file__)


@everywhere
def test_nested_loops_multiply(platform: str) -> None:
    """3 turns outside, 15 inside; the carry is donated and shares its memory."""
    found = facts("nested", platform)
    assert counted(found) == [
        ("all-gather", "d", 3),
        ("all-gather", "t", 15),
        ("all-reduce", "t", 1),
        ("reduce-scatter", "t", 15),
    ]
    assert found.unknown_trips == ()
    assert found.memory is not None
    assert found.memory.argument_bytes == 2 * 128 * 256 * 4
    assert found.memory.alias_bytes == 128 * 256 * 4


@everywhere
def test_zero_reduce_scatters_once_after_accumulation(platform: str) -> None:
    """Every compiler keeps real reduce-scatters, outside the microbatch loop."""
    found = facts("zero", platform)
    scatters = [one for one in found.collectives if one.kind == "reduce-scatter"]
    assert sum(one.operand_bytes for one in scatters) == 3 * 1024 * 1024 * 4
    assert {one.trip_count for one in scatters} == {1}
    large = [one for one in found.collectives if one.operand_bytes > 1024]
    assert {one.kind for one in large} == {"all-gather", "reduce-scatter"}
    assert found.memory is not None
    assert found.memory.alias_bytes == 6 * 512 * 1024 * 4


def test_flops_count_loop_bodies_once() -> None:
    found = facts("nested", "cpu")
    once = 2 * 128 * 256 * 256
    assert found.flops_once is not None and once < found.flops_once < 1.1 * once


def test_device_order_changes_nothing_but_places() -> None:
    lowered = programs.lower("mixed", "cpu")
    turned = compile_for(
        lowered, "cpu:8", device_order=[7, 6, 5, 4, 3, 2, 1, 0], cache_dir=None
    )
    assert counted(turned) == counted(facts("mixed", "cpu"))
    with pytest.raises(VerifyError, match="each of the 8 devices"):
        compile_for(lowered, "cpu:8", device_order=[0, 1], cache_dir=None)


def test_facts_survive_json() -> None:
    found = facts("mixed", "cpu")
    again = CompiledFacts.from_json(found.to_json())
    assert again == found and again.collectives == found.collectives
    short = CompiledFacts(
        "refused", "x", 8, "c", "1", out_of_memory=OutOfMemory(5, 4), message="no"
    )
    assert CompiledFacts.from_json(short.to_json()) == short
    for damaged in ("[]", '{"format": 1}', '{"format": 99}', "{"):
        with pytest.raises(ValueError):
            CompiledFacts.from_json(damaged)


# ---- failures --------------------------------------------------------------------


def test_text_that_does_not_parse_is_refused() -> None:
    found = compile_for("module @broken {", "cpu:1", cache_dir=None)
    assert found.outcome == "refused"
    assert "does not parse" in found.message
    assert found.collectives == () and found.out_of_memory is None


def test_a_compiler_that_dies_is_data() -> None:
    dying = "import os, sys; print('last words', file=sys.stderr); os.abort()"
    found = compile_for(
        "module {}", "cpu:1", cache_dir=None, command=(sys.executable, "-c", dying)
    )
    assert found.outcome == "crashed"
    assert signal.SIGABRT.name in found.message and "last words" in found.message


def test_a_process_without_a_result_is_a_crash() -> None:
    found = compile_for(
        "module {}", "cpu:1", cache_dir=None, command=(sys.executable, "-c", "")
    )
    assert (found.outcome, "exit code 0" in found.message) == ("crashed", True)


def test_time_runs_out() -> None:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    start = time.monotonic()
    found = compile_for(
        "module {}", "cpu:1", cache_dir=None, timeout_seconds=0.3, command=command
    )
    assert found.outcome == "timeout" and "0.3 seconds" in found.message
    assert time.monotonic() - start < 30


def test_an_unknown_compiler_option_is_refused() -> None:
    lowered = programs.lower("mixed", "cpu")
    found = compile_for(
        lowered, "cpu:8", options={"xla_no_such_option": True}, cache_dir=None
    )
    assert found.outcome == "refused" and "xla_no_such_option" in found.message


def test_wrong_number_of_devices() -> None:
    with pytest.raises(VerifyError, match="is for 8 devices and the target has 4"):
        compile_for(programs.lower("mixed", "cpu"), "cpu:4", cache_dir=None)


def test_a_mesh_of_another_size_than_the_target() -> None:
    with pytest.raises(VerifyError, match="mesh has 16 devices and h100:1x8 has 8"):
        compile_lowered("module {}", "h100:8", 16, cache_dir=None)


def test_missing_compilers_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"tpu": ("no-such-tpu",), "cuda": ("no-such-gpu",), "cpu": ("jaxlib",)}
    monkeypatch.setattr(compile_only, "_PACKAGES", absent)
    assert not installed("tpu") and installed("cpu")
    with pytest.raises(VerifyError, match=r"pip install 'rhino-jax\[tpu\]'"):
        compile_for("module {}", "v5e:2x2", cache_dir=None)
    with pytest.raises(VerifyError, match=r"pip install 'rhino-jax\[gpu\]'"):
        compile_for("module {}", "h100:8", cache_dir=None)


@pytest.mark.compilers
def test_out_of_memory_is_refused_with_both_numbers() -> None:
    """0.5 TiB of activations on v5e chips of 16 GiB: the TPU compiler says so."""
    if not installed("tpu"):
        pytest.skip("the compiler for tpu is not installed")
    found = compile_for(programs.huge("tpu"), "v5e:2x4", cache_dir=None)
    assert found.outcome == "refused", found.outcome
    assert found.out_of_memory is not None
    needed, available = (
        found.out_of_memory.needed_bytes,
        found.out_of_memory.available_bytes,
    )
    assert needed > available
    assert 15 * 2**30 < available <= 16 * 2**30


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Ran out of memory in memory space hbm. Used 21.40G of 15.75G hbm. "
            "Exceeded hbm capacity by 5.65G.",
            OutOfMemory(int(21.4 * 2**30), int(15.75 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: Out of memory", OutOfMemory(0, 0)),
        ("INVALID_ARGUMENT: no such axis", None),
    ],
)
def test_out_of_memory_messages(message: str, expected: OutOfMemory | None) -> None:
    assert out_of_memory(message) == expected


# ---- the cache -------------------------------------------------------------------


def test_cache(tmp_path: Path) -> None:
    """Locations do not matter to it; options do; damage is mended."""
    first = compile_for(programs.lower("mixed", "cpu"), "cpu:8", cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.json.gz")
    text = programs.lower("mixed", "cpu").as_text()  # no locations in it
    again = compile_for(text, "cpu:8", cache_dir=tmp_path)
    assert again.from_cache and not first.from_cache
    assert replace(again, from_cache=False) == first
    for damage in (b"", b"junk", gzip.compress(b"{}"), file.read_bytes()[:-9]):
        file.write_bytes(damage)
        assert compile_only._read(file) is None
    assert not compile_for(text, "cpu:8", cache_dir=tmp_path).from_cache
    assert compile_only._read(file) is not None
    other = {"xla_cpu_enable_fast_math": True}
    fast = compile_for(text, "cpu:8", options=other, cache_dir=tmp_path)
    assert not fast.from_cache
    assert len(list(tmp_path.rglob("*.json.gz"))) == 2
    assert not list(tmp_path.rglob("*.partial"))


def test_crashes_are_not_kept(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    compile_for("module {}", "cpu:1", cache_dir=tmp_path, command=command)
    assert not list(tmp_path.rglob("*.json.gz"))


def test_many_writers_at_once(tmp_path: Path) -> None:
    """Whoever reads meanwhile sees whole facts."""
    place = tmp_path / "one.json.gz"
    some = [CompiledFacts("ok", str(n), 8, "c", "1", hlo="x" * 9999) for n in range(8)]
    seen: list[CompiledFacts | None] = []

    def work(mine: CompiledFacts) -> None:
        for _ in range(20):
            compile_only._write(place, mine)
            seen.append(compile_only._read(place))

    threads = [threading.Thread(target=work, args=(one,)) for one in some]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        one is not None and replace(one, from_cache=False) in some for one in seen
    )
    assert list(tmp_path.iterdir()) == [place]


def test_a_cache_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VerifyError, match="another cache_dir"):
        compile_for("module {}", "cpu:1", cache_dir=tmp_path / "file")


@pytest.mark.compilers
@pytest.mark.parametrize("name", ["t4", "b200"])
def test_other_gpus_are_described(name: str) -> None:
    """The oldest and the newest kind of card pass the GPU compiler."""
    if not installed("cuda"):
        pytest.skip("the compiler for cuda is not installed")
    target = parse_target(f"{name}:1x8")
    found = compile_for(programs.lower("mixed", "cuda"), target, cache_dir=None)
    assert counted(found) == counted(facts("mixed", "cuda"))
