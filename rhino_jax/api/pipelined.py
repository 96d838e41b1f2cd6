"""A plan with pipeline stages: every stage on the devices of its worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rhino_jax import compat
from rhino_jax.api.across import laid, ranks_of
from rhino_jax.api.activations import activations
from rhino_jax.api.attached import attached_cluster
from rhino_jax.api.cache import folder_of
from rhino_jax.api.passing import Passing
from rhino_jax.api.planned import Planned, subject_of
from rhino_jax.api.simulated import simulated
from rhino_jax.api.spreading import Spreading
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.errors import CheckpointError, OptionsError, VerifyError
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.pipeline.chunks import Chunks
from rhino_jax.ir.spans import numbers
from rhino_jax.lower.pipeline.program import StagePrograms
from rhino_jax.lower.program import SignatureChanged
from rhino_jax.options import Options
from rhino_jax.plan import Stages
from rhino_jax.report.stages import StageRow, stage_rows, stage_table
from rhino_jax.report.text import plan_text
from rhino_jax.report.timeline import write_timeline
from rhino_jax.runtime.build import task_graph
from rhino_jax.runtime.controller import Controller, lowered
from rhino_jax.runtime.crossing import devices_of, is_here
from rhino_jax.runtime.recording import Recorder, timed, timeline_of
from rhino_jax.runtime.tasks import TaskGraph
from rhino_jax.schedule import Schedule, make_schedule
from rhino_jax.search.staging import SPLIT, Divided
from rhino_jax.verify.facts import CompiledFacts


def schedule_of(stages: Stages, microbatches: int) -> Schedule:
    """The schedule that ``stages`` names."""
    return make_schedule(
        stages.schedule, stages.num_workers, microbatches, stages.per_worker
    )


def chunks_of(divided: Divided, assignment: Any, stages: Stages) -> Chunks:
    """``assignment`` cut as ``stages`` says."""
    held = [numbers(text) for text in stages.segments]
    return divided.chunks(assignment, held, stages.schedule == SPLIT)


def graph_of(
    divided: Divided,
    programs: StagePrograms,
    schedule: Schedule,
    donated: Sequence[int],
) -> TaskGraph:
    """The tasks of one step."""
    pairs, loop = divided.subject.pairs, programs.assignment.loop
    return task_graph(
        programs.chunks,
        schedule,
        programs.inputs,
        loop.trips if loop else None,
        programs.num_bytes,
        {i: pairs[i] for i in donated if i in pairs},
    )


class PipelinePlanned(Planned):
    """A :class:`Planned` whose plan has pipeline stages.

    ``jax_mesh`` has a leading axis "stage" over the workers.
    """

    def __str__(self) -> str:
        inside = activations(self.traced.program, self.plan.assignment)
        rows = list(stage_table(self.stage_rows))
        return plan_text(self.plan, inside, rows)

    @property
    def stages(self) -> Stages:
        assert self.plan.stages is not None
        return self.plan.stages

    @cached_property
    def divided(self) -> Divided:
        return Divided(subject_of(self.traced))

    @cached_property
    def schedule(self) -> Schedule:
        """In what order every worker runs its stages' microbatches."""
        return schedule_of(self.stages, self.plan.microbatches)

    @cached_property
    def programs(self) -> StagePrograms:
        """The programs of the stages."""
        return StagePrograms(
            self.traced.program,
            self.plan.assignment,
            self.plan.mesh,
            chunks_of(self.divided, self.plan.assignment, self.stages),
            self.schedule.worker_of,
            worker_meshes(self.jax_mesh),
        )

    @cached_property
    def graph(self) -> TaskGraph:
        """The tasks of one step."""
        return graph_of(self.divided, self.programs, self.schedule, self.traced.donated)

    def timeline(self, path: str | Path) -> None:
        """Write the schedule on the predicted clock, as a trace that Perfetto shows.

        When every worker runs which half of which stage for which microbatch, and what
        it sends; what is done before and behind the loop is not in it.
        """
        described = self.plan.cluster
        devices = [] if described else list(self.jax_mesh.devices.flat)
        cluster = (
            parse_cluster(described)
            if described
            else attached_cluster(devices, folder_of(Options()))
        )
        run, _ = simulated(self.programs, self.schedule, cluster)
        write_timeline(run, path)

    @contextmanager
    def recording(self, path: str | Path) -> Iterator[None]:
        """See :meth:`Planned.recording`. On several processes each writes its own file,
        trace.0.json and so on."""
        path = Path(path)
        if len(ranks_of(self.devices)) > 1:
            path = path.with_suffix(f".{jax.process_index()}{path.suffix}")
        try:
            path.open("a").close()  # before the step: it gives the old state away
        except OSError as error:
            raise OptionsError(f"the trace can not be written: {error}") from error
        recorder = Recorder(self.graph, self.controller.here)
        self.controller.watch = recorder
        try:
            yield
        finally:
            self.controller.watch = None
            recorder.close()
        # The step is done; its results are not to be lost over this.
        problem: object = "the step was planned again on its way; trace the next one"
        if recorder.complete:
            took = timed(recorder.seen())
            timeline = timeline_of(took, self.schedule, self.programs.chunks)
            try:
                return write_timeline(timeline, path)
            except OSError as error:
                problem = error
        warnings.warn(f"{path}: nothing is recorded: {problem}", stacklevel=4)

    @cached_property
    def stage_rows(self) -> tuple[StageRow, ...]:
        """What every stage holds, and what it sends to others."""
        programs = self.programs
        return stage_rows(
            self.stages,
            programs.chunks,
            programs.inputs,
            programs.num_bytes,
            programs.assignment.loop is not None,
        )

    def shardings(self, layouts: Sequence[Layout]) -> Sequence[Any]:
        raise AssertionError("layouts alone do not say on which stage")

    # ---- shardings ----------------------------------------------------------------

    @cached_property
    def input_shardings(self) -> Sequence[Any]:
        programs = self.programs
        return [
            programs.sharding(version, stage)
            for version, stage in zip(
                programs.inputs, programs.chunks.homes, strict=True
            )
        ]

    @cached_property
    def output_shardings(self) -> Sequence[Any]:
        programs = self.programs
        homes = dict(zip(programs.inputs, programs.chunks.homes, strict=True))
        return [
            self.shared.get(k)
            or programs.sharding(
                read.version,
                read.source.stage if read.source else homes[read.version],
            )
            for k, read in enumerate(programs.chunks.outputs)
        ]

    @cached_property
    def shared(self) -> Mapping[int, Any]:
        """The outputs that lie on all workers: on several processes what is no state,
        so that each has its metrics."""
        if self.spreading is None:
            return {}
        state = {output for _, output in self.traced.state_pairs}
        return {
            k: NamedSharding(self.jax_mesh, self.programs.spec(read.version))
            for k, read in enumerate(self.programs.chunks.outputs)
            if k not in state
        }

    # ---- checkpoints --------------------------------------------------------------

    @cached_property
    def spreading(self) -> Spreading | None:
        """How stages spread over several processes; None where there is only one."""
        if isinstance(self.jax_mesh, AbstractMesh) or len(ranks_of(self.devices)) == 1:
            return None
        return Spreading(self.jax_mesh)

    @property
    def saved_shardings(self) -> Any:
        """See :attr:`Planned.saved_shardings`."""
        homes, tree = jax.tree.flatten(self.in_shardings[0][0])
        if self.spreading is None:
            return self.in_shardings[0][0]
        pairs = zip(self.traced.avals, homes, strict=False)
        wide = [self.spreading.sharding(aval.shape, home) for aval, home in pairs]
        return jax.tree.unflatten(tree, wide)

    def spread(self, state: Any) -> Any:
        """See :meth:`Planned.spread`.

        Raises:
            CheckpointError: it is not the planned state where the plan has it.
        """
        spreading, homes = self.spreading, self.in_shardings[0][0]
        if spreading is None:
            return state
        structure: Any = jax.tree.structure(homes)
        if jax.tree.structure(state) != structure or any(
            not isinstance(x, jax.Array) or x.sharding != home
            for x, home in zip(*map(jax.tree.leaves, (state, homes)), strict=True)
        ):
            raise CheckpointError(
                f"a pipeline on several processes saves the state of "
                f"{self.traced.program.name} as it returns it; place(state) first"
            )
        return jax.tree.map(spreading.spread, state, homes)

    def brought_back(self, state: Any) -> Any:
        """See :meth:`Planned.brought_back`."""
        if self.spreading is None:
            return state
        return jax.tree.map(self.spreading.back, state, self.in_shardings[0][0])

    # ---- creating -----------------------------------------------------------------

    def create(self, init_fn: Callable[..., Any], given: Sequence[Any]) -> Any:
        """What ``init_fn`` returns, the part of every worker made on its devices."""
        shapes = jax.eval_shape(init_fn, *given)
        tree: Any = jax.tree.structure(shapes)
        where = jax.tree.leaves(self.in_shardings[0][0])
        workers: dict[Any, list[int]] = {}
        for i, one in enumerate(where):
            devices = tuple(sorted(d.id for d in one.device_set))
            workers.setdefault(devices, []).append(i)
        avals = jax.tree.leaves(shapes)
        leaves: list[Any] = [None] * len(where)
        for mine in workers.values():
            home = where[mine[0]]
            if not home.addressable_devices:
                for i in mine:
                    x = avals[i]
                    leaves[i] = compat.absent(x.shape, x.dtype, x.weak_type, where[i])
                continue

            def part(*args: Any, mine: Sequence[int] = tuple(mine)) -> list[Any]:
                made = jax.tree.leaves(init_fn(*args))
                return [made[i] for i in mine]

            everywhere = (
                NamedSharding(home.mesh, PartitionSpec())
                if isinstance(home, NamedSharding)
                else home
            )
            args = jax.tree.map(lambda x, to=everywhere: laid(x, to), tuple(given))
            made = jax.jit(part, out_shardings=[where[i] for i in mine])(*args)
            if not home.is_fully_addressable:
                jax.block_until_ready(made)  # one program over processes at a time
            for i, x in zip(mine, made, strict=True):
                leaves[i] = x
        return jax.tree.unflatten(tree, leaves)

    # ---- lowering -----------------------------------------------------------------

    @cached_property
    def controller(self) -> Controller:
        """What carries the step out."""
        donated = self.traced.donated
        return Controller(
            self.graph, self.programs, donated, enter=laid, shared=self.shared
        )

    def jit_call(self, passing: Passing) -> Any:
        traced = self.traced
        count = traced.num_inputs
        args = jax.tree.unflatten(traced.in_tree, range(count))
        tree: Any
        order, tree = jax.tree.flatten(passing.call(*args))
        place = {i: k for k, i in enumerate(order)}
        controller = self.controller

        def step(donated: Any, others: Any, constants: Any) -> Any:
            given, found = jax.tree.flatten((donated, others))
            if tree != found:
                raise SignatureChanged
            leaves = [given[place[i]] for i in range(count)]
            outs = controller((*leaves, *constants))
            return jax.tree.unflatten(traced.out_tree, outs)

        step.__name__ = traced.program.name
        return step

    def lower(self, platform: str = "") -> Any:
        """The lowered programs of all stages, in an order in which they can run.

        Args:
            platform: as :meth:`Planned.lower`'s.
        """
        return self._lowered(range(self.stages.num_workers), platform)

    def compile(self) -> Any:
        """The compiled programs of all stages that this process has a device of."""
        here = [
            worker
            for worker, mesh in enumerate(self.programs.meshes)
            if any(map(is_here, devices_of(mesh)))
        ]
        return [one.compile() for one in self._lowered(here)]

    def _lowered(self, workers: Collection[int], platform: str = "") -> Any:
        real = [*self.traced.avals, *(jax.typeof(c) for c in self.traced.constants)]
        platform = platform or self.platform
        return lowered(self.graph, self.programs, real, platform, workers)

    def compile_only(self, target: str = "", **options: Any) -> CompiledFacts:
        raise VerifyError(
            f"{self.traced.program.name} is a pipeline of {self.stages}: it is many "
            "programs. planned.lower() gives each, to compile alone; to verify the "
            "plan of one stage's mesh, plan without pipeline_stages"
        )


def worker_meshes(jax_mesh: Any) -> tuple[Any, ...]:
    """The mesh of every worker, or its one device, of a mesh with a leading axis.

    None stands for a device that is only described.
    """
    names = jax_mesh.axis_names[1:]
    if isinstance(jax_mesh, AbstractMesh):
        sizes = jax_mesh.axis_sizes
        inner = (
            AbstractMesh(sizes[1:], names, axis_types=jax_mesh.axis_types[1:])
            if names
            else None
        )
        return (inner,) * sizes[0]
    return tuple(
        jax.sharding.Mesh(devices, names, axis_types=jax_mesh.axis_types[1:])
        if names
        else devices
        for devices in jax_mesh.devices
    )
