"""What each of several processes runs for ``test_processes``: ``among.py FOLDER``.

Every check is made in every process; the first writes what the test goes on with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rhino_jax as rhino
from tests.api.resumed import X, init, train_step

PLANS: dict[str, dict[str, Any]] = {
    "searched": {},
    "rows lie within a process": {
        "recipe": "zero3 x megatron",
        "mesh": {"tensor": 2, "data": 2},
    },
}
STEPS = 3


def undecorated() -> tuple[list[float], Any]:
    state, losses = jax.jit(init)(jax.random.key(0)), []
    for _ in range(STEPS):
        state, loss = jax.jit(train_step)(state, X)
        losses.append(float(loss))
    return losses, state


def equal(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-4, atol=1e-6
        )


def check(options: dict[str, Any], expected: tuple[list[float], Any]) -> Any:
    """One plan: created in place, fed in three ways, taken back, put again."""
    step = rhino.auto_parallel(cache_dir="", **options)(train_step)
    rows = np.split(X, jax.process_count())[jax.process_index()]
    whole = rhino.global_shapes(rows)
    assert whole.shape == X.shape
    state = step.init(init, jax.random.key(0), whole)
    assert not any(x.is_fully_addressable for x in jax.tree.leaves(state))
    losses = []
    for batch in (step.shard_batch(rows), step.shard_batch(X), X):
        state, loss = step(state, batch)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    fetched = step.fetch(state)
    equal(fetched, expected[1])
    evaluate = rhino.follow(step, lambda w, x: jnp.sum(x @ w["up"] @ w["down"]))
    wanted = np.sum(X @ fetched["w"]["up"] @ fetched["w"]["down"])
    for batch in (step.shard_batch(rows), X):
        found = float(evaluate(state["w"], batch))
        np.testing.assert_allclose(found, wanted, rtol=1e-3)
    equal(step.fetch(step.place(fetched)), fetched)
    closed = rhino.auto_parallel(cache_dir="")(lambda x: x @ X.T + state["count"])
    found = step.fetch(closed(jnp.asarray(X)))
    np.testing.assert_allclose(found, X @ X.T + STEPS, rtol=1e-5)
    return step, state


def main(folder: Path) -> None:
    rhino.initialize()  # a second time: nothing happens
    assert not any(name.startswith("RHINO_") for name in os.environ)
    expected = undecorated()
    for name, options in PLANS.items():
        step, state = check(options, expected)
        step.save(folder / name, state, STEPS)
        equal(step.fetch(step.restore(folder / name)), step.fetch(state))
    _, loss = step(state, X)
    plans = [json.loads(step.plan.to_json())["sha256"], step.plan.mesh.num_devices]
    (folder / f"{jax.process_index()}.json").write_text(
        json.dumps({"next": float(loss), "plan": plans})
    )
    for wrong in (lambda: step.shard_batch(X[:7]), differ):
        try:
            wrong()
        except rhino.RhinoError as error:
            print(type(error).__name__, error)


def differ() -> None:
    """Another program and another option in every process."""
    rank = jax.process_index()
    scale = 1.0 + rank
    limit = 10**9 + rank
    step = rhino.auto_parallel(memory_limit_bytes=limit)(lambda w, x: w - scale * x)
    step(X, X)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
