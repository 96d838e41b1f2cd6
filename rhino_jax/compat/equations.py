"""Equations and jaxprs: what they hold, how they are bound, rewritten, told apart."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.extend as jex
import numpy as np
from jax._src import core
from jax._src import source_info_util as _source
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax as lax_internal
from jax._src.state.discharge import discharge_state
from jax._src.state.types import RefEffect

from rhino_jax.errors import TraceError

try:
    from jax._src.flattree import FlatTree
except ImportError:  # jax 0.10
    from jax._src.tree_util import FlatTree


JaxprEqn = jex.core.JaxprEqn
ClosedJaxpr = jex.core.ClosedJaxpr
Jaxpr = jex.core.Jaxpr
Var = jex.core.Var
Literal = jex.core.Literal


_PLACES = ("sharding", "out_sharding")
"""Parameters by which an equation says where its result lies. JAX fills them in behind
a ``shard_map``, with a mesh; inside the plan's manual program there is another."""


def bind(eqn: Any, args: Sequence[Any], changed: dict[str, Any]) -> Any:
    """Bind the primitive of ``eqn`` to ``args``, with some parameters changed.

    Where the result lies is left open: the plan says that.
    """
    nowhere = {name: None for name in _PLACES if name in eqn.params}
    params = {**eqn.params, **nowhere, **changed}
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

    An op that a rewrite has added has no equation: what surrounds it stands. So does
    the mesh around, where ``eqn`` was written under another (in a ``shard_map``).
    """
    if eqn is None:
        yield
        return
    stack = _source.current_name_stack() + eqn.source_info.name_stack
    around = jax.sharding.get_abstract_mesh()
    with (
        _source.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
        contextlib.nullcontext()
        if eqn.ctx.cur_abstract_mesh.empty
        else jax.sharding.use_abstract_mesh(around),
    ):
        yield


def under_mesh(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """Trace under ``mesh`` (or None), whatever ``jax.set_mesh`` the caller is under."""
    if mesh is None or jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    found = getattr(mesh, "abstract_mesh", mesh)
    return jax.sharding.use_abstract_mesh(found)


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


def spec_of(sharding: Any, left_open: str) -> tuple[tuple[str, ...], ...] | None:
    """Axis names per dimension of a sharding; None where it has none.

    ``left_open`` stands for a dimension of which nothing is said.
    """
    spec = getattr(sharding, "spec", None)
    if spec is None:
        return None
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    return partitions(tuple(left_open if x is free else x for x in spec))


def axes_of(sharding: Any) -> tuple[tuple[str, int], ...]:
    """The axes of a sharding's mesh, with their sizes; none where it has no mesh."""
    mesh = getattr(sharding, "mesh", None)
    return () if mesh is None else tuple(mesh.shape.items())


# ---- compile-only (verify/) -------------------------------------------------------


def threefry_partitionable(eqn: Any) -> bool:
    """Whether ``eqn`` was traced with ``jax_threefry_partitionable`` on."""
    return bool(eqn.ctx.threefry_partitionable)
