"""``rhino verify``: a step by name, compiled; what is wrong with the name, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rhino_jax.cli import main
from rhino_jax.errors import OptionsError

STEP = """
import jax
import jax.numpy as jnp


def train_step(w, x):
    loss = lambda w: jnp.mean(jnp.tanh(x @ w))
    value, grad = jax.value_and_grad(loss)(w)
    return w - 0.1 * grad, value


def make_step():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return train_step, f32(64, 64), f32(128, 64)


def nothing():
    return None
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "train.py"
    place.write_text(STEP)
    return place


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


def test_a_step_is_compiled_and_compared(file: Path) -> None:
    done = run(f"{file}:make_step", "--cluster", "cpu:8", "--recipe", "data_parallel")
    assert done.exit_code == 0, done.output
    assert "the compiled program is the plan, and fits" in done.output
    assert "all-reduce" in done.output


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("{}:make_stepp", "did you mean make_step"),
        ("{}:nothing", r"must return (train_step, *arguments), it returned NoneType"),
        ("{}", "write module:function"),
        ("nowhere.py:make_step", "no such file"),
        ("no_such_module:make_step", "no module 'no_such_module'"),
    ],
)
def test_wrong_names(file: Path, named: str, said: str) -> None:
    done = run(named.format(file), "--cluster", "cpu:8")
    assert done.exit_code == 1 and said in done.output, done.output


def test_hardware_must_be_named(file: Path) -> None:
    done = run(f"{file}:make_step")
    assert done.exit_code == 1 and "--cluster h100:2x8" in done.output
    assert OptionsError.__name__ not in done.output
