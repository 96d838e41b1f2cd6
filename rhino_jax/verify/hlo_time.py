"""What the compiler itself thinks a step takes, read from what it wrote down.

The GPU compiler, asked to (``xla_gpu_collect_cost_model_stats``), writes NVIDIA's
speed-of-light estimate beside every library call, fusion and collective; the TPU
compiler always writes ``estimated_cycles`` beside its fusions, none beside
collectives. Loop bodies count as often as they run. No JAX here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rhino_jax.verify.collectives import KINDS
from rhino_jax.verify.hlo_loops import nothing_known, trip_count
from rhino_jax.verify.hlo_text import HloModule, Instruction, parse_module

GPU_OPTIONS = {"xla_gpu_collect_cost_model_stats": True}
"""Compiler options with which the GPU compiler writes its prices."""

TPU_CLOCK_HZ = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9}
"""Peak bfloat16 over what a cycle does: 8, 4 and 8 matrix units of 128 x 128 a chip
(cloud.google.com/tpu/docs, system architecture), two operations each."""

_PRICES = re.compile(r'"reification_cost":(\[\{.*?\}\])')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclass(frozen=True)
class CompilerTime:
    """The compiler's estimate of one step on one device; zeros where it has none.

    Attributes:
        kernel_seconds: fusions, library calls, copies (GPU).
        collective_seconds: of collectives, one after the other (GPU).
        cycles: of fusions and copies (TPU).
        loops_known: whether every loop's trip count was.
    """

    kernel_seconds: float = 0.0
    collective_seconds: float = 0.0
    cycles: int = 0
    loops_known: bool = True

    def seconds(self, device: str) -> float | None:
        """Seconds of kernels on ``device`` ("v5e"); None where nothing says it."""
        if self.cycles:
            clock = TPU_CLOCK_HZ.get(device)
            return self.cycles / clock if clock else None
        return self.kernel_seconds or None


def compiler_time(text: str) -> CompilerTime:
    """Sum up what is written in the text of a compiled module.

    Raises:
        ValueError: the text is no HLO module.
    """
    module = parse_module(text)
    kernels = collectives = 0.0
    cycles, known = 0, True
    for one, trips, sure in _run(module, module.entry, 1, True):
        known &= sure
        if spent := cycles_of(one):
            cycles += trips * spent
        elif priced := _PRICES.search(one.rest):
            seconds = trips * _microseconds(priced.group(1)) * 1e-6
            if one.opcode.removesuffix("-start") in KINDS:
                collectives += seconds
            else:
                kernels += seconds
    return CompilerTime(kernels, collectives, cycles, known)


def cycles_of(one: Instruction) -> int:
    """What the TPU compiler thinks an instruction takes; 0 where it says nothing."""
    found = _CYCLES.search(one.rest)
    return int(found.group(1)) if found else 0


def _microseconds(prices: str) -> float:
    """Of several models' prices that of the newest, the speed of light."""
    found = {one["name"]: one["exec_time_us"] for one in json.loads(prices)}
    return float(found.get("sol", next(iter(found.values()))))


def _run(
    module: HloModule, name: str, trips: int, known: bool
) -> Iterator[tuple[Instruction, int, bool]]:
    """Every instruction that runs as a kernel of its own, and how often."""
    inside = module.computations[name]
    for one in inside.instructions.values():
        if one.opcode == "while":
            turns = trip_count(module, inside, one, nothing_known)
            within = trips * (1 if turns is None else turns)
            sure = known and turns is not None
            yield from _run(module, one.attribute("body"), within, sure)
        elif one.opcode == "call":
            yield from _run(module, one.attribute("to_apply"), trips, known)
        else:
            yield one, trips, known
