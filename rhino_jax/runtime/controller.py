"""One process that drives all its workers: it hands out tasks and waits for none.

JAX dispatches asynchronously: a task is handed to its devices as soon as what it takes
has been, and runs when that is there. Arrays are let go by dropping them; their memory
is free when the last task that reads them has run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rhino_jax.ir.pipeline.chunks import Key
from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.lower.program import SignatureChanged
from rhino_jax.runtime.tasks import Run, Send, TaskGraph

Programs = Mapping[tuple[Key, bool], Any]
"""Chunk, and whether it is the start of its totals -> the jitted program."""


def programs_of(graph: TaskGraph, stages: StagePrograms) -> Programs:
    """The programs that the tasks of ``graph`` run."""
    found: dict[tuple[Key, bool], Any] = {}
    for task in graph.tasks:
        if isinstance(task, Run) and (task.key, task.start) not in found:
            chunk, slots = stages.chunks.by_key[task.key], graph.slots
            gone = {slots[s].version for s in task.donates if not slots[s].total}
            found[task.key, task.start] = (
                stages.start_program(chunk)
                if task.start
                else stages.chunk_program(chunk, gone)
            )
    return found


def lowered(
    graph: TaskGraph, stages: StagePrograms, avals: Sequence[Any], platform: str
) -> list[jax.stages.Lowered]:
    """Every program lowered, in an order in which they can run.

    Args:
        avals: of the step's inputs.
        platform: "cuda", "tpu" or "cpu"; "" is that of the attached devices.
    """
    held: dict[int, Any] = {}

    def put(slot: int, aval: Any, worker: int) -> None:
        stage = stages.worker_of.index(worker)
        where = stages.sharding(graph.slots[slot].version, stage)
        held[slot] = jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=where)

    for slot, aval in zip(graph.inputs, avals, strict=True):
        put(slot, aval, graph.slots[slot].worker)
    programs, done = programs_of(graph, stages), {}
    for task in graph.tasks:
        if isinstance(task, Send):
            for taken, given in zip(task.takes, task.gives, strict=True):
                put(given, held[taken], task.target)
        elif isinstance(task, Run):
            args = _arguments(task, held)
            if task.microbatch is not None:
                where = stages.placed(jax.sharding.PartitionSpec(), task.key.stage)
                args.insert(0, jax.ShapeDtypeStruct((), np.int32, sharding=where))
            name = (task.key, task.start)
            if name not in done:
                traced = programs[name].trace(*args)
                on = (platform,) if platform else None
                done[name] = traced.lower(lowering_platforms=on)
            for slot, out in zip(task.gives, done[name].out_info, strict=True):
                put(slot, out, task.worker)
    return list(done.values())


def _arguments(task: Run, held: Any) -> list[Any]:
    return [
        held[s] if isinstance(s, int) else [held[one] for one in s] for s in task.takes
    ]


@dataclass
class Controller:
    """Carries out the tasks of a step, again and again.

    ``donated`` are positions of inputs that are gone after a call.
    """

    graph: TaskGraph
    stages: StagePrograms
    donated: Collection[int] = ()
    turns: dict[tuple[int, int], jax.Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = self.graph.slots
        self.programs = programs_of(self.graph, self.stages)
        program, layouts = self.stages.program, self.stages.assignment.inputs
        self.homes = tuple(
            self.stages.sharding((value, layout), stage)
            for value, layout, stage in zip(
                program.inputs, layouts, self.stages.chunks.homes, strict=True
            )
        )
        self.shapes = tuple(program.values[v].shape for v in program.inputs)
        self.dtypes = tuple(program.values[v].dtype for v in program.inputs)
        self.targets = {
            number: [
                self.stages.sharding(
                    slots[s].version, self.stages.worker_of.index(task.target)
                )
                for s in task.gives
            ]
            for number, task in enumerate(self.graph.tasks)
            if isinstance(task, Send)
        }

    def __call__(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """The step's flat results from its flat arguments, constants last.

        Raises:
            SignatureChanged: an argument is of another shape or dtype than planned.
        """
        held: list[Any] = [None] * len(self.graph.slots)
        for position, (slot, x) in enumerate(
            zip(self.graph.inputs, leaves, strict=True)
        ):
            held[slot] = self._entered(position, x)
        for number, task in enumerate(self.graph.tasks):
            if isinstance(task, Run):
                self._run(task, held)
            elif isinstance(task, Send):
                sent = [held[s] for s in task.takes]
                arrived = jax.device_put(sent, self.targets[number])
                for slot, x in zip(task.gives, arrived, strict=True):
                    held[slot] = x
            else:
                for slot in task.takes:
                    held[slot] = None
        outs = [held[slot] for slot in self.graph.outputs]
        self._delete(leaves, outs)
        return outs

    def _run(self, task: Run, held: list[Any]) -> None:
        args = _arguments(task, held)
        if task.microbatch is not None:
            args.insert(0, self._turn(task.microbatch, task.key.stage))
        for slot in task.donates:
            held[slot] = None
        try:
            outs = self.programs[task.key, task.start](*args)
        except Exception as error:
            error.add_note(f"in {task} of {self.stages.program.name}")
            raise
        for slot, x in zip(task.gives, outs, strict=True):
            held[slot] = x

    def _turn(self, number: int, stage: int) -> jax.Array:
        """A microbatch's number on the devices of a stage."""
        worker = self.stages.worker_of[stage]
        if (number, worker) not in self.turns:
            where = self.stages.placed(jax.sharding.PartitionSpec(), stage)
            self.turns[number, worker] = jax.device_put(np.int32(number), where)
        return self.turns[number, worker]

    def _entered(self, position: int, x: Any) -> jax.Array:
        """An argument on the devices where it lives."""
        home = self.homes[position]
        if not isinstance(x, jax.Array):
            x = np.asarray(x, self._dtype(position, x))
        if x.shape != self.shapes[position] or str(x.dtype) != self.dtypes[position]:
            raise SignatureChanged
        if isinstance(x, jax.Array):
            if x.sharding == home:
                return x
            if x.sharding.is_equivalent_to(home, x.ndim):
                return x
            if position in self.donated:
                x = x.copy()  # device_put may keep the buffer, which will be given away
        return jax.device_put(x, home)

    def _dtype(self, position: int, x: Any) -> Any:
        """As JAX would take it: 64 bits are 32 where they are off."""
        return jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)

    def _delete(self, leaves: Sequence[Any], outs: Sequence[jax.Array]) -> None:
        """Donated arguments are gone, whether or not their memory could be used."""
        kept = {id(x) for x in outs}
        for position in self.donated:
            x = leaves[position]
            if isinstance(x, jax.Array) and id(x) not in kept and not x.is_deleted():
                x.delete()
