"""A plan together with the program it is for: it gives shardings, lowers, verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from rhino_jax.api.activations import activations
from rhino_jax.api.passing import Passing
from rhino_jax.api.verified import Verified
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.cluster.topology import Cluster, linked, part
from rhino_jax.cost.model import Prediction, predict
from rhino_jax.errors import MeshError, OptionsError
from rhino_jax.ir.layout import Layout
from rhino_jax.lower.devices import device_mesh
from rhino_jax.lower.program import SignatureChanged, as_function, jit_step
from rhino_jax.lower.program import shardings as named_shardings
from rhino_jax.plan import Plan, Predicted
from rhino_jax.report.text import explanation_text, plan_text
from rhino_jax.rules import rule_of
from rhino_jax.search.explain import explain
from rhino_jax.search.pins import position_of
from rhino_jax.search.planner import Request
from rhino_jax.search.prices import ClusterPrices
from rhino_jax.search.subject import Subject
from rhino_jax.trace import Traced
from rhino_jax.verify.audit import PlannedCollective
from rhino_jax.verify.compile_only import compile_lowered
from rhino_jax.verify.facts import CompiledFacts
from rhino_jax.verify.targets import parse_target
from rhino_jax.verify.witness import audited


@dataclass(frozen=True)
class Planned:
    """A :class:`~rhino_jax.plan.Plan` bound to the traced step it is for.

    ``jax_mesh`` lies over real devices, or is abstract for hardware that is not here.
    """

    plan: Plan
    traced: Traced
    jax_mesh: Any
    cluster: Cluster | None = None
    """What the search priced the plan for (of a pipeline, one worker's share); None
    for a plan that was not searched."""

    def __str__(self) -> str:
        inside = activations(self.traced.program, self.plan.assignment)
        return plan_text(self.plan, inside)

    @property
    def predicted(self) -> Predicted | None:
        """What the search predicted of one step; None for a recipe's plan."""
        return self.plan.predicted

    def explain(self, path: str) -> str:
        """Why the input at ``path`` lies as it does: what else it could have been.

        Every other layout with the seconds of the best plan that has it, as the search
        sees them (nothing overlapped).

        Raises:
            PinError: no input of that path (nearest names).
        """
        subject = subject_of(self.traced)
        position = position_of(path, subject.input_paths)
        cluster = self.cluster or part(
            parse_cluster(self.plan.cluster or f"cpu:{self.plan.num_devices}"),
            self.plan.num_workers,
        )
        predicted = self.plan.predicted
        mesh = linked(cluster, self.plan.mesh)
        request = Request(
            mesh,
            ClusterPrices(cluster),
            predicted.byte_seconds if predicted else 0.0,
        )
        chosen = self.plan.assignment.inputs[position]
        staged = {
            i: op.staged
            for i, op in enumerate(self.plan.assignment.ops)
            if op.staged is not None
        }
        found = explain(subject, request, position, chosen, staged)
        return explanation_text(found, mesh)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; :func:`rhino_jax.plan` takes it back."""
        self.plan.save(path)

    def timeline(self, path: str | Path) -> None:
        """Write when every worker of a pipeline runs what, as a trace for Perfetto.

        Raises:
            OptionsError: the plan has no pipeline stages.
        """
        raise OptionsError(
            f"{path}: a plan without pipeline stages runs as one program and has no "
            "timeline; ask for pipeline_stages="
        )

    def recording(self, path: str | Path) -> AbstractContextManager[None]:
        """While it lasts the step is recorded, to be written to ``path`` at its end.

        Raises:
            OptionsError: the plan has no pipeline stages, or nothing can be written.
        """
        raise OptionsError(
            f"{path}: {self.traced.program.name} runs as one program, planned without "
            "pipeline stages: there is no schedule to record. with "
            "jax.profiler.trace(folder): shows what each device does (block on the "
            "results inside); a pipeline is asked for by pipeline_stages="
        )

    def diff(self, other: Planned | Plan) -> tuple[str, ...]:
        """What ``other`` does otherwise, one line each."""
        return self.plan.diff(other.plan if isinstance(other, Planned) else other)

    def attached(self) -> Planned:
        """This plan on the devices that are here, if it is for described ones.

        Raises:
            MeshError: there are not as many devices here as the plan is for.
        """
        if not isinstance(self.jax_mesh, jax.sharding.AbstractMesh):
            return self
        mesh, found = self.plan.mesh, jax.devices()
        if self.plan.num_devices != len(found):
            raise MeshError(
                f"the plan is for {self.plan.num_devices} devices of "
                f"{self.plan.cluster or 'a cluster'}, mesh ({mesh}); this machine has "
                f"{len(found)} ({found[0].device_kind}). Drop cluster= (or the saved "
                "plan) to run here; rhino.plan(...) plans without devices"
            )
        return replace(self, jax_mesh=device_mesh(self.plan.whole_mesh))

    @cached_property
    def devices(self) -> frozenset[Any]:
        """The devices that it runs on."""
        if self.jax_mesh is None:
            return frozenset(jax.devices()[:1])
        return frozenset(self.jax_mesh.devices.flat)

    @cached_property
    def in_shardings(self) -> Any:
        """``(args, kwargs)`` with a sharding for every array."""
        count = self.traced.num_inputs
        flat = self.input_shardings[:count]
        return jax.tree.unflatten(self.traced.in_tree, flat)

    @cached_property
    def out_shardings(self) -> Any:
        """The step's result with a sharding for every array."""
        return jax.tree.unflatten(self.traced.out_tree, self.output_shardings)

    @cached_property
    def input_shardings(self) -> Sequence[Any]:
        """A sharding for every flat input, constants last."""
        return self.shardings(self.plan.assignment.inputs)

    @cached_property
    def output_shardings(self) -> Sequence[Any]:
        """A sharding for every flat output."""
        return self.shardings(self.plan.assignment.outputs)

    def create(self, init_fn: Callable[..., Any], given: Sequence[Any]) -> Any:
        """What ``init_fn`` returns, the step's first argument, where it is to lie."""
        if not self.plan.mesh.axes:
            return jax.jit(init_fn)(*given)
        return jax.jit(init_fn, out_shardings=self.in_shardings[0][0])(*given)

    @property
    def saved_shardings(self) -> Any:
        """How the state lies on its way to and from a checkpoint."""
        return self.in_shardings[0][0]

    def spread(self, state: Any) -> Any:
        """``state`` as :attr:`saved_shardings` say; on several processes all call."""
        return state

    def brought_back(self, state: Any) -> Any:
        """The inverse of :meth:`spread`."""
        return state

    def shardings(self, layouts: Sequence[Layout]) -> Sequence[Any]:
        """Layouts as JAX's shardings on this plan's devices."""
        if not self.plan.mesh.axes:
            one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            return [one] * len(layouts)
        return named_shardings(layouts, self.jax_mesh)

    @cached_property
    def jitted(self) -> Any:
        """The parallel step on flat arrays: the arguments' leaves, then constants."""
        return jit_step(
            self.traced.program,
            self.plan.assignment,
            self.plan.mesh,
            self.jax_mesh,
            self.traced.donated,
            self.plan.lowering,
        )

    def jit_call(self, passing: Passing) -> Any:
        """The parallel step as it is called: (donated, others, constants) -> result."""
        traced, plan = self.traced, self.plan
        flat = as_function(
            traced.program, plan.assignment, plan.mesh, self.jax_mesh, plan.lowering
        )
        count = traced.num_inputs
        numbers = jax.tree.unflatten(traced.in_tree, range(count))
        tree: Any
        order, tree = jax.tree.flatten(passing.call(*numbers))
        place = {i: k for k, i in enumerate(order)}

        def step(donated: Any, others: Any, constants: Any) -> Any:
            given, found = jax.tree.flatten((donated, others))
            if tree != found:
                raise SignatureChanged
            leaves = [given[place[i]] for i in range(count)]
            outs = flat(*leaves, *constants)
            return jax.tree.unflatten(traced.out_tree, outs)

        step.__name__ = traced.program.name
        if not plan.mesh.axes:
            return jax.jit(step, donate_argnums=0)
        constants = tuple(self.input_shardings[count:])
        return jax.jit(
            step,
            in_shardings=(*passing.call(*self.in_shardings), constants),
            out_shardings=self.out_shardings,
            donate_argnums=0,
        )

    def lower(self, platform: str = "") -> jax.stages.Lowered:
        """The lowered step.

        Args:
            platform: "cuda", "tpu" or "cpu"; "" is that of the plan's cluster, or of
                the attached devices.
        """
        program = self.traced.program
        values = [program.values[v] for v in program.inputs]
        real = [*self.traced.avals, *(jax.typeof(c) for c in self.traced.constants)]
        given = self.input_shardings
        with_shardings = bool(self.plan.mesh.axes)
        avals = [
            jax.ShapeDtypeStruct(
                v.shape,
                x.dtype,
                weak_type=v.weak,
                sharding=where if with_shardings else None,
            )
            for v, x, where in zip(values, real, given, strict=True)
        ]
        traced = self.jitted.trace(*avals)
        where = platform or self.platform
        return traced.lower(lowering_platforms=(where,) if where else None)

    def compile(self) -> Any:
        """The compiled step, on flat leaves."""
        return self.lower().compile()

    @property
    def platform(self) -> str:
        """The platform of the plan's cluster; "" for the attached devices."""
        named = self.plan.cluster
        return parse_cluster(named).device.platform if named else ""

    def compile_only(self, target: str = "", **options: Any) -> CompiledFacts:
        """What the real compiler for ``target`` makes of the step; no device needed.

        Args:
            target: "h100:2x8", "v5e:4x4", "cpu:8"; "" is the plan's cluster, or as
                many CPU devices as the mesh has.

        Raises:
            ClusterError, VerifyError: an unknown target, or no compiler for it here.
        """
        aim = self.target(target)
        platform = parse_target(aim).platform
        lowered = self.lower(platform)
        return compile_lowered(lowered, aim, self.plan.mesh.num_devices, **options)

    def planned_collectives(self) -> tuple[PlannedCollective, ...]:
        """The plan's collectives in the auditor's terms."""
        return tuple(
            PlannedCollective(
                c.kind, c.axes, c.wire_bytes, c.count, c.where, wire_dtype(c.dtype)
            )
            for c in self.plan.collectives
        )

    def prediction(self, target: str = "") -> Prediction:
        """What the prices say of this plan, recipes' too.

        Raises:
            ClusterError: an unknown ``target``.
        """
        cluster = self.cluster
        if cluster is None or target:
            cluster = parse_cluster(self.target(target))
        plan, traced = self.plan, self.traced
        donated = tuple(traced.donated)
        return predict(
            traced.program, plan.assignment, plan.mesh, cluster, rule_of, donated
        )

    def target(self, target: str = "") -> str:
        """What to compile for: asked for, the plan's cluster, or as many CPUs."""
        return target or self.plan.cluster or f"cpu:{self.plan.mesh.num_devices}"

    def verify(self, target: str = "", **options: Any) -> Verified:
        """What the real compiler makes of the step, beside what was predicted.

        Wire bytes by mesh axis, collectives that nobody planned, peak memory and what
        stands there, arithmetic, and the compiler's own time. A compiler that refuses,
        dies or runs out of time is told of in the result.

        Args:
            target: as :meth:`compile_only` takes it.
            options: ``timeout_seconds``, ``cache_dir`` (where facts are kept).

        Raises:
            ClusterError, VerifyError: an unknown target, or no compiler for it here
                (which extra to install).
        """
        aim = self.target(target)
        facts = self.compile_only(aim, priced=True, **options)
        prediction = self.prediction(target)
        one = self.plan.predicted
        return Verified(
            facts,
            prediction,
            audited(facts, self.planned_collectives(), self.plan.mesh.shape),
            one.limit_bytes if one and not target else prediction.device_bytes,
            str(self.plan.mesh),
            self.planned_collectives(),
            tuple(self.plan.mesh.shape.items()),
        )


def wire_dtype(dtype: str) -> str:
    """The dtype that goes over the wire: keys as words, booleans as bytes."""
    if dtype.startswith("key<"):
        return "uint32"
    return "uint8" if dtype == "bool" else dtype


def subject_of(traced: Traced) -> Subject:
    """What the search sees of a traced step."""
    return Subject(
        traced.program, traced.input_paths, traced.output_paths, traced.state_pairs
    )
