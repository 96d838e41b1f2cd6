"""A plan together with the program it is for: it gives shardings, lowers, verifies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.api.activations import activations
from rhino_jax.api.entry import parted
from rhino_jax.errors import MeshError, OptionsError, PinError
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.mesh import TORUS, Mesh
from rhino_jax.lower.devices import abstract_mesh, as_mesh, check_count, device_mesh
from rhino_jax.lower.program import as_function, jit_step
from rhino_jax.lower.program import shardings as named_shardings
from rhino_jax.options import Options
from rhino_jax.plan import Plan, make_plan
from rhino_jax.report.text import plan_text
from rhino_jax.search.choose import best_recipe, default_meshes, plan_recipe
from rhino_jax.search.pins import Spec
from rhino_jax.search.recipes import recipe_named
from rhino_jax.search.subject import Subject
from rhino_jax.trace import Traced, trace
from rhino_jax.trace.arguments import leaves_of
from rhino_jax.verify.audit import Audit, PlannedCollective, audit
from rhino_jax.verify.compile_only import compile_lowered
from rhino_jax.verify.facts import CompiledFacts
from rhino_jax.verify.targets import parse_target


@dataclass(frozen=True)
class Planned:
    """A :class:`~rhino_jax.plan.Plan` bound to the traced step it is for.

    ``jax_mesh`` lies over real devices, or is abstract for hardware that is not here.
    """

    plan: Plan
    traced: Traced
    jax_mesh: Any

    def __str__(self) -> str:
        inside = activations(self.traced.program, self.plan.assignment)
        return plan_text(self.plan, inside)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; :func:`rhino_jax.plan` takes it back."""
        self.plan.save(path)

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
        if mesh.num_devices != len(found):
            raise MeshError(
                f"the plan is for {mesh.num_devices} devices of "
                f"{self.plan.cluster or 'a cluster'}, mesh ({mesh}); this machine has "
                f"{len(found)} ({found[0].device_kind}). Drop cluster= (or the saved "
                "plan) to run here; rhino.plan(...) plans without devices"
            )
        return replace(self, jax_mesh=device_mesh(mesh))

    @cached_property
    def in_shardings(self) -> Any:
        """``(args, kwargs)`` with a sharding for every array."""
        count = self.traced.num_inputs
        flat = self.shardings(self.plan.assignment.inputs[:count])
        return jax.tree.unflatten(self.traced.in_tree, flat)

    @cached_property
    def out_shardings(self) -> Any:
        """The step's result with a sharding for every array."""
        flat = self.shardings(self.plan.assignment.outputs)
        return jax.tree.unflatten(self.traced.out_tree, flat)

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

    def jit_call(self) -> Any:
        """The parallel step as it is called: (donated, other leaves) -> flat results.

        Two lists in place of many arguments: what ``jax.jit`` spends on each argument
        is saved. The order is that of the leaves, constants last.
        """
        traced, plan = self.traced, self.plan
        flat = as_function(
            traced.program, plan.assignment, plan.mesh, self.jax_mesh, plan.lowering
        )
        count = len(traced.program.inputs)
        given, kept = parted(range(count), traced.donated)
        place = {i: k for k, i in enumerate((*given, *kept))}

        def step(donated: list[Any], others: list[Any]) -> Any:
            leaves = (*donated, *others)
            return flat(*(leaves[place[i]] for i in range(count)))

        step.__name__ = traced.program.name
        if not plan.mesh.axes:
            return jax.jit(step, donate_argnums=0)
        where = self.shardings(plan.assignment.inputs)
        return jax.jit(
            step,
            in_shardings=parted(where, traced.donated),
            out_shardings=tuple(self.shardings(plan.assignment.outputs)),
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
        given = self.shardings(self.plan.assignment.inputs)
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

    @property
    def platform(self) -> str:
        """The platform of the plan's cluster; "" for the attached devices."""
        return parse_target(self.plan.cluster).platform if self.plan.cluster else ""

    def compile_only(self, target: str = "", **options: Any) -> CompiledFacts:
        """What the real compiler for ``target`` makes of the step; no device needed.

        Args:
            target: "h100:2x8", "v5e:4x4", "cpu:8"; "" is the plan's cluster, or as
                many CPU devices as the mesh has.

        Raises:
            ClusterError, VerifyError: an unknown target, or no compiler for it here.
        """
        aim = target or self.plan.cluster or f"cpu:{self.plan.mesh.num_devices}"
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

    def verify(self, target: str = "") -> Audit:
        """The plan's collectives against those of the compiled program."""
        facts = self.compile_only(target)
        return audit(self.planned_collectives(), facts, self.plan.mesh.shape)


def wire_dtype(dtype: str) -> str:
    """The dtype that goes over the wire: keys as words, booleans as bytes."""
    if dtype.startswith("key<"):
        return "uint32"
    return "uint8" if dtype == "bool" else dtype


def make_planned(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
) -> Planned:
    """Trace ``fun`` and plan it."""
    return plan_traced(traced_bare(fun, args, kwargs, options), options)


def traced_bare(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
) -> Traced:
    """``fun`` traced on shapes: where the arguments lie now must not matter."""
    bare = {name: _bare(tree) for name, tree in kwargs.items()}
    return trace(
        fun, [_bare(a) for a in args], bare, options.static_argnums, options.donate
    )


def _bare(tree: Any) -> Any:
    """Arrays as shapes. An argument without any, maybe static, stays what it is."""
    if not any(isinstance(leaf, jax.Array) for _, leaf in leaves_of(tree)):
        return tree
    return jax.tree.map(_shape, tree)


def _shape(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    weak = bool(getattr(x, "weak_type", False))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=weak)


def plan_traced(traced: Traced, options: Options) -> Planned:
    """The plan of a traced step, by recipe or the best of the recipes.

    Raises:
        MeshError, ClusterError, PinError, OptionsError: what was asked for can not be.
    """
    subject = subject_of(traced)
    jax_mesh, mesh, count = _where(options)
    specs = _specs(options.pins)
    recipe = options.recipe
    grid = _grid(options, count)
    if recipe and mesh is None:
        recipe_named(recipe)
        mesh = default_meshes(recipe, grid)[-1]
    link = TORUS if _platform(options) == "tpu" else ""
    mesh = mesh.linked(link) if mesh is not None else None
    if recipe:
        assert mesh is not None
        placement, assignment = plan_recipe(subject, mesh, recipe, specs)
        if mesh.num_devices > 1 and not placement.found:
            raise OptionsError(
                f"recipe {recipe!r} needs weights that it could split on mesh ({mesh})"
                f", and {traced.program.name} has none; use another recipe, such as "
                "'zero3', or leave it out to get the best that applies"
            )
    else:
        recipe, mesh, assignment = best_recipe(subject, mesh, grid, specs, link)
    plan = make_plan(
        traced.program,
        assignment,
        mesh,
        traced.input_paths,
        traced.output_paths,
        recipe=recipe,
        lowering=options.lowering,
        cluster=options.cluster,
        made_with=(("jax", jax.__version__),),
    )
    return Planned(plan, traced, _laid(jax_mesh, mesh, options))


def bind(plan: Plan, traced: Traced, options: Options) -> Planned:
    """A plan from a file bound to a traced step.

    Raises:
        PlanFileError: it is another program's plan.
        MeshError: its mesh is not that of the options, the devices or the cluster.
    """
    plan.fits(traced.program)
    jax_mesh, mesh, count = _where(options)
    if mesh is not None and mesh.shape != plan.mesh.shape:
        raise MeshError(
            f"the plan is for mesh ({plan.mesh}), mesh=({mesh}) is asked for; drop "
            "mesh=, or plan again without the saved plan"
        )
    cluster = options.cluster or plan.cluster
    what = options.cluster or f"this machine ({jax.default_backend()})"
    if plan.mesh.num_devices != count and (options.cluster or not cluster):
        raise MeshError(
            f"the plan is for {plan.mesh.num_devices} devices, mesh ({plan.mesh}), "
            f"{what} has {count}; plan again for {count}"
        )
    options = replace(options, cluster="" if jax_mesh is not None else cluster)
    return Planned(plan, traced, _laid(jax_mesh, plan.mesh, options))


def subject_of(traced: Traced) -> Subject:
    """What the search sees of a traced step."""
    return Subject(
        traced.program, traced.input_paths, traced.output_paths, traced.state_pairs
    )


def _platform(options: Options) -> str:
    if options.cluster:
        return parse_target(options.cluster).platform
    given = options.mesh
    if isinstance(given, jax.sharding.Mesh):
        return str(given.devices.flat[0].platform)
    return jax.default_backend()


def _where(options: Options) -> tuple[Any, Mesh | None, int]:
    """The user's JAX mesh if one was given, the mesh if fixed, the device count."""
    given = options.mesh
    mesh = None if given is None else as_mesh(given)
    if options.cluster:
        count = parse_target(options.cluster).device_count
        what = options.cluster
    elif isinstance(given, jax.sharding.Mesh):
        return given, mesh, given.size
    else:
        count, what = len(jax.devices()), f"this machine ({jax.devices()[0].platform})"
    if mesh is not None:
        check_count(mesh, count, what)
    return None, mesh, count


def _laid(jax_mesh: Any, mesh: Mesh, options: Options) -> Any:
    if not mesh.axes:
        return None
    if options.cluster:
        return abstract_mesh(mesh)
    if jax_mesh is not None:
        return jax.sharding.Mesh(jax_mesh.devices, jax_mesh.axis_names)
    return device_mesh(mesh)


def _grid(options: Options, count: int) -> tuple[int, ...]:
    """How the devices are linked: a TPU's torus, or all in a row."""
    if options.cluster:
        target = parse_target(options.cluster)
        sides = target.text.partition(":")[2].split("x")
        if target.platform == "tpu" and all(side.isdigit() for side in sides):
            found = tuple(int(side) for side in sides if int(side) > 1)
            if math.prod(found) == count:
                return found or (1,)
    return (count,)


def _specs(pins: Mapping[str, Any]) -> dict[str, Spec]:
    wrong = []
    found = {}
    for key, spec in pins.items():
        try:
            found[str(key)] = compat.partitions(spec)
        except TypeError:
            wrong.append(f"{key!r}: {spec!r}")
    if wrong:
        raise PinError(
            "pins must be PartitionSpecs (or tuples of axis names); not so: "
            + "; ".join(wrong)
        )
    return found
