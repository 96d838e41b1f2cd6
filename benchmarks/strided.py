"""What a strided layout saves where Q, K and V are one matrix product.

A tensor axis splits the heads. Cut into blocks, the columns of a `[H, 3H]` projection
suit no head: XLA's partitioner, given that sharding, moves Q, K and V. Cut inside each
third, they stay where they are, and the weight moves instead. Compiled for eight H100
with the real compiler: XLA with contiguous shardings, the megatron recipe, and what the
search finds when it is given the mesh alone (no recipe, no pins). Then the same steps,
small, by running: the state after a step against the undecorated step's, on 8 simulated
CPU devices. ``python -m benchmarks.strided --help``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# The first import of JAX: it sets JAX's environment.
from benchmarks.equality import BY_BYTES, decorated, worst_leaf

# isort: split
import click
import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models.plain_gpt import Config, block, gpt
from benchmarks.models.zoo import Model, run_init
from rhino_jax.api.activations import activations
from rhino_jax.ir.layout import Layout
from rhino_jax.verify.collectives import KINDS
from rhino_jax.verify.compile_only import compile_lowered
from rhino_jax.verify.facts import CompiledFacts

CLUSTER, DEVICES, AXIS = "h100:1x8", 8, "tensor"
MOST_BESIDE = 0.1
TOLERANCE = 1e-9
CONTIGUOUS, RECIPE, SEARCHED = "XLA, contiguous", "megatron", "searched"

MODELS = {"block": block, "gpt": gpt}
LARGE = {
    "block": Config(hidden=4096, heads=32, batch=8, seq=2048),
    "gpt": Config(hidden=4096, heads=32, layers=2, vocab=51200, seq=16384),
}
SMALL = {
    "block": Config(hidden=32, heads=8, seq=128, dtype="float64"),
    "gpt": Config(hidden=32, heads=8, layers=2, vocab=128, seq=128, dtype="float64"),
}
SPECS = {
    "qkv": PartitionSpec(None, AXIS),
    "out": PartitionSpec(AXIS),
    "up": PartitionSpec(None, AXIS),
    "down": PartitionSpec(AXIS),
    "embed": PartitionSpec(AXIS),
    "head": PartitionSpec(None, AXIS),
}
"""The tensor-parallel shardings that a user would ask XLA for."""


@dataclass(frozen=True)
class Moved:
    """What a compiled step moves: MiB a device and how many collectives, by kind.

    ``split`` is how the QKV product lies.
    """

    count: Mapping[str, int]
    mib: Mapping[str, float]
    split: str = ""

    @property
    def total_mib(self) -> float:
        return sum(self.mib.values())

    @property
    def beside_mib(self) -> float:
        """Beside the all-reduces. A reduce-scatter and an all-gather are one."""
        halves = self.mib["all-gather"] - self.mib["reduce-scatter"]
        others = self.mib["all-to-all"] + self.mib["collective-permute"]
        return max(halves, 0.0) + others

    def __str__(self) -> str:
        return ", ".join(
            f"{n} {kind} ({self.mib[kind]:.1f} MiB)" for kind, n in self.count.items()
        )


def moved(facts: CompiledFacts, split: str = "") -> Moved:
    """The collectives of a compiled step; those of a few bytes are left out."""
    assert facts.ok, facts.message
    count: dict[str, int] = {}
    mib: dict[str, float] = defaultdict(float)
    for kind in KINDS:
        sent = [c for c in facts.collectives if c.kind == kind]
        sent = [c for c in sent if c.total_wire_bytes >= 2**20]
        if sent:
            count[kind] = sum(c.trip_count for c in sent)
            mib[kind] = sum(c.total_wire_bytes for c in sent) / 2**20
    return Moved(count, mib, split)


def contiguous(model: Model, mesh: Any) -> Any:
    """The step under `jax.jit` with contiguous tensor-parallel shardings."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", "")
        return NamedSharding(mesh, SPECS.get(name, PartitionSpec()))

    whole = NamedSharding(mesh, PartitionSpec())
    shapes = model.state_shapes, model.batch_shapes
    _, metrics = jax.eval_shape(model.train_step, *shapes)
    state = jax.tree.map_with_path(of, model.state_shapes)
    batch = jax.tree.map(lambda _: whole, model.batch_shapes)
    given = jax.tree.map(lambda _: whole, metrics)
    return jax.jit(
        model.train_step, in_shardings=(state, batch), out_shardings=(state, given)
    )


def compiled_contiguous(model: Model) -> Moved:
    """What XLA's partitioner makes of the contiguous shardings."""
    mesh = AbstractMesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
    traced = contiguous(model, mesh).trace(model.state_shapes, model.batch_shapes)
    lowered = traced.lower(lowering_platforms=("cuda",))
    return moved(compile_lowered(lowered, CLUSTER, DEVICES), f"{AXIS}, in blocks")


def planned(model: Model, recipe: str = "") -> rhino.Planned:
    """The step on one tensor axis, by a recipe or as searched."""
    return rhino.plan(
        model.train_step,
        model.state_shapes,
        model.batch_shapes,
        cluster=CLUSTER,
        mesh={AXIS: DEVICES},
        recipe=recipe,
        cache_dir="",
    )


def qkv_layouts(plan: rhino.Planned, hidden: int) -> Iterator[Layout]:
    """How the results of the fused products lie."""
    for leaf in activations(plan.traced.program, plan.plan.assignment):
        if leaf.shape[-1:] == (3 * hidden,):
            yield leaf.layout


def is_strided(layout: Layout, hidden: int) -> bool:
    """Whether the last dimension is cut inside each third: every device holds an
    equal part of Q, of K and of V."""
    return bool(layout.dims[-1]) and all(
        hidden % (split.stride * DEVICES) == 0 for split in layout.dims[-1]
    )


def compiled_plan(model: Model, hidden: int, recipe: str = "") -> Moved:
    """What the compiler makes of a plan of ours."""
    found = planned(model, recipe)
    split = ", ".join(dict.fromkeys(map(str, qkv_layouts(found, hidden))))
    return moved(found.compile_only(), split)


def difference(name: str, way: str) -> tuple[float, tuple[Layout, ...]]:
    """The worst relative difference of a leaf after one small step, in float64, and
    how the fused products lie in a plan of ours."""
    layouts: tuple[Layout, ...] = ()
    with jax.enable_x64(True):
        model = MODELS[name](SMALL[name])
        step, state, batch = run_init(model)
        state = jax.device_get(state)
        expected = jax.jit(step)(state, batch)
        if way == CONTIGUOUS:
            mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
            given = contiguous(model, mesh)(state, batch)
        else:
            how = BY_BYTES if way == SEARCHED else way
            ours = decorated(model, how, "8", state, batch)
            given = ours(state, batch)
            found = ours.planned(state, batch)
            layouts = tuple(qkv_layouts(found, SMALL[name].hidden))
        worst, _ = worst_leaf(jax.device_get(expected), jax.device_get(given))
    return worst, layouts


@click.command()
@click.option("--only", default=",".join(MODELS), show_default=True)
def main(only: str) -> None:
    """Print what each way moves; exit 1 where a strided plan moves too much."""
    table = Table(box=None)
    for heading in ("step", "way", "QKV", "MiB", "beside all-reduces", "collectives"):
        table.add_column(heading, overflow="fold")
    table.add_column("worst difference")
    missed = []
    for name in only.split(","):
        cfg = LARGE[name]
        model = MODELS[name](cfg)
        plain = compiled_contiguous(model)
        ways = {
            CONTIGUOUS: plain,
            RECIPE: compiled_plan(model, cfg.hidden, RECIPE),
            SEARCHED: compiled_plan(model, cfg.hidden),
        }
        for way, found in ways.items():
            worst, _ = difference(name, way)
            table.add_row(
                name,
                way,
                found.split,
                f"{found.total_mib:.0f}",
                f"{found.beside_mib:.0f}",
                str(found),
                f"{worst:.0e}",
            )
            if worst > TOLERANCE:
                missed.append(f"{name}, {way}: differs by {worst:.1e}")
        share = ways[RECIPE].beside_mib / plain.beside_mib
        if share > MOST_BESIDE:
            missed.append(f"{name}: {share:.2f} of XLA's beside the all-reduces")
        if ways[SEARCHED].total_mib >= plain.total_mib:
            missed.append(f"{name}: the search's plan moves no less than XLA's")
        if not all(
            is_strided(layout, cfg.hidden)
            for layout in qkv_layouts(planned(model), cfg.hidden)
        ):
            missed.append(f"{name}: the search's plan is not strided")
    Console(width=170).print(table)
    for what in missed:
        click.echo(f"missed: {what}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
