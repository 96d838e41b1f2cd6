"""One large image on 8 devices: what does it bring to split it in blocks of rows?

Train steps of U-Net and of ResNet-50 on one image of 2048 x 2048 in bfloat16, searched
for 8 H100 with and without halos, and compiled for them: the collectives of the program
against those planned. Then small ones by running, in float64 on 8 simulated CPU
devices: the state after a step of SGD with rate 1 (so that it is the gradients) against
the undecorated step's. ``python -m benchmarks.spatial --help``.
"""

from __future__ import annotations

from collections.abc import Iterator

# The first import of JAX: it sets JAX's environment.
from benchmarks.equality import worst_leaf

# isort: split
import click
import jax
import optax
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.fidelity import compiled, faithful
from benchmarks.models import resnet, unet
from benchmarks.models.zoo import Model, run_init
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import MARGIN, traced_bare
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.ir.assignment import Assignment
from rhino_jax.ir.factors import WINDOW
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Program
from rhino_jax.options import make_options
from rhino_jax.plan import make_plan
from rhino_jax.rules import rule_of
from rhino_jax.search.auto import plan_search
from rhino_jax.search.candidates import Candidate, Wish
from rhino_jax.search.meshes import candidate_meshes
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta

BUILD = {"unet": unet.build, "resnet": resnet.build}
CLUSTER = "h100:1x8"
LARGE, SMALL = "one image", "one small image"
TOLERANCE = 1e-9


def without_halos(model: Model, cluster_name: str = CLUSTER) -> Candidate:
    """The best plan that keeps images whole where windows overlap."""
    args = model.state_shapes, model.batch_shapes
    traced = traced_bare(model.train_step, args, {}, make_options())
    cluster = parse_cluster(cluster_name)
    limit = int(cluster.device.memory_bytes * MARGIN)
    meshes = candidate_meshes(cluster, 1)
    wish = Wish(cluster, meshes, limit, donated=traced.donated, halos=False)
    return plan_search(subject_of(traced), wish).best


def with_halos(model: Model, cluster_name: str = CLUSTER) -> rhino.Planned:
    """The plan that is found unasked."""
    shapes = model.state_shapes, model.batch_shapes
    return rhino.plan(model.train_step, *shapes, cluster=cluster_name, cache_dir="")


def in_blocks(assignment: Assignment, program: Program) -> Iterator[str]:
    """The kinds of the ops whose windows are split."""
    for op, done in zip(program.ops, assignment.ops, strict=True):
        if not op.programs:
            rule = rule_of(program, op)
            if any(f.kind == WINDOW and done.choice.on(f.name) for f in rule.factors):
                yield op.kind


def difference(name: str) -> tuple[float, int]:
    """The worst relative difference of a gradient of a small step, and how many ops of
    its plan are in blocks.

    The image comes in rows over both axes; searched where bytes alone cost and no
    product may be done twice, so that all is split.
    """
    with jax.enable_x64(True):
        model = BUILD[name](SMALL, dtype="float64", optimizer=optax.sgd(1.0))
        step, state, batch = run_init(model)
        state = jax.device_get(state)
        options = make_options(donate=False)
        traced = traced_bare(model.train_step, (state, batch), {}, options)
        mesh = Mesh.of(x=4, y=2)
        prices = AlphaBeta(dict.fromkeys(mesh.names, 0.0))
        pins = {"batch/images": ((), ("x", "y"))}
        request = Request(mesh, prices, replicate_heavy=False, pins=pins)
        found = search(subject_of(traced), request)
        paths = traced.input_paths, traced.output_paths
        plan = make_plan(traced.program, found.assignment, mesh, *paths)
        ours = rhino.auto_parallel(plan=plan, mesh=dict(mesh.shape), donate=False)
        given = ours(model.train_step)(state, batch)
        expected = jax.jit(step)(state, batch)
        worst, _ = worst_leaf(jax.device_get(expected), jax.device_get(given))
        return worst, len(list(in_blocks(plan.assignment, traced.program)))


@click.command()
@click.option("--model", "models", multiple=True, default=tuple(BUILD))
@click.option("--cluster", default=CLUSTER, show_default=True)
@click.option("--compile/--no-compile", "compiles", default=True)
def main(models: tuple[str, ...], cluster: str, compiles: bool) -> None:
    """Print both searches of each model; exit 1 where a claim does not hold."""
    table = Table("model", "halos", "mesh", "ms a step", "GiB", "sent MiB", box=None)
    missed = []
    for name in models:
        model = BUILD[name](LARGE, dtype="bfloat16")
        whole = without_halos(model, cluster)
        found = with_halos(model, cluster)
        before, after = whole.prediction, found.prediction()
        for halos, mesh, one in (
            ("no", whole.mesh, before),
            ("yes", found.plan.mesh, after),
        ):
            table.add_row(
                name,
                halos,
                str(mesh),
                f"{one.step_seconds * 1e3:.2f}",
                f"{one.peak_bytes / 2**30:.2f}",
                f"{one.wire_bytes / 2**20:.1f}",
            )
        blocks = list(in_blocks(found.plan.assignment, found.traced.program))
        click.echo(f"{name}: {len(blocks)} ops in blocks")
        if not blocks or after.step_seconds >= before.step_seconds:
            missed.append(f"{name}: halos bring nothing")
        if compiles:
            row = compiled(found)
            peak = row.get("compiled_bytes", 0) / 2**30
            click.echo(f"{name} compiled: {row['outcome']}, {peak:.2f} GiB")
            click.echo(f"  planned, compiled, ratio by axes: {row.get('axes')}")
            if not faithful(row) or row["missing"]:
                missed.append(f"{name}: the compiled program is not the plan: {row}")
        worst, count = difference(name)
        click.echo(f"{name}, small: {count} ops in blocks, differs by {worst:.0e}")
        if worst > TOLERANCE or not count:
            missed.append(f"{name}: a small step differs by {worst:.1e}")
    Console(width=120).print(table)
    for what in missed:
        click.echo(f"missed: {what}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
