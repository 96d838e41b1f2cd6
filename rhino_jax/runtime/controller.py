"""One process that drives its workers: it hands out their tasks and waits for none.

JAX dispatches asynchronously: a task is handed to its devices as soon as what it takes
has been, and runs when that is there. Arrays are let go by dropping them; their memory
is free when the last task that reads them has run.

Of several processes each runs the tasks of those workers that it has a device of, all
in the one order of the task graph; what goes from process to process is entered by both
at its place in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from rhino_jax import compat
from rhino_jax.ir.pipeline.chunks import Key
from rhino_jax.ir.pipeline.flow import Version
from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.lower.program import SignatureChanged
from rhino_jax.runtime.crossing import Crossing, Turns, devices_of, is_here
from rhino_jax.runtime.finding import first_fault
from rhino_jax.runtime.status import began, this_status
from rhino_jax.runtime.tasks import Run, Send, Task, TaskGraph

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
    graph: TaskGraph,
    stages: StagePrograms,
    avals: Sequence[Any],
    platform: str,
    workers: Collection[int],
) -> list[jax.stages.Lowered]:
    """Every program of ``workers`` lowered, in an order in which they can run.

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
    owner = stages.worker_of
    return [one for (key, _), one in done.items() if owner[key.stage] in workers]


def _arguments(task: Run, held: Any) -> list[Any]:
    return [
        held[s] if isinstance(s, int) else [held[one] for one in s] for s in task.takes
    ]


class Watch(Protocol):
    """What is told of a controller's steps while they are handed out."""

    def began(self) -> None:
        """A step begins."""

    def handed(self, task: Task, made: Sequence[Any]) -> None:
        """A task was handed out, and gives these arrays (None: on other processes)."""


@dataclass
class Controller:
    """Carries out the tasks of a step, again and again.

    ``donated`` are positions of inputs that are gone after a call. ``shared`` are the
    outputs that every worker gets, and how each lies on all of them. ``watch`` is told
    of every task; ``transfer`` lays arrays out anew within this process, as
    ``jax.device_put`` does, and ``enter`` one that comes from outside.
    """

    graph: TaskGraph
    stages: StagePrograms
    donated: Collection[int] = ()
    watch: Watch | None = None
    transfer: Callable[[Any, Any], Any] = jax.device_put
    enter: Callable[[Any, Any], jax.Array] = jax.device_put
    shared: Mapping[int, Any] = field(default_factory=dict)
    numbers: dict[tuple[int, int], jax.Array] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        slots, stages = self.graph.slots, self.stages
        self.programs = programs_of(self.graph, stages)
        self.homes = tuple(
            stages.sharding(version, stage)
            for version, stage in zip(stages.inputs, stages.chunks.homes, strict=True)
        )
        # Two outputs are two arrays: either may be given away.
        first = {slot: k for k, slot in reversed(list(enumerate(self.graph.outputs)))}
        self.repeated = [k != first[s] for k, s in enumerate(self.graph.outputs)]
        self.given_away = {self.graph.inputs[i] for i in self.donated}
        values = stages.program.values
        self.shapes = tuple(values[v].shape for v in stages.program.inputs)
        self.dtypes = tuple(values[v].dtype for v in stages.program.inputs)
        self.devices = [devices_of(where) for where in stages.meshes]
        platforms = {d.platform for devices in self.devices for d in devices}
        self.turns = Turns("cpu" in platforms)
        self.split = [len({d.process_index for d in ds}) > 1 for ds in self.devices]
        self.here = [any(map(is_here, devices)) for devices in self.devices]
        self.tasks = [
            (number, task)
            for number, task in enumerate(self.graph.tasks)
            if self.here[task.worker]
            or (isinstance(task, Send) and self.here[task.target])
        ]
        self.targets = {
            number: [
                stages.sharding(slots[s].version, stages.worker_of.index(task.target))
                for s in task.gives
            ]
            for number, task in self.tasks
            if isinstance(task, Send)
        }
        pairs = {(t.worker, t.target) for _, t in self.tasks if isinstance(t, Send)}
        self.crossings = {
            pair: Crossing(tuple(self.devices[worker] for worker in pair), self.turns)
            for pair in pairs
            if not all(is_here(d) for worker in pair for d in self.devices[worker])
        }
        self.shares = list(self._shares())

    def __call__(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """The step's flat results from its flat arguments, constants last.

        Raises:
            SignatureChanged: an argument is of another shape or dtype than planned.
        """
        self.calls += 1
        held: list[Any] = [None] * len(self.graph.slots)
        for position, (slot, x) in enumerate(
            zip(self.graph.inputs, leaves, strict=True)
        ):
            held[slot] = self._entered(position, x)
        if self.watch is not None:
            self.watch.began()
        for number, task in self.tasks:
            if isinstance(task, Run):
                self._run(task, held)
            elif isinstance(task, Send):
                self._send(number, task, held)
            else:
                for slot in task.takes:
                    if slot in self.given_away and not held[slot].is_deleted():
                        held[slot].delete()  # the caller holds it still
                    held[slot] = None
            if self.watch is not None:
                self.watch.handed(task, [held[s] for s in task.gives])
        outs = self._outputs(held)
        self._delete(leaves, outs)
        self.turns.end()
        return outs

    def _send(self, number: int, task: Send, held: list[Any]) -> None:
        # Never donated: JAX 0.10 ends the process over a donated array that goes to
        # other devices.
        sent = [held[s] for s in task.takes]
        crossing = self.crossings.get((task.worker, task.target))
        if crossing is None:
            arrived = self.transfer(sent, self.targets[number])
        else:
            self._tell(task)
            kinds = [self._kind(self.graph.slots[s].version) for s in task.takes]
            arrived = crossing.carried(sent, kinds, self.targets[number])
        for slot, x in zip(task.gives, arrived, strict=True):
            held[slot] = x

    def _kind(self, version: Version) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a version as it is handed over."""
        dtype = compat.dtype_named(self.stages.program.values[version[0]].dtype)
        return jax.ShapeDtypeStruct(self.stages.shape(version), dtype)

    def _outputs(self, held: Sequence[Any]) -> list[jax.Array]:
        """The step's results: those that are shared come from all workers."""
        slots, outputs = self.graph.slots, self.graph.outputs
        found: dict[int, jax.Array] = {}
        for crossing, some in self.shares:
            arrived = crossing.carried(
                [held[outputs[k]] for k in some],
                [self._kind(slots[outputs[k]].version) for k in some],
                [self.shared[k] for k in some],
            )
            found |= zip(some, arrived, strict=True)
        for k, slot in enumerate(outputs):
            if k not in found:
                x = held[slot] if self.here[slots[slot].worker] else self._absent(k)
                found[k] = x.copy() if self.repeated[k] else x
        return [found[k] for k in range(len(outputs))]

    def _shares(self) -> Iterator[tuple[Crossing, list[int]]]:
        """From each worker to all others, and the shared outputs that go so."""
        owner = [self.graph.slots[slot].worker for slot in self.graph.outputs]
        for worker in sorted({owner[k] for k in self.shared}):
            others = [d for w, d in enumerate(self.devices) if w != worker]
            rows = (self.devices[worker], *others)
            some = [k for k in self.shared if owner[k] == worker]
            yield Crossing(rows, self.turns, to_all=True), some

    def _absent(self, output: int) -> jax.Array:
        """A result that lies on devices of other processes."""
        slot = self.graph.slots[self.graph.outputs[output]]
        value = self.stages.program.values[slot.version[0]]
        stage = self.stages.worker_of.index(slot.worker)
        where = self.stages.sharding(slot.version, stage)
        dtype = compat.dtype_named(value.dtype)
        return compat.absent(value.shape, dtype, value.weak, where)

    def _tell(self, task: Task) -> None:
        """Leave word of what is handed out, in case this process ends over it."""
        if this_status() is not None:
            name = self.stages.program.name
            began(f"{name}, call {self.calls}: {task}")

    def _run(self, task: Run, held: list[Any]) -> None:
        self._tell(task)
        args = _arguments(task, held)
        if task.microbatch is not None:
            args.insert(0, self._number(task.microbatch, task.key.stage))
        for slot in task.donates:
            held[slot] = None
        try:
            program = self.programs[task.key, task.start]
            outs = (
                self.turns.enter(program, args)
                if self.split[task.worker]
                else program(*args)
            )
        except Exception as error:
            at = ""
            if isinstance(error, FloatingPointError) and not self.split[task.worker]:
                at = first_fault(self.stages, task, args)
            error.add_note(f"in {task} of {self.stages.program.name}{at}")
            raise
        for slot, x in zip(task.gives, outs, strict=True):
            held[slot] = x

    def _number(self, number: int, stage: int) -> jax.Array:
        """A microbatch's number on the devices of a stage."""
        worker = self.stages.worker_of[stage]
        if (number, worker) not in self.numbers:
            where = self.stages.placed(jax.sharding.PartitionSpec(), stage)
            self.numbers[number, worker] = self.enter(np.int32(number), where)
        return self.numbers[number, worker]

    def _entered(self, position: int, x: Any) -> jax.Array:
        """An argument on the devices where it lives."""
        home = self.homes[position]
        if not isinstance(x, jax.Array):
            # A copy: on a CPU device_put keeps the memory of a NumPy array, which the
            # caller may change before the step has run.
            x = np.array(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
        if x.shape != self.shapes[position] or str(x.dtype) != self.dtypes[position]:
            raise SignatureChanged
        if isinstance(x, jax.Array):
            if x.sharding == home:
                return x
            if x.sharding.is_equivalent_to(home, x.ndim):
                return x
            if position in self.donated:
                x = x.copy()  # device_put may keep the buffer, which will be given away
        return self.enter(x, home)

    def _delete(self, leaves: Sequence[Any], outs: Sequence[jax.Array]) -> None:
        """Donated arguments are gone, whether or not their memory could be used."""
        kept = {id(x) for x in outs}
        for position in self.donated:
            x = leaves[position]
            if isinstance(x, jax.Array) and id(x) not in kept and not x.is_deleted():
                x.delete()
