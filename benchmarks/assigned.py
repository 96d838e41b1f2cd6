"""What the TPU compiler needs of memory, without waiting for its kernels.

Stands in for :mod:`rhino_jax.verify.child` (the ``command`` of ``compile_for``). Code
for every fusion takes the TPU compiler minutes and changes nothing in memory or
collectives: this has it say in its log how it assigned its buffers, reads the scheduled
HLO text that it dumps, and ends it there. Ten seconds instead of two to seven minutes,
the same program. Written against the logs of libtpu 0.0.42 and 0.0.48.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rhino_jax.verify import child
from rhino_jax.verify.facts import CompiledMemory

COMMAND = (sys.executable, "-m", "benchmarks.assigned")
KEPT = Path("~/.cache/rhino_jax/assigned")
"""Where these facts are kept, apart from those of whole compiles."""
SAYS = {
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_VMODULE": "buffer_assignment=3,heap_simulator=1",
}
DONE = "Buffer assignment done"
_ALLOCATION = re.compile(r"cc:\d+\] allocation \d+: size (\d+), (?:page \d+, )?(.*)")
_TEMPORARIES = "preallocated-temp:"
_VALUE = re.compile(r"value: (<\d+ .*?>) \(size=(\d+),offset=(\d+)\)")
_TICK = re.compile(r"heap_simulator.cc:\d+\] Time step: (\d+)")
_BORN = re.compile(r"heap_simulator.cc:\d+\] Start buffer: (<.*>)")
_FREED = re.compile(r"heap_simulator.cc:\d+\] (?: |Sharing <.*> with) (<.*>)")


def main(folder: Path) -> None:
    """Compile what ``folder`` asks for as far as its memory is known."""
    dumped, log = folder / "dumped", folder / "assignment.log"
    dumped.mkdir()
    says = {
        **SAYS,
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dumped} --xla_jf_dump_hlo_text=true",
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", child.__name__, str(folder)],
            stdout=sink,
            stderr=sink,
            env={**os.environ, **says},
        )
        text = ""
        while process.poll() is None and not text:
            time.sleep(0.5)
            text = _program(dumped) if DONE in log.read_text(errors="replace") else ""
        process.kill()
        process.wait()
    if (folder / child.RESULT).exists():  # refused, or done already
        return
    if not text:
        print("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
        raise SystemExit(process.returncode or 1)
    (folder / child.HLO).write_text(text)
    memory = assigned(log.read_text(errors="replace").splitlines())
    result = {"outcome": "ok", "compile_seconds": 0.0, "flops_once": None}
    (folder / child.RESULT).write_text(json.dumps({**result, "memory": asdict(memory)}))


def _program(dumped: Path) -> str:
    """The scheduled HLO text; "" until it is there whole."""
    texts = [path.read_text() for path in dumped.glob("*-TLP-hlo.txt")]
    return max((x for x in texts if x.rstrip().endswith("}")), key=len, default="")


def assigned(log: list[str]) -> CompiledMemory:
    """What a log says of device memory.

    ``peak_bytes`` are the bytes of the heap that are taken at once, beside arguments
    and results; ``temp_bytes`` is the whole heap: wide where there is room (a fast
    placement goes first, and is kept if it leaves 2.5 GiB free).
    """
    start = next(i for i, x in enumerate(log) if "Assigning buffers to module" in x)
    log = log[start:]
    sizes = {"parameter": 0, "live-out": 0, "alias": 0}
    temporaries: list[tuple[int, int]] = []
    for index, line in enumerate(log):
        if found := _ALLOCATION.search(line):
            num_bytes, what = int(found.group(1)), found.group(2)
            if what == _TEMPORARIES:
                temporaries.append((index, num_bytes))
            given, out = what.startswith("parameter"), "maybe-live-out" in what
            sizes["parameter"] += num_bytes * given
            sizes["live-out"] += num_bytes * out
            sizes["alias"] += num_bytes * (given and out)
    heap, heap_bytes = temporaries[0]
    fixed = sizes["parameter"] + sizes["live-out"] - sizes["alias"]
    return CompiledMemory(
        argument_bytes=sizes["parameter"],
        output_bytes=sizes["live-out"],
        alias_bytes=sizes["alias"],
        temp_bytes=heap_bytes,
        generated_code_bytes=0,
        peak_bytes=fixed + taken_bytes(list(_stays(log, heap))),
    )


def _stays(log: list[str], heap: int) -> Iterator[tuple[int, int, int, int]]:
    """First and last tick, begin and end of every value in the heap (at a line)."""
    tick, born, freed = 0, dict[str, int](), dict[str, int]()
    for line in log[:heap]:  # of several simulations the last is this heap's
        if found := _TICK.search(line):
            tick = int(found.group(1))
        elif found := _BORN.search(line):
            born[found.group(1)] = freed[found.group(1)] = tick
        elif found := _FREED.search(line):
            freed[found.group(1)] = tick
    for line in log[heap + 1 :]:
        found = _VALUE.search(line)
        if not found:
            return
        name, size, offset = found.groups()
        yield born[name], freed[name], int(offset), int(offset) + int(size)


def taken_bytes(stays: list[tuple[int, int, int, int]]) -> int:
    """The most addresses that are taken during one tick.

    >>> taken_bytes([(0, 2, 0, 10), (1, 3, 10, 15), (1, 3, 10, 14), (3, 4, 0, 8)])
    15
    """
    top = 0
    for tick in {first for first, *_ in stays}:
        end = held = 0
        there = [(a, b) for first, last, a, b in stays if first <= tick <= last]
        for a, b in sorted(there):
            held += max(0, b - max(a, end))
            end = max(end, b)
        top = max(top, held)
    return top


if __name__ == "__main__":
    main(Path(sys.argv[1]))
