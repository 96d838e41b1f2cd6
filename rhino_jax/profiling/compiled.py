"""What compilers say that kernels and collectives take, with no device.

The TPU compiler writes a number of cycles beside every fusion, XLA for GPUs its
speed-of-light price in microseconds beside library calls, fusions and collectives
(``xla_gpu_collect_cost_model_stats``). Loops count as often as they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rhino_jax.cluster.hardware import CUDA, TPU
from rhino_jax.cluster.links import TORUS_DIMENSIONS
from rhino_jax.errors import VerifyError
from rhino_jax.ir.steps import ALL_GATHER, ALL_REDUCE, PERMUTE, REDUCE_SCATTER
from rhino_jax.profiling.grid import SCOPE, Exchange, Kernel, chained
from rhino_jax.verify.compile_only import DEFAULT_CACHE, compile_for
from rhino_jax.verify.hlo_loops import (
    Binding,
    arguments,
    body_binding,
    nothing_known,
    trip_count,
)
from rhino_jax.verify.hlo_text import (
    Computation,
    HloModule,
    Instruction,
    op_name,
    parse_module,
)
from rhino_jax.verify.targets import Target, parse_target

PRICED: Mapping[str, bool] = {"xla_gpu_collect_cost_model_stats": True}
"""The GPU compiler's option that makes it write prices."""

CLOCK_HZ: Mapping[str, float] = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
"""Cycles a second of TPUs. How to Scale Your Model, part 2, and from it the peaks: MXUs
times cycles (v5e: 4 of 128x128 at 1.5 GHz make 197 TFLOPS)."""

TABLES = ("h20", "h100", "h200", "b200", "gb200")
"""GPUs (of capability 9.0 and 10.0) that XLA's speed-of-light model has tables of
products and of collectives for. For others it prices fusions alone."""
_WITHOUT_TABLES: Mapping[str, bool] = {
    "xla_gpu_enable_analytical_sol_latency_estimator": False
}

AT_ONCE: Mapping[str, int] = {CUDA: 250, TPU: 24}
"""Kernels compiled in one program."""

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOL = re.compile(r'\{[^{}]*"exec_time_us":([\d.eE+-]+)[^{}]*"name":"sol"\}')
_ANY = re.compile(r'"exec_time_us":([\d.eE+-]+)')
_NUMBER = re.compile(rf"{SCOPE}(\d+)_")
_COLLECTIVE = re.compile(
    f"({ALL_REDUCE}|{ALL_GATHER}|{REDUCE_SCATTER}|all-to-all|{PERMUTE})(-start)?$"
)


@dataclass(frozen=True)
class Priced:
    """One instruction: what it is, its name stack, its seconds in one execution."""

    opcode: str
    scope: str
    seconds: float

    @property
    def is_collective(self) -> bool:
        return bool(_COLLECTIVE.match(self.opcode))


def priced(hlo: str, clock_hz: float = 0.0) -> tuple[Priced, ...]:
    """Every priced instruction of a compiled program, loops multiplied out.

    Args:
        hlo: the compiled program's text.
        clock_hz: cycles a second of the TPU it is for; 0.0 for a GPU.

    Raises:
        ValueError: the text is no HLO module.
    """
    module = parse_module(hlo)
    return tuple(_walk(module, module.entry, nothing_known, 1.0, clock_hz))


def _walk(
    module: HloModule, name: str, binding: Binding, times: float, clock_hz: float
) -> Iterator[Priced]:
    inside: Computation = module.computations[name]
    for one in inside.instructions.values():
        seconds = _seconds(one, clock_hz)
        if seconds is not None:
            yield Priced(one.opcode, op_name(one), times * seconds)
        if one.opcode == "while":
            turns = trip_count(module, inside, one, binding) or 1
            bound = body_binding(module, inside, one, binding)
            body = one.attribute("body")
            yield from _walk(module, body, bound, times * turns, clock_hz)
        elif one.opcode in ("call", "async-start") and one.attribute("to_apply"):
            bound = arguments(module, inside, one, binding)
            called = one.attribute("to_apply")
            yield from _walk(module, called, bound, times, clock_hz)
        elif one.opcode == "conditional":
            branches = [
                tuple(_walk(module, branch, nothing_known, times, clock_hz))
                for branch in _branches(one)
            ]
            yield from max(branches, key=lambda b: sum(x.seconds for x in b))


def _branches(one: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    if listed:
        return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
    return [one.attribute("true_computation"), one.attribute("false_computation")]


def _seconds(one: Instruction, clock_hz: float) -> float | None:
    if clock_hz:
        cycles = _CYCLES.search(one.rest)
        return int(cycles.group(1)) / clock_hz if cycles else None
    if one.opcode.endswith("-done"):
        return None
    told = _SOL.search(one.rest) or _ANY.search(one.rest)
    return float(told.group(1)) * 1e-6 if told else None


def clock_of(target: Target) -> float:
    """Cycles a second of a target; 0.0 for a GPU.

    Raises:
        VerifyError: a TPU whose clock is not known, or a CPU.
    """
    name = target.text.partition(":")[0]
    if target.platform == CUDA:
        return 0.0
    if target.platform != TPU or name not in CLOCK_HZ:
        known = ", ".join(CLOCK_HZ)
        raise VerifyError(
            f"no compiler prices kernels of {target.text}; GPUs and {known} have one. "
            "Next: rhino profile on the device itself"
        )
    return CLOCK_HZ[name]


def kernel_seconds(
    kernels: Sequence[Kernel], name: str, cache_dir: Path | None = DEFAULT_CACHE
) -> list[float | None]:
    """Seconds of every kernel on one device ``name``; None where none is told.

    Raises:
        VerifyError: the compiler is not here, or does not compile them.
    """
    target = one_device(name)
    found: list[float | None] = []
    many = AT_ONCE[target.platform]
    for start in range(0, len(kernels), many):
        part = kernels[start : start + many]
        avals = tuple(kernel.avals for kernel in part)
        traced = jax.jit(chained(part)).trace(avals)
        lowered = traced.lower(lowering_platforms=(target.platform,))
        found.extend(_by_scope(lowered, target, len(part), cache_dir))
    return found


def has_table(name: str) -> bool:
    """Whether the compiler prices products and collectives of a GPU."""
    return name in TABLES


def options_of(target: Target) -> Mapping[str, bool]:
    """Compiler options that make it write prices."""
    if target.platform != CUDA:
        return {}
    tables = {} if has_table(target.text.partition(":")[0]) else _WITHOUT_TABLES
    return {**PRICED, **tables}


def one_device(name: str) -> Target:
    """A target of one device of this name.

    >>> one_device("v5p").text, one_device("h100").text
    ('v5p:1x1x1', 'h100:1x1')
    """
    return parse_target(f"{name}:" + "x".join("1" * TORUS_DIMENSIONS.get(name, 2)))


def _by_scope(
    lowered: Any, target: Target, count: int, cache_dir: Path | None
) -> list[float | None]:
    options = options_of(target)
    facts = compile_for(lowered, target, options=options, cache_dir=cache_dir)
    if not facts.ok:
        raise VerifyError(f"{target.text}: {facts.outcome}: {facts.message}")
    sums: list[float | None] = [None] * count
    for one in priced(facts.hlo, clock_of(target)):
        if number := _NUMBER.search(one.scope):
            place = int(number.group(1))
            sums[place] = (sums[place] or 0.0) + one.seconds
    return sums


def exchange_seconds(
    wanted: Sequence[Exchange],
    name: str,
    hosts: int,
    per_host: int,
    cache_dir: Path | None = DEFAULT_CACHE,
) -> list[float | None]:
    """Seconds of collectives on GPUs: among ``count`` of a host, or hosts.

    Where ``hosts`` is 1 the groups are GPUs of one host; else one GPU of each of
    ``count`` hosts, the GPUs of a host in groups beside one another.
    """
    target = parse_target(f"{name}:{hosts}x{per_host}")
    count = wanted[0].count
    assert all(one.count == count for one in wanted)
    apart = hosts * per_host // count
    shape = (apart, count) if hosts == 1 else (count, apart)
    names = ("apart", "group") if hosts == 1 else ("group", "apart")
    mesh = jax.sharding.AbstractMesh(shape, names)
    spec = jax.sharding.PartitionSpec(names)

    def run(arrays: Sequence[Any]) -> list[Any]:
        outs: list[Any] = []
        for number, (one, x) in enumerate(zip(wanted, arrays, strict=True)):
            if outs:
                x, outs[-1] = jax.lax.optimization_barrier((x, outs[-1]))
            with jax.named_scope(f"{SCOPE}{number}_"):
                outs.append(one.run(x, "group"))
        return outs

    sharded = jax.sharding.NamedSharding(mesh, spec)
    avals = [
        jax.ShapeDtypeStruct(
            (apart * count * one.elements,), "float32", sharding=sharded
        )
        for one in wanted
    ]
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False
    )
    traced = jax.jit(mapped).trace(avals)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    return _by_scope(lowered, target, len(wanted), cache_dir)
