"""The process that compiles: ``python -m rhino_jax.verify.child <folder>``.

A compiler may end the whole process on a program it dislikes, so it gets one of its
own. The folder holds ``request.json`` (platform, topology, config, host_bounds,
device_order, options) and ``module`` (StableHLO, bytecode or text); ``result.json`` and
``compiled.hlo`` are written there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REQUEST, MODULE, RESULT, HLO = "request.json", "module", "result.json", "compiled.hlo"


def main(folder: Path) -> None:
    """Compile what ``folder`` asks for and leave the result there."""
    request = json.loads((folder / REQUEST).read_text())
    result = _compile(folder, request)
    partial = folder / (RESULT + ".partial")
    partial.write_text(json.dumps(result))
    partial.rename(folder / RESULT)


def _compile(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    import jax  # the parent of this process chose the environment it loads in

    if request["platform"] == "cpu":
        jax.config.update("jax_num_cpu_devices", request["device_count"])
    from rhino_jax import compat

    try:
        module = compat.parse_stablehlo((folder / MODULE).read_bytes())
    except compat.StableHloError as fault:
        return _refused(f"the StableHLO does not parse: {fault}")
    try:
        devices = compat.described_devices(
            request["platform"],
            request["topology"],
            request["config"],
            request["host_bounds"],
        )
    except RuntimeError as fault:
        return {"outcome": "unavailable", "message": str(fault)}
    wanted = compat.partition_count(module)
    if wanted != len(devices):
        return {"outcome": "mismatch", "wanted": wanted, "devices": len(devices)}
    ordered = [devices[place] for place in request["device_order"] or range(wanted)]
    start = time.perf_counter()
    try:
        compiled = compat.compile_stablehlo(module, ordered, request["options"])
    except jax.errors.JaxRuntimeError as fault:
        return _refused(str(fault))
    compile_seconds = time.perf_counter() - start
    (folder / HLO).write_text("\n".join(m.to_string() for m in compiled.hlo_modules()))
    return {
        "outcome": "ok",
        "compile_seconds": compile_seconds,
        "memory": _memory(compiled),
        "flops_once": _flops(compiled, jax.errors.JaxRuntimeError),
        "device_kind": devices[0].device_kind,
    }


def _refused(message: str) -> dict[str, Any]:
    return {"outcome": "refused", "message": message}


def _memory(compiled: Any) -> dict[str, int]:
    stats = compiled.get_compiled_memory_stats()
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "generated_code_bytes": stats.generated_code_size_in_bytes,
        "peak_bytes": getattr(stats, "peak_memory_in_bytes", 0),
    }


def _flops(compiled: Any, unsupported: type[Exception]) -> float | None:
    """The compiler's count; the GPU compiler has none without a GPU."""
    try:
        analysis: Sequence[Any] | dict[str, float] = compiled.cost_analysis()
    except unsupported:
        return None
    counts = analysis if isinstance(analysis, dict) else dict(*analysis)
    return counts.get("flops")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
