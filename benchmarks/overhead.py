"""What does a decorated call cost, and what does the import?

A step over a state of 500 leaves, called 200 times under ``rhino.auto_parallel`` and
200 times as the same program under plain ``jax.jit`` (same layouts, same donation), one
after the other, each waited for; the minimum of each and their difference, on 1 and on
8 simulated devices, each in a process of its own. Eight simulated devices on few cores
make one call take milliseconds, more or less: so all of it is done several times, and
the median of the differences told. Then ``import rhino_jax`` over ``import jax`` in
fresh processes. ``python -m benchmarks.overhead --help``.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click

DEVICE_COUNTS = (1, 8)
WIDTH = 8
IMPORTS = """
import time
began = time.perf_counter()
import jax
between = time.perf_counter()
import rhino_jax
print(between - began, time.perf_counter() - between)
"""


def make_state(leaves: int) -> Any:
    """``leaves`` small arrays, half parameters, half momenta, and a batch."""
    import jax.numpy as jnp

    params = {f"layer{k}": {"w": jnp.ones((WIDTH, WIDTH))} for k in range(leaves // 2)}
    momenta = {name: {"w": 0 * held["w"]} for name, held in params.items()}
    return {"params": params, "momenta": momenta}


def train_step(state: Any, batch: Any) -> Any:
    """Almost no work: what is timed is the way in and out."""
    import jax
    import jax.numpy as jnp

    def loss_of(params: Any) -> Any:
        scale = jnp.mean(batch["x"])
        return sum(scale * jnp.sum(held["w"]) for held in params.values())

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    momenta = jax.tree.map(lambda m, g: 0.9 * m + g, state["momenta"], grads)
    params = jax.tree.map(lambda p, m: p - 1e-6 * m, state["params"], momenta)
    return {"params": params, "momenta": momenta}, loss


def plain(planned: Any) -> Callable[..., Any]:
    """The planned program under ``jax.jit`` alone."""
    import jax

    from rhino_jax.lower.program import as_function

    traced, plan = planned.traced, planned.plan
    flat = as_function(traced.program, plan.assignment, plan.mesh, planned.jax_mesh)

    def step(state: Any, batch: Any) -> Any:
        outs = flat(*jax.tree.leaves((state, batch)), *traced.constants)
        return jax.tree.unflatten(traced.out_tree, outs)

    if not plan.mesh.axes:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(
        step,
        in_shardings=planned.in_shardings[0],
        out_shardings=planned.out_shardings,
        donate_argnums=0,
    )


def measure(leaves: int, calls: int, rounds: int) -> dict[str, Any]:
    """Microseconds of a call of each kind: the least of ``calls``, median of rounds."""
    import jax
    import numpy as np

    import rhino_jax as rhino

    decorated = rhino.auto_parallel(train_step)
    batch = {"x": np.ones((32, WIDTH), np.float32)}
    planned = decorated.planned(make_state(leaves), batch)
    steps = {"decorated": decorated, "jit": plain(planned)}
    where, _ = planned.in_shardings[0]
    states = {name: jax.device_put(make_state(leaves), where) for name in steps}
    batch = jax.device_put(batch, planned.in_shardings[0][1])
    names = list(steps)
    taken: dict[str, list[list[float]]] = {name: [] for name in names}
    gc.disable()
    for round_ in range(rounds):
        gc.collect()
        for name in names:
            taken[name].append([])
        for call in range(calls + 3):
            for name in names[:: 1 if call % 2 else -1]:
                began = time.perf_counter()
                states[name], loss = steps[name](states[name], batch)
                seconds = time.perf_counter() - began
                jax.block_until_ready((states[name], loss))
                if round_ or call >= 3:  # the first ones compile
                    taken[name][-1].append(seconds * 1e6)
    least = {name: [min(one) for one in taken[name]] for name in names}
    added = [a - b for a, b in zip(least["decorated"], least["jit"], strict=True)]
    return {
        "devices": jax.device_count(),
        "added": statistics.median(added),
        **{name: statistics.median(found) for name, found in least.items()},
    }


def child(code: list[str], devices: int) -> str:
    """What a fresh Python with so many CPU devices prints."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    added = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    done = subprocess.run(
        [sys.executable, *code],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **added},
    )
    return done.stdout.strip().splitlines()[-1]


@click.command()
@click.option("--leaves", default=500, show_default=True)
@click.option("--calls", default=200, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--imports", default=8, show_default=True, help="Fresh processes.")
@click.option("--inner", is_flag=True, hidden=True, help="Measure in this process.")
def main(leaves: int, calls: int, rounds: int, imports: int, inner: bool) -> None:
    """Print both times and their difference."""
    if inner:
        click.echo(json.dumps(measure(leaves, calls, rounds)))
        return
    given = [f"--leaves={leaves}", f"--calls={calls}", f"--rounds={rounds}"]
    again = ["-m", "benchmarks.overhead", "--inner", *given]
    for devices in DEVICE_COUNTS:
        row = json.loads(child(again, devices))
        ours, theirs = row["decorated"], row["jit"]
        click.echo(
            f"{row['devices']} devices, {leaves} leaves: decorated {ours:.0f} us, "
            f"jax.jit {theirs:.0f} us, added {row['added']:.0f} us"
        )
    if imports:
        pairs = [child(["-c", IMPORTS], 1).split() for _ in range(imports)]
        jax_seconds = min(float(first) for first, _ in pairs)
        added = min(float(second) for _, second in pairs)
        click.echo(
            f"import jax {jax_seconds:.3f} s, import rhino_jax adds {added:.3f} s"
        )


if __name__ == "__main__":
    main()
