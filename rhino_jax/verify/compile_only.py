"""Compile a program with the real GPU or TPU compiler, on a machine without either.

``compile_for`` takes a lowered program and the name of a target and gives back what the
compiler said: collectives, memory, time, or why it refused. The compiler runs in a
process of its own, because it may end its process on a program it dislikes; that, a
time-out and a lack of memory come back as data.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rhino_jax import compat
from rhino_jax.errors import VerifyError
from rhino_jax.verify import child
from rhino_jax.verify.facts import (
    FORMAT,
    CompiledFacts,
    CompiledMemory,
    Outcome,
    out_of_memory,
)
from rhino_jax.verify.hlo_time import GPU_OPTIONS
from rhino_jax.verify.targets import Target, parse_target

Option = str | bool | int | float
DEFAULT_CACHE = Path("~/.cache/rhino_jax/compiled")
DEFAULT_OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "cpu": {},
    "tpu": {},
    # Autotuning would need the card; without it Triton's matrix products do not
    # compile for every shape, so they go to cuBLAS.
    "cuda": {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False},
}
_PACKAGES = {
    "cpu": ("jaxlib",),
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda13-pjrt", "jax-cuda12-pjrt"),
}
_EXTRA = {"tpu": "tpu", "cuda": "gpu"}
_LAST_LINES = 12


def compile_for(
    program: Any,
    target: str | Target,
    *,
    options: Mapping[str, Option] | None = None,
    device_order: Sequence[int] = (),
    cache_dir: Path | None = DEFAULT_CACHE,
    timeout_seconds: float = 600.0,
    command: Sequence[str] | None = None,
) -> CompiledFacts:
    """Compile ``program`` for ``target`` and say what came of it.

    Args:
        program: a ``jax.stages.Lowered``, or StableHLO as bytecode or text, lowered for
            the target's platform (``trace(...).lower(lowering_platforms=(platform,))``)
            and for as many devices as the target has.
        target: such as "h100:2x8", "v5e:4x4" or "cpu:8" (see ``parse_target``).
        options: compiler options, on top of ``DEFAULT_OPTIONS`` of the platform.
        device_order: which device of the topology stands at each place of the mesh
            (row-major); () is the topology's own order.
        cache_dir: where facts are kept; None keeps nothing. Their key is the program
            without source locations, the target, the options and the versions of JAX
            and of the compiler.
        timeout_seconds: after this the compiler is stopped (outcome "timeout").
        command: the child process to run instead of our own, the folder appended.

    Raises:
        ClusterError: no such target.
        VerifyError: the compiler is not installed, cannot describe the target, or the
            program is for another number of devices; or ``cache_dir`` is no place to
            write.
    """
    aim = parse_target(target) if isinstance(target, str) else target
    compiler, version = _compiler(aim)
    module = _module(program)
    chosen = {**DEFAULT_OPTIONS[aim.platform], **(options or {})}
    if device_order and sorted(device_order) != list(range(aim.device_count)):
        raise VerifyError(
            f"device_order must name each of the {aim.device_count} devices of "
            f"{aim.text} once, from 0; it has {len(device_order)} entries."
        )
    request = {
        "platform": aim.platform,
        "topology": aim.topology,
        "config": aim.config,
        "host_bounds": aim.host_bounds,
        "device_count": aim.device_count,
        "device_order": list(device_order),
        "options": chosen,
    }
    place = None
    if cache_dir is not None:
        place = _place(cache_dir, module, request, (compiler, version))
        if (cached := _read(place)) is not None:
            return cached
    with tempfile.TemporaryDirectory(prefix="rhino_compile_") as name:
        folder = Path(name)
        (folder / child.MODULE).write_bytes(module)
        (folder / child.REQUEST).write_text(json.dumps(request))
        facts = _run(folder, command or _COMMAND, timeout_seconds)
        facts = replace(
            facts,
            target=aim.text,
            device_count=aim.device_count,
            compiler=compiler,
            compiler_version=version,
        )
    if place is not None and facts.outcome in ("ok", "refused"):
        _write(place, facts)
    return facts


def compile_lowered(
    program: Any,
    target: str,
    num_devices: int,
    *,
    priced: bool = False,
    **how: Any,
) -> CompiledFacts:
    """``compile_for``, but first the target must have as many devices as the mesh.

    ``priced``: with the compiler's own estimates of time, where it has to be asked.
    ``how``: the other arguments of :func:`compile_for`.

    Raises:
        ClusterError: no such target.
        VerifyError: another number of devices, and all that ``compile_for`` raises.
    """
    aim = parse_target(target)
    if aim.device_count != num_devices:
        raise VerifyError(
            f"the mesh has {num_devices} devices and {aim.text} has "
            f"{aim.device_count}; next: a target or a mesh of the same size."
        )
    if priced and aim.platform == "cuda":
        how["options"] = {**GPU_OPTIONS, **how.get("options", {})}
    return compile_for(program, aim, **how)


def installed(platform: str) -> bool:
    """Whether the compiler of a platform ("cpu", "tpu", "cuda") is installed."""
    return _package(platform) is not None


def _package(platform: str) -> tuple[str, str] | None:
    for package in _PACKAGES[platform]:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _compiler(target: Target) -> tuple[str, str]:
    found = _package(target.platform)
    if found is None:
        raise VerifyError(
            f"compiling for {target.text} needs {_PACKAGES[target.platform][0]}, which "
            "is not installed; next: "
            f"pip install 'rhino-jax[{_EXTRA[target.platform]}]' "
            "(no such device is needed)."
        )
    return found


def _module(program: Any) -> bytes:
    if isinstance(program, bytes):
        return program
    return (
        program.encode() if isinstance(program, str) else compat.module_bytes(program)
    )


# ---- the process -------------------------------------------------------------------

_COMMAND = (sys.executable, "-m", child.__name__)
_OURS = ("JAX_", "XLA_", "LIBTPU_", "TPU_")


def _environment() -> dict[str, str]:
    """The child's environment: nothing of the user's that changes what compilers do."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # this process, or another, may hold it
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def _run(folder: Path, command: Sequence[str], timeout_seconds: float) -> CompiledFacts:
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return _failed("timeout", log, f"stopped after {timeout_seconds:g} seconds")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result_file = folder / child.RESULT
    if code != 0 or not result_file.exists():
        return _failed("crashed", log, f"the compiler's process {_ending(code)}")
    return _facts(folder, json.loads(result_file.read_text()))


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    known = {one.value: one.name for one in signal.Signals}
    ended = f"was ended by {known.get(-code, f'signal {-code}')}"
    if code == -signal.SIGKILL:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        ended += (
            f", as where this machine runs out of memory ({free:.1f} GiB are free now);"
            " next: a smaller model or depth, or a machine with more"
        )
    return ended


def _failed(outcome: Outcome, log: Path, what: str) -> CompiledFacts:
    lines = log.read_text(errors="replace").splitlines()
    message = "\n".join([what, *lines[-_LAST_LINES:]])
    return CompiledFacts(outcome, "", 0, "", "", message)


def _facts(folder: Path, result: dict[str, Any]) -> CompiledFacts:
    outcome = result["outcome"]
    if outcome == "unavailable":
        raise VerifyError(
            f"the compiler can not describe this target: {result['message']}; next: a "
            "shape that this device comes in, or the compiler's version that JAX asks "
            "for."
        )
    if outcome == "mismatch":
        raise VerifyError(
            f"the program is for {result['wanted']} devices and the target has "
            f"{result['devices']}; next: lower it for {result['devices']} devices or "
            f"name a target of {result['wanted']}."
        )
    if outcome == "refused":
        lines = result["message"].splitlines()
        return CompiledFacts(
            "refused",
            *("", 0, "", ""),
            message="\n".join(lines[-_LAST_LINES:]),
            out_of_memory=out_of_memory(result["message"]),
        )
    assert outcome == "ok", outcome
    return CompiledFacts(
        "ok",
        *("", 0, "", ""),
        memory=CompiledMemory(**result["memory"]),
        flops_once=result["flops_once"],
        compile_seconds=result["compile_seconds"],
        hlo=(folder / child.HLO).read_text(),
    )


# ---- the cache -----------------------------------------------------------------------


def _place(
    cache_dir: Path, module: bytes, request: Mapping[str, Any], compiler: Sequence[str]
) -> Path:
    """The file for this program, target, options and compiler."""
    try:
        body = compat.without_locations(compat.parse_stablehlo(module)).encode()
    except compat.StableHloError:
        body = module  # the child says what is wrong with it
    versions = [*compiler, importlib.metadata.version("jax")]
    settings = json.dumps([FORMAT, versions, request], sort_keys=True).encode()
    key = hashlib.sha256(settings + b"\0" + body).hexdigest()
    folder = cache_dir.expanduser() / key[:2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise VerifyError(
            f"compiled facts can not be kept under {folder}: {fault}; next: another "
            "cache_dir, or cache_dir=None to keep nothing."
        ) from fault
    return folder / f"{key}.json.gz"


def _read(place: Path) -> CompiledFacts | None:
    """The facts in a cache file; None where there is none or it is damaged."""
    try:
        text = gzip.decompress(place.read_bytes()).decode()
        return replace(CompiledFacts.from_json(text), from_cache=True)
    except (OSError, EOFError, zlib.error, ValueError):
        return None


def _write(place: Path, facts: CompiledFacts) -> None:
    """Write a cache file whole: concurrent writers each rename one of their own."""
    partial = place.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(gzip.compress(facts.to_json().encode(), 6))
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
