"""The one door to anything JAX does not promise.

Everything private or version-dependent that Rhino touches in JAX is here, so one
file says what a new JAX release may break.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.extend as jex
import numpy as np
from jax._src import array, clusters, compiler, core
from jax._src import distributed as _distributed
from jax._src import source_info_util as _source
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention
from jax._src.interpreters import mlir
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax as lax_internal
from jax._src.lib import xla_client
from jax._src.state.discharge import discharge_state
from jax._src.state.types import RefEffect
from jaxlib.mlir import ir, passmanager

from rhino_jax.errors import TraceError

try:
    from jax._src.flattree import FlatTree
except ImportError:  # jax 0.10
    from jax._src.tree_util import FlatTree

CUDNN_VERSION = 91200
"""The cuDNN that a machine is taken to have that can not be asked."""

JaxprEqn = jex.core.JaxprEqn
ClosedJaxpr = jex.core.ClosedJaxpr
Jaxpr = jex.core.Jaxpr
Var = jex.core.Var
Literal = jex.core.Literal


def bind(eqn: Any, args: Sequence[Any], changed: dict[str, Any]) -> Any:
    """Bind the primitive of ``eqn`` to ``args``, with some parameters changed."""
    params = {**eqn.params, **changed}
    found = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
    return list(found) if isinstance(found, FlatTree) else found


@dataclass(frozen=True)
class _Form:
    """Stands where a primitive does, and runs a function of the user's."""

    name: str
    fun: Callable[..., Any]

    def get_bind_params(self, params: dict[str, Any]) -> dict[str, Any]:
        return params

    def bind(self, *args: Any, **params: Any) -> Any:
        return self.fun(*args)


def with_form(eqn: Any, fun: Callable[..., Any]) -> Any:
    """``eqn`` with ``fun``, a function of its operands, in place of its primitive."""
    return eqn.replace(primitive=_Form(eqn.primitive.name, fun))


@contextlib.contextmanager
def as_written(eqn: Any) -> Iterator[None]:
    """Give what is traced inside the source line and name stack of ``eqn``.

    An op that a rewrite has added has no equation: what surrounds it stands.
    """
    if eqn is None:
        yield
        return
    stack = _source.current_name_stack() + eqn.source_info.name_stack
    with (
        _source.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield


def source_line(eqn: Any) -> tuple[str, int]:
    """The user's file and line of ``eqn`` (("", 0) where none is known).

    Of the frames it was traced under the innermost that is neither Rhino's nor of a
    library for models and optimizers; where all are, the innermost.
    """
    frames = list(_source.user_frames(eqn.source_info.traceback))
    own = (frame for frame in frames if not _is_library(frame.file_name))
    frame = next(own, frames[0] if frames else None)
    return (frame.file_name, frame.start_line) if frame else ("", 0)


_HOME = f"{Path(__file__).parent}/"
_LIBRARIES = tuple(
    f"-packages/{name}/" for name in "flax optax equinox haiku chex einops".split()
)


@functools.cache
def _is_library(file: str) -> bool:
    """Whether ``file`` is not the user's. The demo's model is one like any other."""
    inside = file.startswith(_HOME) and not file.startswith(f"{_HOME}cli/")
    return inside or any(name in file for name in _LIBRARIES)


def name_stack(eqn: Any) -> str:
    """The name stack of ``eqn``: scopes, and the transformations around them."""
    return str(eqn.source_info.name_stack)


def local_avals(args: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes of traced or concrete arrays, weak types kept."""
    return tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
        for x in map(jax.typeof, args)
    )


def key_impl(dtype: Any) -> str:
    """The generator of a dtype of keys, as ``jax.random.wrap_key_data`` takes it.

    >>> key_impl(jax.random.key(0).dtype)
    'threefry2x32'
    """
    return str(dtype._impl.name)


def is_key(x: Any) -> bool:
    """Whether ``x``, an array or the shape of one, holds random keys."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def dtype_named(name: str) -> Any:
    """The dtype that ``str`` writes as ``name``, of keys too.

    >>> dtype_named("key<fry>") == jax.random.key(0).dtype
    True
    """
    if not name.startswith("key<"):
        return jax.numpy.dtype(name)
    return next(
        found for found in map(jax.random.key_dtype, _KEYS) if str(found) == name
    )


_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")


def close(jaxpr: Any, consts: Sequence[Any]) -> Any:
    """A closed jaxpr from an open one and its constants."""
    return ClosedJaxpr(jaxpr, list(consts))


def literal(value: Any, dtype: str, weak: bool) -> Any:
    """A literal scalar as JAX traces it, weak type kept."""
    array = np.asarray(value, np.dtype(dtype))
    return lax_internal._convert_element_type(array, array.dtype, weak_type=weak)


def as_fun(closed: Any) -> Any:
    """A closed jaxpr as a function of its inputs, to a list of its outputs."""
    return jex.core.jaxpr_as_fun(closed)


def gamma_samples(keys: Any, a: Any, log_space: bool) -> Any:
    """What ``jax.random.gamma`` draws, in primitives: ``a`` [*keys, *draw]."""
    from jax._src.random import core as random_core  # where it is in jax 0.10 and 0.11

    return random_core._gamma_impl(keys, a, log_space=log_space, use_vmap=True)


def without_references(closed: Any) -> Any:
    """``closed`` with the mutable references made inside it turned into values.

    One that works on references from outside comes back as it is.

    Raises:
        TraceError: JAX can not (seen in 0.10.2, of a reference made in a loop that was
            differentiated and is written in a loop inside it).
    """
    inside = any(isinstance(e, core.InternalMutableArrayEffect) for e in closed.effects)
    outside = any(isinstance(e, RefEffect) for e in closed.effects)
    if outside or not inside:
        return closed
    try:
        return discharge_state(closed)
    except ValueError as error:
        raise TraceError(
            "JAX can not turn the step's mutable references into values: "
            f"{str(error).splitlines()[0]} Make them outside of differentiated loops, "
            "or carry their values instead."
        ) from error


def as_weak(x: jax.Array) -> jax.Array:
    """``x`` with a weak type, as JAX gives what came of a Python number.

    >>> as_weak(jax.numpy.ones(3)).weak_type
    True
    """
    found: jax.Array = lax_internal._convert_element_type(x, x.dtype, weak_type=True)
    return found


def scan_counts(params: Any) -> tuple[int, int]:
    """How many constants and carried values a scan has (jax 0.11 packs them)."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of an open jaxpr, and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def without_constants(closed: Any) -> tuple[Any, list[Any]]:
    """An open jaxpr that takes a closed one's constants as leading inputs."""
    return pe.convert_constvars_jaxpr(closed.jaxpr), list(closed.consts)


def partitions(spec: Any) -> tuple[tuple[str, ...], ...]:
    """A PartitionSpec (or a tuple like one) as axis names per dimension.

    >>> partitions(jax.sharding.PartitionSpec("d", None, ("a", "b")))
    (('d',), (), ('a', 'b'))
    """
    entries = getattr(spec, "partitions", None)
    found: list[tuple[str, ...]] = []
    for entry in spec if entries is None else entries:
        if entry is None:
            found.append(())
        elif isinstance(entry, str):
            found.append((entry,))
        else:
            found.append(tuple(entry))
    return tuple(found)


def spec_of(sharding: Any) -> tuple[tuple[str, ...], ...] | None:
    """Axis names per dimension of a sharding; None where it does not name them all."""
    spec = getattr(sharding, "spec", None)
    if spec is None or jax.sharding.PartitionSpec.UNCONSTRAINED in tuple(spec):
        return None
    return partitions(spec)


# ---- compile-only (verify/) -------------------------------------------------------


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


# ---- random bits (lower/local/random.py) ------------------------------------------


def threefry_partitionable(eqn: Any) -> bool:
    """Whether ``eqn`` was traced with ``jax_threefry_partitionable`` on."""
    return bool(eqn.ctx.threefry_partitionable)


# ---- attention (trace/, lower/local/attention.py) -----------------------------------


def cudnn_runs() -> bool:
    """Whether this machine has cuDNN and a GPU to run it."""
    return jax.default_backend() == "gpu" and _cudnn_found()


def _cudnn_found() -> bool:
    try:
        return bool(cudnn_attention.check_cudnn_version())
    except RuntimeError:
        return False


def cudnn_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of attention as plain data, as cuDNN's primitives have them."""
    mask = cudnn_attention.MaskType[params["mask_type"]]
    own = {key: x for key, x in params.items() if key != "vendor"}
    return {**own, "mask_type": mask}


def cudnn_bind(kind: str, args: Sequence[Any], params: dict[str, Any]) -> Any:
    """One of cuDNN's attention primitives, by name."""
    known = (
        cudnn_attention._dot_product_attention_fwd_p_wrapper,
        cudnn_attention._dot_product_attention_bwd_p_wrapper,
    )
    (primitive,) = (p for p in known if p.name == kind)
    return primitive.bind(*args, **params)


@contextlib.contextmanager
def cudnn_traceable() -> Iterator[None]:
    """Let ``jax.nn.dot_product_attention(implementation="cudnn")`` be traced here.

    JAX asks for cuDNN's version when it traces, to tell which heads it can do; where
    there is none it can not plan for machines that have one. It is answered for as long
    as this lasts, in this thread and others, and only where nothing else would be.
    """
    if _cudnn_found():
        yield
        return
    asked = cudnn_attention.check_cudnn_version
    cudnn_attention.check_cudnn_version = lambda: CUDNN_VERSION
    try:
        yield
    finally:
        cudnn_attention.check_cudnn_version = asked


# ---- several processes (runtime/) -------------------------------------------------


def absent(
    shape: tuple[int, ...], dtype: Any, weak: bool, where: jax.sharding.Sharding
) -> jax.Array:
    """An array of which this process holds nothing: all of it is on other devices."""
    assert not where.addressable_devices, where
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.make_array_from_single_device_arrays(shape, where, [], dtype=dtype)
    aval = core.ShapedArray(shape, np.dtype(dtype), weak_type=weak)
    return array.ArrayImpl(aval, where, [], committed=True)


@dataclass(frozen=True)
class KeyValues:
    """The key-value store that the processes of ``jax.distributed`` share.

    It lives in process 0, and goes with it.
    """

    client: Any

    def set(self, key: str, value: bytes) -> None:
        self.client.key_value_set_bytes(key, value, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> bytes | None:
        """The value, waited for; None where it does not come in time."""
        try:
            found = self.client.blocking_key_value_get_bytes(key, int(seconds * 1000))
            return bytes(found)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def count(self, key: str) -> int:
        """How often this was asked for this key."""
        return int(self.client.key_value_increment(key, 1))

    def under(self, folder: str) -> dict[str, bytes]:
        """All that is kept under "folder/", by its whole key."""
        return dict(self.client.key_value_dir_get_bytes(folder))


def key_values() -> KeyValues | None:
    """The store of this run; None where ``jax.distributed`` is not started."""
    client = _distributed.global_state.client
    return None if client is None else KeyValues(client)


def process_id() -> int:
    """The rank given to ``jax.distributed``; no backend is started to know it."""
    return _distributed.global_state.process_id


def cluster_detected() -> str:
    """The launcher by which ``jax.distributed`` finds the other processes ("slurm",
    "ompi", "k8s", ...); "" where there is none."""
    for kind in clusters.ClusterEnv._cluster_types:
        if not kind.opt_in_only_method and kind.is_env_present():
            return kind.name or kind.__name__
    return ""
