"""One sequence of 131,072 tokens on eight devices: is there a plan, and is it right?

A decoder (:mod:`benchmarks.models.long_context`) whose attention is cuDNN's, planned
for ``h100:1x8`` with nothing configured, and by tensor parallelism alone. The real
compiler says what memory each takes; where there is no cuDNN it compiles the stand-in.
Then the same step at a small size on eight simulated devices, under plans that split
the sequence both ways (around a ring, and by all-to-all to heads), against the
undecorated step with JAX's own attention. ``python -m benchmarks.context --help``.

The same decoder with its attention written as products and a softmax is planned as it
is written, and with attention recognized (``--way written --way recognized``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)

import click
import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models.long_context import SIZES, build
from benchmarks.models.zoo import run_init
from rhino_jax.api.activations import activations
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.errors import InfeasibleError
from rhino_jax.ir.factors import Choice
from rhino_jax.ir.mesh import Mesh
from rhino_jax.options import make_options
from rhino_jax.plan import Plan, make_plan
from rhino_jax.rules.attention import BACKWARD, FORWARD, SEQUENCE
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta

CLUSTER = "h100:1x8"
GIB = 2**30
FOUND, TENSOR, PLAIN, SEEN = "found", "tensor parallel", "written", "recognized"
WAYS: dict[str, dict[str, Any]] = {
    FOUND: {},
    TENSOR: {"recipe": "megatron", "mesh": {"data": 1, "tensor": 8}},
    PLAIN: {"attention": "written"},
    SEEN: {},
}
WRITTEN_OUT = (PLAIN, SEEN)
"""Ways to plan the step whose attention is products and a softmax."""
HAVE_TO_FIT = (FOUND, SEEN)
TOLERANCE = 0.03
"""Of the largest change of an array: what bfloat16 leaves."""


def planned(size: str, way: str, cluster: str) -> Any:
    model = build(size, implementation="xla" if way in WRITTEN_OUT else "cudnn")
    shapes = model.state_shapes, model.batch_shapes
    return rhino.plan(
        model.train_step, *shapes, cluster=cluster, cache_dir="", **WAYS[way]
    )


def context_parallel(plan: Plan, program: Any) -> str:
    """How attention is split: "ring", "all-to-all" to heads, both, or ""."""
    choices = list(_choices(program, plan.assignment))
    ring = any(choice.on(SEQUENCE) for choice in choices)
    heads = {axis for choice in choices for axis in choice.axes}
    moved = any(
        c.kind == "all-to-all" and len(c.shape) == 4 and {*c.axes} & heads
        for c in plan.collectives
    )
    return " and ".join(
        name for name, so in (("ring", ring), ("all-to-all", moved)) if so
    )


def _choices(program: Any, assignment: Any) -> Iterator[Choice]:
    for op, plan in zip(program.ops, assignment.ops, strict=True):
        if op.kind in (FORWARD, BACKWARD):
            yield plan.choice
        for inner, body in zip(op.programs, plan.inner, strict=True):
            yield from _choices(inner, body)


def row(size: str, way: str, cluster: str) -> tuple[list[str], bool]:
    """One row of the table, and whether it fits by the compiler's word."""
    began = time.perf_counter()
    try:
        one = planned(size, way, cluster)
    except InfeasibleError as error:
        short = str(error).partition(" (")[0]
        return [size, way, short, *[""] * 7, "no"], False
    seconds = time.perf_counter() - began
    prediction = one.prediction()
    facts = one.compile_only()
    capacity = parse_cluster(cluster).device.memory_bytes
    peak = facts.memory.peak_bytes if facts.ok else 0
    fits = facts.ok and peak <= capacity
    made = activations(one.traced.program, one.plan.assignment)
    logits = [x.layout for x in made if x.shape[-1] == SIZES[size].vocab]
    return [
        size,
        way,
        str(one.plan.mesh),
        context_parallel(one.plan, one.traced.program) or "no",
        " ".join(map(str, logits)),
        f"{seconds:.0f}",
        f"{prediction.step_seconds:.2f}",
        f"{prediction.peak_bytes / GIB:.1f}",
        f"{peak / GIB:.1f}" if facts.ok else facts.outcome,
        f"{capacity / GIB:.1f}",
        "yes" if fits else "no",
    ], fits


def equality(heads: tuple[int, int]) -> tuple[str, float, float]:
    """How a small step is split, and how far it is from the undecorated one.

    Searched where a product may not be done twice, so that all is split. The distances
    are of the loss, and the largest of a gradient's, to the largest of its array.
    """
    same = {"optimizer": optax.sgd(1.0), "heads": heads}
    ours, plain = build("tiny", **same), build("tiny", implementation="xla", **same)
    _, state, batch = run_init(ours)
    traced = traced_bare(
        ours.train_step, (state, batch), {}, make_options(donate=False)
    )
    mesh = Mesh.of(x=4, y=2)
    found = search(
        subject_of(traced), Request(mesh, AlphaBeta(), replicate_heavy=False)
    )
    paths = traced.input_paths, traced.output_paths
    plan = make_plan(traced.program, found.assignment, mesh, *paths)
    step = rhino.auto_parallel(plan=plan, mesh=dict(mesh.shape), donate=False)
    got, metrics = step(ours.train_step)(state, batch)
    want, expected = jax.jit(plain.train_step)(state, batch)
    loss = abs(float(metrics["loss"]) / float(expected["loss"]) - 1)
    far = jax.tree.map(_distance, got["params"], want["params"], state["params"])
    return context_parallel(plan, traced.program), loss, max(jax.tree.leaves(far))


def _distance(got: Any, want: Any, before: Any) -> float:
    change = np.max(np.abs(np.asarray(want - before)))
    return float(np.max(np.abs(np.asarray(got - want))) / change)


@click.command()
@click.option("--size", "sizes", multiple=True, default=("1B", "1B, 3 heads", "22B"))
@click.option("--cluster", default=CLUSTER, show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)))
@click.option("--small/--no-small", default=True, help="Run the small size too.")
def main(
    sizes: tuple[str, ...], cluster: str, ways: tuple[str, ...], small: bool
) -> None:
    """Print the table; exit 1 where a found plan does not fit or is not equal."""
    good = True
    table = Table(box=None)
    for heading in (
        *("model", "plan", "mesh", "context parallel", "logits", "plan s", "step s"),
        *("predicted GiB", "compiled GiB", "device GiB", "fits"),
    ):
        table.add_column(heading)
    for size in sizes:
        for way in ways or tuple(WAYS):
            cells, fits = row(size, way, cluster)
            table.add_row(*cells)
            click.echo(" | ".join(cells))
            good &= fits or way not in HAVE_TO_FIT
    if sizes:
        Console(width=160).print(table)
    for heads in ((1, 1), (8, 8), (8, 2)) if small else ():
        how, loss, gradient = equality(heads)
        good &= max(loss, gradient) <= TOLERANCE and bool(how)
        click.echo(
            f"{heads[0]} heads, {heads[1]} of keys: {how}; loss off by {loss:.1e}, "
            f"gradients by {gradient:.1e}"
        )
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
