"""What sizes that do not divide cost: 25 heads and a vocabulary of 50,257 on 8 devices.

JAX stores no uneven array, so inputs are split elsewhere; inside the step the last
shards may be padded where that pays. One sequence, so that no batch can be split: the
price of a FLOP against the same model with sizes that divide. Then a small one (5
heads, a vocabulary of 101) by running: the state after a step against the undecorated
step's, on 8 simulated CPU devices. ``python -m benchmarks.uneven --help``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

# The first import of JAX: it sets JAX's environment.
from benchmarks.equality import BY_BYTES, decorated, worst_leaf

# isort: split
import click
import jax
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models.plain_gpt import Config, gpt
from benchmarks.models.zoo import run_init
from rhino_jax.api.activations import activations
from rhino_jax.plan import Leaf

CLUSTER = "h100:1x8"
MOST_DEARER = 1.25
TOLERANCE = 1e-9
UNEVEN = Config(hidden=1600, heads=25, vocab=50257, seq=4096)
EVEN = Config(hidden=1536, heads=24, vocab=50304, seq=4096)
SMALL = Config(hidden=40, heads=5, vocab=101, seq=64, dtype="float64")


def planned(cfg: Config) -> rhino.Planned:
    """The train step of ``cfg`` as searched for 8 H100."""
    model = gpt(cfg)
    shapes = model.state_shapes, model.batch_shapes
    return rhino.plan(model.train_step, *shapes, cluster=CLUSTER, cache_dir="")


def padded(found: rhino.Planned) -> Iterator[Leaf]:
    """The activations whose last shards are padded."""
    mesh = found.plan.mesh
    for leaf in activations(found.traced.program, found.plan.assignment):
        if leaf.layout.ragged_dims(leaf.shape, mesh):
            yield leaf


def difference(mesh: str) -> tuple[float, tuple[Leaf, ...]]:
    """The worst relative difference of a leaf after one small step, in float64, and
    what is padded in its plan."""
    with jax.enable_x64(True):
        model = gpt(SMALL)
        step, state, batch = run_init(model)
        state = jax.device_get(state)
        ours = decorated(model, BY_BYTES, mesh, state, batch)
        expected, given = jax.jit(step)(state, batch), ours(state, batch)
        worst, _ = worst_leaf(jax.device_get(expected), jax.device_get(given))
        return worst, tuple(padded(ours.planned(state, batch)))


@click.command()
@click.option("--layers", default=33, show_default=True)
def main(layers: int) -> None:
    """Print both models and the small ones; exit 1 where a goal is missed."""
    table = Table(box=None)
    for heading in ("heads", "vocabulary", "mesh", "ms a step", "TFLOP/s a device"):
        table.add_column(heading)
    table.add_column("padded", overflow="fold")
    prices, missed = [], []
    for cfg in (replace(EVEN, layers=layers), replace(UNEVEN, layers=layers)):
        found = planned(cfg)
        assert found.predicted is not None
        seconds = found.predicted.step_seconds
        prices.append(seconds / cfg.train_flops)
        notes = [note for note in found.plan.notes if note.startswith("uneven")]
        table.add_row(
            str(cfg.heads),
            str(cfg.vocab),
            str(found.plan.mesh),
            f"{seconds * 1e3:.2f}",
            f"{cfg.train_flops / seconds / found.plan.num_devices / 1e12:.0f}",
            "; ".join(notes),
        )
    Console(width=160).print(table)
    dearer = prices[1] / prices[0]
    click.echo(f"a FLOP of the uneven model costs {dearer:.3f} times the even one's")
    if dearer > MOST_DEARER:
        missed.append(f"over {MOST_DEARER} times")
    for mesh in ("8", "2x4"):
        worst, leaves = difference(mesh)
        click.echo(
            f"{SMALL.heads} heads, vocabulary {SMALL.vocab}, mesh {mesh}: differs by "
            f"{worst:.0e}; padded: {len(leaves)} products, e.g. "
            + "; ".join(f"{leaf.shape} {leaf.layout}" for leaf in leaves[-2:])
        )
        if worst > TOLERANCE:
            missed.append(f"mesh {mesh}: differs by {worst:.1e}")
    for what in missed:
        click.echo(f"missed: {what}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
