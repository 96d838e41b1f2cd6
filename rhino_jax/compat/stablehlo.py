"""StableHLO modules, and compilers that are given them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jaxlib.mlir import ir, passmanager

StableHloError = ir.MLIRError
"""What ``parse_stablehlo`` raises."""


def module_bytes(lowered: Any) -> bytes:
    """A lowered program as StableHLO bytecode, source locations kept."""
    module = lowered.compiler_ir("stablehlo")
    return bytes(mlir.module_to_bytecode(module))


def parse_stablehlo(module: bytes) -> Any:
    """An MLIR module from StableHLO bytecode or text.

    Raises:
        StableHloError: it does not parse.
    """
    context = mlir.make_ir_context()
    with context:
        return ir.Module.parse(module)


def run_passes(module: Any, pipeline: str) -> None:
    """Run a pipeline of MLIR passes over a module, in place."""
    passmanager.PassManager.parse(pipeline).run(module.operation)


def without_locations(module: Any) -> str:
    """The text of an MLIR module with no source locations in it."""
    text = module.operation.get_asm(enable_debug_info=False)
    return str(text)


def described_devices(
    platform: str, topology: str, config: str, host_bounds: Sequence[int]
) -> list[Any]:
    """Compile-only devices of a described topology; for "cpu" the local ones."""
    if platform == "cpu":
        return list(jax.devices("cpu"))
    from jax.experimental import topologies  # only children of verify/ need it

    if platform == "tpu":
        bounds = {"chips_per_host_bounds": tuple(host_bounds)} if host_bounds else {}
        found = topologies.get_topology_desc(topology, "tpu", **bounds)
    else:
        found = topologies.get_topology_desc(
            "", platform, target_config=config, topology=topology
        )
    return list(found.devices)


def compile_stablehlo(
    module: Any, devices: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Compile an MLIR module for devices in this order, as ``jax.jit`` would.

    Arguments and results without a sharding of their own may get one from the
    partitioner, as there. Aliases (donated arguments) are in the module.
    """
    order = np.empty((1, len(devices)), object)
    order[0, :] = devices
    chosen = compiler.get_compile_options(1, len(devices), order, dict(options))
    chosen.executable_build_options.allow_spmd_sharding_propagation_to_parameters = (
        _unsharded(module, "arg_attrs")
    )
    chosen.executable_build_options.allow_spmd_sharding_propagation_to_output = (
        _unsharded(module, "res_attrs")
    )
    return compiler.backend_compile_and_load(
        devices[0].client, module, xla_client.DeviceList(tuple(devices)), chosen, []
    )


def _unsharded(module: Any, attributes: str) -> list[bool]:
    """For each argument or result of main, whether it comes without a sharding."""
    main: Any = ir.SymbolTable(module.operation)["main"]
    kind = main.type
    count = len(kind.inputs if attributes == "arg_attrs" else kind.results)
    if attributes not in main.attributes:
        return [True] * count
    found: list[Any] = [ir.DictAttr(one) for one in main.attributes[attributes]]
    return [all(not _is_whole_sharding(entry) for entry in each) for each in found]


def _is_whole_sharding(entry: Any) -> bool:
    """Whether an attribute is a sharding that leaves no dimension open ("?")."""
    named = entry.name in ("sdy.sharding", "mhlo.sharding")
    return named and "?" not in str(entry.attr)


def partition_count(module: Any) -> int:
    """For how many devices a StableHLO module is written (1 where it does not say)."""
    attributes = module.operation.attributes
    if "mhlo.num_partitions" not in attributes:
        return 1
    return int(ir.IntegerAttr(attributes["mhlo.num_partitions"]).value)
