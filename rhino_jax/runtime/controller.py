"""One process that drives all its workers: it hands out tasks and waits for none.

JAX dispatches asynchronously: a task is handed to its devices as soon as what it takes
has been, and runs when that is there. Arrays are let go by dropping them; their memory
is free when the last task that reads them has run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.lower.program import SignatureChanged
from rhino_jax.runtime.tasks import Run, Send, TaskGraph

Kind = tuple[tuple[int, ...], Any]


@dataclass
class Controller:
    """Carries out the tasks of a step, again and again.

    ``donated`` are positions of inputs that are gone after a call.
    """

    graph: TaskGraph
    stages: StagePrograms
    donated: Collection[int] = ()
    programs: dict[tuple[Any, bool], Any] = field(default_factory=dict)
    turns: dict[tuple[int, int], jax.Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = self.graph.slots
        for task in self.graph.tasks:
            if isinstance(task, Run) and (task.key, task.start) not in self.programs:
                chunk = self.stages.chunks.by_key[task.key]
                gone = {slots[s].version for s in task.donates if not slots[s].total}
                self.programs[task.key, task.start] = (
                    self.stages.start_program(chunk)
                    if task.start
                    else self.stages.chunk_program(chunk, gone)
                )
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
                self.stages.sharding(slots[s].version, self._stage(task.target))
                for s in task.gives
            ]
            for number, task in enumerate(self.graph.tasks)
            if isinstance(task, Send)
        }

    def _stage(self, worker: int) -> int:
        return self.stages.worker_of.index(worker)

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
        args = [
            held[s] if isinstance(s, int) else [held[one] for one in s]
            for s in task.takes
        ]
        if task.microbatch is not None and not task.start:
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


