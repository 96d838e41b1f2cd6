"""One chunk as one jitted program on the devices of its stage.

What passes from chunk to chunk lies on the devices as it lies inside a manual program:
an array with one leading dimension per mesh axis holds every device's own part, so
partial, strided and ragged values cross the boundary, and the way to another stage, as
they are. What comes into the step or leaves it is an ordinary sharded array.

A chunk of the accumulation loop runs once for every microbatch: it is told the number
of its turn, and adds its terms to totals that are handed on from turn to turn (narrow
floating types in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.pipeline.chunks import Chunk, Chunks, Leaving
from rhino_jax.ir.pipeline.flow import (
    LAST,
    LEAVE,
    LOOP,
    OP,
    ROWS,
    TOTAL,
    Version,
    version_bytes,
)
from rhino_jax.ir.program import Program
from rhino_jax.ir.steps import Move
from rhino_jax.lower.accumulate import empty_total, gathered, operator_of
from rhino_jax.lower.manual import Frame, run_ops
from rhino_jax.lower.program import on_devices, partition_spec
from rhino_jax.lower.reshard import Here
from rhino_jax.lower.totals import COMBINE


@dataclass(frozen=True)
class StagePrograms:
    """The programs of all chunks of one step.

    ``mesh`` is that of one stage, ``meshes`` the same over the devices of each worker
    (a device where the mesh has no axes), ``worker_of`` the worker of every stage.
    """

    program: Program
    assignment: Assignment
    mesh: Mesh
    chunks: Chunks
    worker_of: tuple[int, ...]
    meshes: tuple[Any, ...]

    @cached_property
    def inputs(self) -> tuple[Version, ...]:
        """The step's inputs, each as it lies."""
        return tuple(zip(self.program.inputs, self.assignment.inputs, strict=True))

    @cached_property
    def ordinary(self) -> frozenset[Version]:
        """The versions that come in or go out of the step."""
        outputs = zip(self.program.outputs, self.assignment.outputs, strict=True)
        return frozenset([*self.inputs, *outputs])

    def move(self, leave: int) -> Move:
        """One of the moves behind the loop."""
        assert self.assignment.loop is not None
        return self.assignment.loop.leave[leave]

    def turns(self, chunk: Chunk) -> bool:
        """Whether ``chunk`` runs once for every microbatch."""
        return chunk.key.phase == LOOP and self.assignment.loop is not None

    # ---- how versions lie ---------------------------------------------------------

    @cached_property
    def raw(self) -> PartitionSpec:
        """One leading dimension for every mesh axis."""
        return PartitionSpec(*self.mesh.names)

    def spec(self, version: Version) -> PartitionSpec:
        """How a version is handed over, on the mesh of one stage."""
        if version in self.ordinary:
            return partition_spec(version[1])
        return self.raw

    def shape(self, version: Version) -> tuple[int, ...]:
        """The shape in which a version is handed over."""
        whole = self.program.values[version[0]].shape
        if version in self.ordinary:
            return whole
        places = (axis.size for axis in self.mesh.axes)
        return (*places, *version[1].local_shape(whole, self.wide))

    def sharding(self, version: Version, stage: int) -> Any:
        """How ``version`` lies on the devices of a stage."""
        return self.placed(self.spec(version), stage)

    def placed(self, spec: PartitionSpec, stage: int) -> Any:
        """``spec`` on the devices of a stage; None on a device that is not here."""
        where = self.meshes[self.worker_of[stage]]
        if not on_devices(self.mesh):
            return where and SingleDeviceSharding(where)
        return NamedSharding(where, spec)

    def num_bytes(self, version: Version) -> int:
        """Bytes of one device's part."""
        return version_bytes(self.program, version, self.wide)

    @cached_property
    def wide(self) -> Mesh:
        """The mesh with the time axis, where there is a loop."""
        return self.assignment.over(self.mesh)

    def _opened(self, version: Version, x: jax.Array) -> jax.Array:
        """A device's own part of what is handed in."""
        return x if version in self.ordinary else self._bare(x)

    def _closed(self, version: Version, x: jax.Array) -> jax.Array:
        return x if version in self.ordinary else self._framed(x)

    def _bare(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[len(self.mesh.names) :])

    def _framed(self, x: jax.Array) -> jax.Array:
        return x.reshape((1,) * len(self.mesh.names) + x.shape)

    # ---- programs -----------------------------------------------------------------

    def chunk_program(self, chunk: Chunk, donated: Collection[Version] = ()) -> Any:
        """``chunk`` as a jitted function.

        Arguments: the number of the turn (in the loop), its reads, then for each of
        ``leaves`` the total, a list of every turn's rows, or the last turn's value,
        then its own ``totals``. Results: what it gives, then its totals with the terms
        of this turn. Its own totals are donated, as are the reads ``donated``.
        """

        def body(*args: Any) -> tuple[jax.Array, ...]:
            frame, left, given = self._entered(chunk, args)
            totals = [self._bare(x) for x in given]
            for number in chunk.units:
                self._run(frame, number, left)
            outs = [self._closed(v, frame.get(*v)) for v in chunk.gives]
            for leave, total in zip(chunk.totals, totals, strict=True):
                outs.append(self._framed(self._added(frame, leave, total)))
            return tuple(outs)

        inside, given = self._arguments(chunk, donated)
        outside = (*map(self.spec, chunk.gives), *(self.raw for _ in chunk.totals))
        name = f"{self.chunks.side(chunk.key)}_{chunk.key.stage}"
        return self._jitted(body, name, chunk.key.stage, inside, outside, given)

    def finding_program(self, chunk: Chunk, faulty: Callable[[Any], Any]) -> Any:
        """``chunk`` as a jitted function that tells where its faults are.

        Arguments: as of :meth:`chunk_program`, its totals left out. Result: int32, for
        every op of the chunk, whether ``faulty`` is true of any element that it makes.
        """
        names = self.mesh.names

        def body(*args: Any) -> tuple[jax.Array, ...]:
            frame, left, _ = self._entered(chunk, args)
            found = []
            for number in chunk.units:
                self._run(frame, number, left)
                unit = self.chunks.flow.units[number]
                if unit.kind == OP:
                    made = [
                        x
                        for value in self.program.ops[unit.index].results
                        for x in frame.versions.get(value, {}).values()
                        if jnp.issubdtype(x.dtype, jnp.inexact)
                    ]
                    bad = [jnp.any(faulty(x)) for x in made]
                    found.append(jnp.any(jnp.stack([jnp.bool_(False), *bad])))
            told = jnp.stack(found).astype(jnp.int32)
            return (jax.lax.pmax(told, names) if names else told,)

        inside, _ = self._arguments(chunk, ())
        inside = inside[: len(inside) - len(chunk.totals)]
        name = f"find_{self.chunks.side(chunk.key)}_{chunk.key.stage}"
        outside = (PartitionSpec(),)
        return self._jitted(body, name, chunk.key.stage, inside, outside, ())

    def _entered(
        self, chunk: Chunk, args: Sequence[Any]
    ) -> tuple[Frame, Mapping[int, tuple[Leaving, Any]], list[Any]]:
        """A frame with what a chunk reads, what leaves the loop, and its totals."""
        given = list(args)
        turns = self.turns(chunk)
        mesh = Here(self.wide.axes, given.pop(0)) if turns else self.wide
        frame = Frame(self.program, mesh, {})
        for read in chunk.reads:
            frame.put(*read.version, self._opened(read.version, given.pop(0)))
        left = {one.index: (one, given.pop(0)) for one in chunk.leaves}
        return frame, left, given

    def _arguments(
        self, chunk: Chunk, donated: Collection[Version]
    ) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """The specs of a chunk's arguments, and which of them are donated."""
        trips = self.assignment.loop.trips if self.assignment.loop else 1
        found: list[tuple[Any, bool]] = []
        if self.turns(chunk):
            found.append((PartitionSpec(), False))
        for read in chunk.reads:
            found.append((self.spec(read.version), read.version in donated))
        for one in chunk.leaves:
            if one.how == TOTAL:
                found.append((self.raw, False))
            else:
                spec = self.spec(one.read.version)
                found.append(([spec] * trips if one.how == ROWS else spec, False))
        found += [(self.raw, True)] * len(chunk.totals)
        specs = tuple(spec for spec, _ in found)
        return specs, tuple(i for i, (_, gone) in enumerate(found) if gone)

    def start_program(self, chunk: Chunk) -> Any:
        """The totals of a loop's chunk before the first microbatch."""

        def body() -> tuple[jax.Array, ...]:
            empty = (
                empty_total(self.program, self.move(k), self.wide) for k in chunk.totals
            )
            return tuple(map(self._framed, empty))

        outside = (self.raw,) * len(chunk.totals)
        name = f"start_{self.chunks.side(chunk.key)}_{chunk.key.stage}"
        return self._jitted(body, name, chunk.key.stage, (), outside, ())

    def _jitted(
        self,
        body: Callable[..., Any],
        name: str,
        stage: int,
        inside: tuple[Any, ...],
        outside: tuple[Any, ...],
        donated: Sequence[int],
    ) -> Any:
        inner = body
        if on_devices(self.mesh):
            inner = jax.shard_map(
                body,
                mesh=self.meshes[self.worker_of[stage]],
                in_specs=inside,
                out_specs=outside,
                check_vma=False,
            )

        def run(*args: Any) -> Any:
            return inner(*args)

        run.__name__ = f"{self.program.name}_{name}"
        return jax.jit(
            run,
            in_shardings=self._all_placed(inside, stage),
            out_shardings=self._all_placed(outside, stage),
            donate_argnums=tuple(donated),
        )

    def _all_placed(self, specs: Any, stage: int) -> Any:
        return jax.tree.map(
            lambda spec: self.placed(spec, stage),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def _run(
        self, frame: Frame, number: int, left: Mapping[int, tuple[Leaving, Any]]
    ) -> None:
        unit = self.chunks.flow.units[number]
        if unit.kind == OP:
            run_ops(frame, self.assignment, (unit.index,))
        elif unit.kind != LEAVE:
            frame.move(self.assignment.final[unit.index])
        elif not unit.how:
            frame.move(self.move(unit.index))
        else:
            move = self.move(unit.index)
            frame.put(move.value, move.target, self._left(move, *left[unit.index]))

    def _left(self, move: Move, leaving: Leaving, found: Any) -> jax.Array:
        """What has left the loop, out of time."""
        version = leaving.read.version
        if leaving.how == TOTAL:
            return self._bare(found).astype(self.program.values[move.value].dtype)
        if leaving.how == LAST:
            return self._opened(version, found)
        stack = jnp.stack([self._opened(version, x) for x in found])
        return gathered(self.program, move, stack, self.wide)

    def _added(self, frame: Frame, leave: int, total: jax.Array) -> jax.Array:
        move = self.move(leave)
        term = frame.get(move.value, move.source)
        return COMBINE[operator_of(move)](total, term.astype(total.dtype))
