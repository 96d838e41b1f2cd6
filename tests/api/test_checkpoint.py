"""States on disk: onto other plans and devices, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from rhino_jax.api.checkpoint import by_path, differences
from rhino_jax.errors import CheckpointError, SignatureError
from tests.api.resumed import EMPTY_LEAVES, Slots, X, init, losses, make


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((8, "zero3"), (8, "zero3")),
        ((8, "zero3"), (4, "zero3")),
        ((8, "zero3"), (2, "megatron")),
        ((8, "zero3"), (1, "zero3")),
        ((8, "zero3"), (8, "data_parallel", 2)),
        ((8, "zero3", 2), (4, "zero3", 2)),
        ((8, "zero3", 2), (4, "zero3")),
    ],
)
def test_another_plan_goes_on_with_the_same_losses(
    first: tuple[Any, ...], then: tuple[Any, ...], tmp_path: Path
) -> None:
    """Fewer devices, another recipe, pipelines from and to none."""
    step = make(*first)
    _, state = losses(step, step.init(init, jax.random.key(0), X), 2)
    step.save(tmp_path, state, 2)
    expected, _ = losses(step, state, 3)
    other = make(*then)
    shapes = jax.eval_shape(init, jax.random.key(0))
    state = other.restore(tmp_path, shapes, X)
    assert (
        state["rate"].weak_type
        and isinstance(state["slots"], Slots)
        and int(state["count"]) == 2
    )
    assert state["half"].dtype == jnp.bfloat16
    if EMPTY_LEAVES:
        assert state["empty"].shape == (0, 3)
    found, _ = losses(other, state, 3)
    assert len(other._entries) == 1, "what was restored is what was planned"
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_another_model_is_told_leaf_by_leaf(tmp_path: Path) -> None:
    step = make()
    state = step.init(init, jax.random.key(0), X)
    step.save(tmp_path, state, 0)

    def other_init(rng: jax.Array) -> Any:
        state = init(rng)
        w = {"up": jnp.ones((8, 64)), "out": jnp.ones((32, 8)), "bias": jnp.ones(3)}
        return {**state, "w": w, "half": jnp.ones((8,))}

    def other_step(state: Any, x: Any) -> Any:
        w = jax.tree.map(lambda p: p - 0.1 * jnp.mean(x), state["w"])
        return {**state, "w": w}, jnp.mean(x)

    other = rhino.auto_parallel(recipe="data_parallel")(other_step)
    shapes = jax.eval_shape(other_init, jax.random.key(0))
    with pytest.raises(CheckpointError) as caught:
        other.restore(tmp_path, shapes, X)
    told = str(caught.value)
    for line in (
        "w/up: float32[8, 32] in the checkpoint, float32[8, 64] here",
        "half: bfloat16[8] in the checkpoint, float32[8] here",
        "w/out: not in the checkpoint",
        "w/bias: not in the checkpoint",
        "w/down: only in the checkpoint",
    ):
        assert line in told


def test_what_is_not_there(tmp_path: Path) -> None:
    step = make()
    with pytest.raises(SignatureError, match=r"train_step.restore\(folder, state"):
        step.restore(tmp_path)
    state = step.init(init, jax.random.key(0), X)
    with pytest.raises(CheckpointError, match="has none"):
        step.restore(tmp_path)
    for number in (1, 2, 3):
        step.save(tmp_path, state, number, keep=2)
    assert rhino.saved_steps(tmp_path) == (2, 3)
    with pytest.raises(
        CheckpointError, match=r"step 1 is wanted, .* has those of 2, 3"
    ):
        step.restore(tmp_path, step=1)
    with pytest.raises(CheckpointError, match="holds a checkpoint of step 3 already"):
        step.save(tmp_path, state, 3)
    shutil.rmtree(tmp_path / "3" / "rhino")
    with pytest.raises(CheckpointError, match="no checkpoint that this Rhino wrote"):
        step.restore(tmp_path)
    step.restore(tmp_path, step=2)


def test_16_devices_go_on_and_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    """In a process of its own: a failed save leaves threads of Orbax behind."""
    step = make()
    _, state = losses(step, step.init(init, jax.random.key(0), X), 2)
    step.save(tmp_path, state, 2)
    expected, _ = losses(step, step.restore(tmp_path), 3)
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=16")
    done = subprocess.run(
        [sys.executable, "-m", "tests.api.resumed", str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, told = done.stdout.split("|")
    np.testing.assert_allclose(json.loads(found), expected * 2, rtol=1e-6)
    assert "File too large" in told and "that are whole: 2." in told
    assert rhino.saved_steps(tmp_path) == (2,)
    jax.tree.map(same, state, step.restore(tmp_path))
    step.save(tmp_path, state, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def same(one: jax.Array, other: jax.Array) -> None:
    if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_two_leaves_of_one_path() -> None:
    with pytest.raises(CheckpointError, match="one path: a/b; rename"):
        by_path({"a": {"b": 1}, "a/b": 2, "c": 3})


def test_differences_name_the_nearest() -> None:
    found = differences({"w/kernel": "float32[4]"}, {"w/kernels": "float32[4]"})
    assert found == [
        "w/kernels: not in the checkpoint (is it w/kernel?)",
        "w/kernel: only in the checkpoint",
    ]
