"""What products hide of the collectives that they do by themselves, by the compiler.

One GPT is planned with and without collective matmul, and both are compiled for TPUs
that are not here. Beside the predictions stand what the compiler's own schedule says:
between the start and the end of each shard's travel it runs so many cycles of kernels.
What these take of the travel's predicted time is hidden. But a product in parts costs
more than in one: so the compiler's cycles of all kernels, with the communication that
is predicted to be seen, must be less with than without. Exit 1 where they are not,
where a program is not its plan, or less than the goal is hidden.
``python -m benchmarks.collective_matmul --help``.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Iterator

import click
import jax
from rich.console import Console
from rich.table import Table

import rhino_jax as rhino
from benchmarks.models import build
from rhino_jax.api.planned import Planned
from rhino_jax.cluster.parse import parse_cluster
from rhino_jax.verify.collectives import wire_bytes
from rhino_jax.verify.facts import CompiledFacts
from rhino_jax.verify.hlo_text import parse_module
from rhino_jax.verify.hlo_time import TPU_CLOCK_HZ, compiler_time, cycles_of

GOAL = 0.8
START, DONE = "collective-permute-start", "collective-permute-done"


def planned(name: str, depth: int, times: float, cluster: str, within: bool) -> Planned:
    model = build(name, "large", depth=depth, dtype="bfloat16")
    batch = {
        key: jax.ShapeDtypeStruct((int(times * x.shape[0]), *x.shape[1:]), x.dtype)
        for key, x in model.batch_shapes.items()
    }
    return rhino.plan(
        model.train_step,
        model.state_shapes,
        batch,
        cluster=cluster,
        collective_matmul=within,
        pipeline_stages=1,
        cache_dir="",
    )


def travels(facts: CompiledFacts, clock_hz: float) -> Iterator[tuple[int, float]]:
    """Of every shard sent outside loops: bytes, and seconds of kernels meanwhile."""
    module = parse_module(facts.hlo)
    under_way: dict[str, float] = {}
    sent = {one.name: wire_bytes(one) for one in facts.collectives}
    for name, one in module.computations[module.entry].instructions.items():
        if one.opcode == START:
            under_way[name] = 0.0
        elif one.opcode == DONE:
            (start,) = one.operands[:1]
            yield sent[start], under_way.pop(start)
        else:
            seconds = cycles_of(one) / clock_hz
            under_way = {key: held + seconds for key, held in under_way.items()}


@click.command()
@click.option("--model", "name", default="gpt_unrolled", show_default=True)
@click.option("--depth", default=2, show_default=True)
@click.option("--times", default=1.0, show_default=True, help="Of the model's batch.")
@click.option("--cluster", default="v5e:4x4", show_default=True)
@click.option("--timeout", default=3000.0, show_default=True, help="Of a compile.")
def main(name: str, depth: int, times: float, cluster: str, timeout: float) -> None:
    """Print both programs, predicted and compiled; exit 1 below the goal."""
    table = Table(title=f"{name}, {depth} layers, on {cluster}")
    for heading in (
        *("collective matmul", "predicted ms", "of it communication", "MiB sent"),
        *("compiled", "kernels ms", "with communication", "shards", "hidden"),
    ):
        table.add_column(heading)
    (link, _), device = parse_cluster(cluster).levels[-1], cluster.partition(":")[0]
    good, totals = True, []
    for within in (False, True):
        one = planned(name, depth, times, cluster, within)
        verified = one.verify(timeout_seconds=timeout)
        seen = list(travels(verified.facts, TPU_CLOCK_HZ[device]))
        wanted = [size / link.bytes_per_second for size, _ in seen]
        hidden = sum(
            min(want, seconds) for want, (_, seconds) in zip(wanted, seen, strict=True)
        )
        share = hidden / sum(wanted) if wanted else 0.0
        good &= verified.ok and (share >= GOAL or not within)
        predicted = one.predicted
        assert predicted is not None
        kernels = compiler_time(verified.facts.hlo).cycles / TPU_CLOCK_HZ[device]
        totals.append(kernels + predicted.comm_seconds)
        table.add_row(
            "yes" if within else "no",
            f"{predicted.step_seconds * 1e3:.2f}",
            f"{predicted.comm_seconds * 1e3:.2f}",
            f"{one.plan.wire_bytes / 2**20:.0f}",
            "as planned" if verified.ok else "NOT as planned",
            f"{kernels * 1e3:.2f}",
            f"{totals[-1] * 1e3:.2f}",
            str(len(seen)),
            f"{share:.0%}" if seen else "",
        )
    Console(width=120).print(table)
    raise SystemExit(0 if good and totals[1] < totals[0] else 1)


if __name__ == "__main__":
    main()
